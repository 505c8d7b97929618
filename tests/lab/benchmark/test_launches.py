"""Launches and bytes of a layer, counted on the meta device."""

import torch
from torch import nn

from pipeline.lab.benchmark.launches import LaunchCounter, layer_costs
from pipeline.lab.benchmark.shapes import published_config
from tests.lab.benchmark.test_synthetic import tiny_config


def counted(function):
    with LaunchCounter() as counter:
        function()
    return dict(counter.found.launches), dict(counter.found.moved)


def test_an_operator_moves_its_inputs_and_outputs_and_a_view_moves_nothing():
    x, y = torch.ones(4, 8), torch.ones(4, 8)
    assert counted(lambda: x.view(8, 4).t()[1:].unsqueeze(0)) == ({}, {})
    assert counted(lambda: x + y) == ({"add": 1}, {"add": 3 * 4 * 8 * 4})
    assert counted(lambda: x * x)[1] == {"mul": 2 * 4 * 8 * 4}
    assert counted(lambda: x + torch.ones(1, 8).expand(4, 8))[1]["add"] == (2 * 4 + 1) * 8 * 4


def test_a_lookup_reads_the_rows_that_it_finds_and_not_its_table():
    table, places = torch.ones(1000, 8), torch.tensor([3, 5])
    moved = 2 * (2 * 8 * 4) + 2 * 8  # read and written, and the places
    assert counted(lambda: nn.functional.embedding(places, table))[1] == {"embedding": moved}


def test_a_layers_cost_is_that_of_one_layer_and_grows_with_its_tokens_but_for_its_weights():
    def config(layers):
        return tiny_config("llama", num_hidden_layers=layers)

    of_one, of_two = (layer_costs(config, [n, n], [None, 0], kernels=False) for n in (20, 40))
    assert [cost.launches for cost in of_one] == [cost.launches for cost in of_two]
    for one, two in zip(of_one, of_two, strict=True):
        activations = 2 * 40 * 32 * 2  # in and out, in bfloat16
        assert two.least - one.least == activations and one.least_of_products < one.moved < two.moved < 4 * one.moved
        assert sum(moved for _, moved in one.by_name.values()) == one.moved


def test_a_shape_of_seven_billion_parameters_is_counted_without_its_memory():
    forward, backward = layer_costs(lambda layers: published_config("llama-7b", layers), [64], [None], kernels=False)
    assert forward.least > 202e6 and backward.least == forward.least
    assert forward.by_name["_int_mm"][0] == backward.by_name["_int_mm"][0] == 7
