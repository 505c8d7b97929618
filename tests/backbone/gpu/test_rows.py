"""Quantising and rescaling on GPUs, by Triton's interpreter on a CPU, against PyTorch's operators."""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

import torch

from pipeline.backbone import int8
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
def test_a_product_is_rescaled_as_by_pytorchs_operators_to_the_last_bit(width, scaled):
    torch.manual_seed(width)
    product = torch.randint(-(2**24), 2**24, (4, width), dtype=torch.int32)
    row_scale, columns = torch.rand(4, 1), torch.rand(width) if scaled else None
    assert torch.equal(
        rows.rescale(product, row_scale, columns), int8._rescale(product, row_scale, columns, kernels=False)
    )
