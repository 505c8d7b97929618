"""The compiled row kernels against PyTorch's operators."""

import os
import subprocess
import sys

import pytest
import torch
from bitsandbytes.functional import int8_vectorwise_quant

from pipeline.backbone import int8
from pipeline.backbone.fused import _ACTIVATIONS, RmsNorm
from pipeline.backbone.native import rows
from pipeline.backbone.native.build import load_kernels

needs_compiler = pytest.mark.skipif(load_kernels() is None, reason="no C compiler on this machine")


def awkward_rows(n: int, width: int) -> torch.Tensor:
    """Rows of every size, one of zeros, some with entries half-way between two whole numbers."""
    torch.manual_seed(0)
    x = torch.randn(n, width) * torch.logspace(-20, 20, n)[:, None]
    x[0] = 0.0
    x[1] = torch.arange(width) * 0.5 - 3
    x[1, 0] = 127.0
    return x


@needs_compiler
@pytest.mark.parametrize("width", [1, 17, 576])
@pytest.mark.parametrize("with_columns", [False, True])
def test_rows_are_quantised_bit_by_bit_as_pytorch_does_it(width, with_columns):
    x = awkward_rows(40, width)
    columns = torch.rand(width) + 0.5 if with_columns else None
    ours, reference = (int8._quantize(x, kernels, columns) for kernels in (True, False))
    assert torch.equal(ours[0], reference[0]) and torch.equal(ours[1], reference[1])


@needs_compiler
@pytest.mark.parametrize("width", [1, 17, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_quantised_bit_by_bit_as_bitsandbytes_does_it(width, dtype):
    weight = torch.cat([awkward_rows(40, width), torch.randn(2000, width)]).to(dtype)
    quantised, largest = rows.quantize_weights(weight)
    reference, absmax, _ = int8_vectorwise_quant(weight.float())
    assert torch.equal(quantised, reference) and torch.equal(largest, absmax)


@needs_compiler
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_so_by_its_scale_and_alone(bad):
    x = awkward_rows(6, 33)
    x[3, 7] = bad
    quantised, scale = rows.quantize_activations(x)
    assert not scale[3].isfinite() and scale[[0, 1, 2, 4, 5]].isfinite().all()
    others = [0, 1, 2, 4, 5]
    assert torch.equal(quantised[others], rows.quantize_activations(x[others])[0])


@needs_compiler
def test_products_are_rescaled_bit_by_bit_as_pytorch_does_it():
    product = torch.randint(-(2**30), 2**30, (7, 33), dtype=torch.int32)
    scale, columns = torch.rand(7, 1), torch.rand(33)
    for of_columns in (None, columns):
        ours, reference = (int8._rescale(product, scale, of_columns, kernels) for kernels in (True, False))
        assert torch.equal(ours, reference)


def values_and_gradients(function, *inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = function(*inputs)
    torch.manual_seed(1)
    return [y, *torch.autograd.grad(y, inputs, torch.randn_like(y))]


@needs_compiler
@pytest.mark.parametrize("width", [5, 576])
@pytest.mark.parametrize("plus_one", [False, True])
def test_the_norm_and_its_gradient_are_pytorchs(width, plus_one):
    norm = RmsNorm(torch.nn.Parameter(torch.rand(width) + 0.5, requires_grad=False), 1e-5, plus_one)
    x = torch.randn(2, 9, width) * 3
    results = []
    for norm.kernels in (True, False):
        results.append(values_and_gradients(norm, x))
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


@needs_compiler
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_the_gated_product_and_its_gradients_are_pytorchs(activation):
    gate = torch.cat([torch.randn(9, 33) * 3, torch.tensor([[-200.0, -90.0, 90.0] * 11])])
    up = torch.randn_like(gate)
    ours = values_and_gradients(lambda g, u: rows.GatedProductFunction.apply(g, u, activation), gate, up)
    reference = values_and_gradients(lambda g, u: _ACTIVATIONS[activation](g) * u, gate, up)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.processes
def test_without_a_compiler_pytorchs_operators_do_the_work(tmp_path):
    program = """
import torch
from pipeline.backbone.native.build import load_kernels
from pipeline.backbone.native import rows
assert load_kernels() is None and not rows.supports(torch.zeros(1))
"""
    environment = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
