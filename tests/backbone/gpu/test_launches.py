"""How many kernels a GPU is asked to launch for a layer, and what they move, counted without one."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

import torch

from pipeline.lab.benchmark.launches import layer_costs
from pipeline.lab.benchmark.shapes import published_config

# Prompts of 100 tokens, and texts behind them.
LENGTHS, PARENTS = [100] * 4 + [25] * 64, [None] * 4 + [row % 4 for row in range(64)]


def of_a_layer(shape, kernels, dtype):
    return layer_costs(lambda layers: published_config(shape, layers), LENGTHS, PARENTS, kernels, dtype)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, (24, 30)), (torch.bfloat16, (24, 31))])
def test_a_layer_takes_few_launches(dtype, most):
    costs = of_a_layer("llama-7b", True, dtype)
    assert [cost.by_name["_int_mm"][0] for cost in costs] == [7, 7]
    assert all(cost.launches <= limit for cost, limit in zip(costs, most, strict=True)), costs


@pytest.mark.parametrize("shape", ["llama-7b", "llama-3b"])
def test_a_layer_moves_less_than_half_of_what_pytorchs_operators_move(shape):
    for ours, theirs in zip(*(of_a_layer(shape, kernels, torch.bfloat16) for kernels in (True, False)), strict=True):
        assert ours.least < ours.least_of_products < ours.moved < theirs.moved / 2 and ours.launches < theirs.launches
