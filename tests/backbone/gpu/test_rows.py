"""Quantising and rescaling on GPUs, by Triton's interpreter on a CPU, against PyTorch's operators."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

import torch
from torch import nn

from pipeline.backbone import int8
from pipeline.backbone.fused import _ACTIVATIONS, RmsNorm
from pipeline.backbone.gpu import rows

SMALLEST = int8._SMALLEST


@pytest.mark.parametrize("width", [1, 7, 1024, 1500])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("scaled", [False, True])
def test_rows_are_quantised_as_by_pytorchs_operators_to_the_last_bit(width, kind, scaled):
    torch.manual_seed(width)
    x = torch.randn(5, width).to(kind)
    x[0] = 0
    x[1] *= 1e-3
    columns = torch.rand(width) if scaled else None
    ours, expected = rows.quantize_activations(x, SMALLEST, columns), int8._quantize(x, False, columns)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_numbers_that_lie_between_two_steps_go_to_the_even_one():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5]])
    assert rows.quantize_activations(x, SMALLEST)[0].tolist() == [[127, 0, 2, 2, 0, -2, 126]]


@pytest.mark.parametrize("spoiled", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_its_own_scale_alone(spoiled):
    x = torch.randn(3, 1030, generator=torch.Generator().manual_seed(0))
    clean = rows.quantize_activations(x, SMALLEST)
    x[1, 1029] = spoiled
    found = rows.quantize_activations(x, SMALLEST)
    assert not found[1][1].isfinite()
    for one, other in zip(found, clean, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])


@pytest.mark.parametrize("width", [3, 1024, 2050])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_product_is_rescaled_as_by_pytorchs_operators_to_the_last_bit(width, scaled, kind):
    torch.manual_seed(width)
    product = torch.randint(-(2**24), 2**24, (4, width), dtype=torch.int32)
    row_scale, columns = torch.rand(4, 1) * 1e-4, torch.rand(width) if scaled else None
    found = rows.rescale(product, row_scale, columns, kind)
    expected = int8._rescale(product, row_scale, columns, False, kind)
    assert found.dtype == expected.dtype == kind and torch.equal(found, expected)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize(("plus_one", "wide"), [(False, False), (True, True), (True, False), (False, True)])
def test_a_norm_and_its_gradient_are_those_of_the_layer(kind, plus_one, wide):
    torch.manual_seed(0)
    layer = RmsNorm(nn.Parameter(torch.randn(1100).to(kind), requires_grad=False), 1e-5, plus_one, wide)
    x, upstream = torch.randn(2, 3, 1100).to(kind).requires_grad_(), torch.randn(2, 3, 1100).to(kind)
    ours, expected = rows.RmsNormFunction.apply(x, layer.weight, 1e-5, plus_one, wide), layer(x)
    close = {"rtol": 1e-5, "atol": 1e-5} if kind == torch.float32 else {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(ours, expected, **close)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, x, upstream)[0] for y in (ours, expected)), **{n: 3 * v for n, v in close.items()}
    )


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_product_and_its_gradients_are_quantised_within_one_step_of_pytorchs(activation):
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(4, 1100) * 2 for _ in range(3))
    columns = (torch.rand(1100), torch.rand(1100))
    leaves = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    product = _ACTIVATIONS[activation](leaves[0]) * leaves[1]
    wanted = [int8._quantize(product.detach(), False)]
    wanted += [
        int8._quantize(g, False, c) for g, c in zip(torch.autograd.grad(product, leaves, grad), columns, strict=True)
    ]
    found = [rows.gated_rows(gate, up, activation, SMALLEST)]
    found += rows.gated_gradients(grad, gate, up, columns, activation, SMALLEST)
    for (ours, scale), (theirs, of_theirs) in zip(found, wanted, strict=True):
        torch.testing.assert_close(scale, of_theirs, rtol=1e-5, atol=0)
        assert (ours.int() - theirs.int()).abs().max() <= 1 and (ours != theirs).float().mean() < 0.01


def test_a_gated_row_that_is_not_finite_spoils_its_own_scales_alone():
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(3, 40) for _ in range(3))
    columns = (torch.ones(40), torch.ones(40))

    def run():
        return [
            rows.gated_rows(gate, up, "silu", SMALLEST),
            *rows.gated_gradients(grad, gate, up, columns, "silu", SMALLEST),
        ]

    clean = run()
    up[1, 3] = float("nan")
    for (ours, scale), (before, of_before) in zip(run(), clean, strict=True):
        assert scale[1].isnan() and torch.equal(ours[[0, 2]], before[[0, 2]])
        assert torch.equal(scale[[0, 2]], of_before[[0, 2]])
