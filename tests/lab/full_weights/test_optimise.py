"""Adafactor on pieces, compared with transformers' Adafactor on whole parameters."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers.optimization import Adafactor

from pipeline.backbone.loading import Partition
from pipeline.lab.full_weights.optimise import PartitionedAdafactor, Span
from tests.ranks import run_ranks

SHAPES = [(7, 5), (3, 11), (9,), (1,), (4, 4)]
LR, DECAY, STEPS = 0.02, 0.01, 5


def weights_and_gradients():
    generator = torch.Generator().manual_seed(0)
    # One parameter is so small that the least scale counts; one gradient is large enough to be clipped.
    weights = [
        torch.randn(shape, generator=generator) * scale for shape, scale in zip(SHAPES, (1, 1e-5, 1, 1, 3), strict=True)
    ]
    gradients = [[torch.randn(shape, generator=generator) * 10**step for shape in SHAPES] for step in range(STEPS)]
    return weights, gradients


def of_transformers():
    weights, gradients = weights_and_gradients()
    parameters = [torch.nn.Parameter(weight) for weight in weights]
    optimizer = Adafactor(parameters, lr=LR, weight_decay=DECAY, scale_parameter=True, relative_step=False)
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [parameter.detach().view(-1).numpy() for parameter in parameters]


def of_pieces(rank, ranks):
    """What this rank's pieces become, each padded as ZeRO pads it, with rubbish in the padding."""
    weights, gradients = weights_and_gradients()
    share = Partition(rank, ranks)
    spans = [Span(weight.shape, *share.span(weight.numel())) for weight in weights]

    def piece(whole, span):
        padded = torch.full((share.size(whole.numel()),), 1e3)
        padded[: span.stop - span.start] = whole.reshape(-1)[span.start : span.stop]
        return padded

    pieces = [piece(weight, span).requires_grad_() for weight, span in zip(weights, spans, strict=True)]
    optimizer = PartitionedAdafactor(pieces, LR, DECAY)
    optimizer.describe(dict(zip(pieces, spans, strict=True)))
    for of_step in gradients:
        for values, gradient, span in zip(pieces, of_step, spans, strict=True):
            values.grad = piece(gradient, span)
        optimizer.step()
    return [values.detach()[: span.stop - span.start].numpy() for values, span in zip(pieces, spans, strict=True)]


def on_rank():
    return of_pieces(dist.get_rank(), dist.get_world_size())


def test_one_rank_steps_as_transformers_does():
    for ours, reference in zip(of_pieces(0, 1), of_transformers(), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.processes
def test_pieces_on_several_ranks_become_pieces_of_what_transformers_makes_of_the_whole(ranks):
    by_rank = run_ranks(ranks, on_rank)
    for parts, reference in zip(zip(*by_rank, strict=True), of_transformers(), strict=True):
        np.testing.assert_allclose(np.concatenate(parts), reference, rtol=1e-5, atol=1e-7)
