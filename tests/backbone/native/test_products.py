"""The compiled int8 products against PyTorch's, each way that this processor has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backbone import int8
from pipeline.backbone.native import products, rows

needs_instructions = pytest.mark.skipif(not products.ways(), reason="no compiler, or no instructions for int8 products")
needs_int16 = pytest.mark.skipif(
    not products.supports_int16(torch.empty(1, 1)), reason="no compiler, or no instructions for int16 products"
)
sides = st.one_of(st.integers(1, 140), st.sampled_from([576, 1536]))


def whole_numbers(*shape):
    """All numbers of 8 bits, -128 too."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@needs_instructions
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), sides, sides, st.booleans())
def test_products_are_pytorchs_rescaled_bit_by_bit(n, inner, outer, across):
    numbers, scale = whole_numbers(n, inner), torch.rand(n, 1)
    weight = whole_numbers(inner, outer) if across else whole_numbers(outer, inner)
    columns = None if across else torch.rand(outer)
    # By floats of 64 bits, which are exact here: torch's own product is wrong where the sum has one term.
    whole = (numbers.double() @ (weight if across else weight.t()).double()).to(torch.int32)
    expected = int8._rescale(whole, scale, columns, kernels=False)
    for way in products.ways():
        assert torch.equal(products.multiply(numbers, scale, weight, columns, across, way), expected)


@needs_instructions
def test_the_longest_sum_of_the_largest_numbers_fits():
    numbers, weight = (torch.full((1, products._LONGEST_SUM), -128, dtype=torch.int8) for _ in range(2))
    numbers = numbers.clamp(min=-127)  # as activations are quantised
    for way in products.ways():
        found = products.multiply(numbers, torch.ones(1, 1), weight, None, across=False, way=way)
        assert found.item() == 127 * 128 * products._LONGEST_SUM


@needs_instructions
def test_a_row_that_is_not_finite_makes_no_other_so():
    numbers, scale, weight = whole_numbers(40, 64), torch.rand(40, 1), whole_numbers(64, 64)
    scale[7] = float("nan")
    for way in products.ways():
        found = products.multiply(numbers, scale, weight, None, across=True, way=way)
        assert found.isnan().any(1).nonzero().flatten().tolist() == [7]


@needs_instructions
def test_products_of_digits_are_as_exact_as_products_of_floats(monkeypatch):
    torch.manual_seed(0)
    layer = int8.Int8Linear(torch.nn.Parameter(whole_numbers(300, 200), requires_grad=False), None)
    layer.scale, layer.kernels, layer.digits = torch.rand(300), True, True
    monkeypatch.setattr(int8, "_IN_CACHE", 64 * 200)
    monkeypatch.setattr(int8, "_FEWEST_CONVERTED_ROWS", 64)
    kept = layer._parameters["weight"].double() * layer.scale.double()[:, None]
    # Hidden states with an outlier, and a gradient as of a softmax: one large entry and many small ones.
    x, upstream = torch.randn(2, 7, 200), torch.rand(2, 7, 300).pow(8) * 1e-3
    x[..., 3] *= 30
    upstream[..., 5] = -1.0
    results = []
    for leaf, weight in ((x, None), (x, kept.float()), (x.double(), kept)):
        leaf = leaf.clone().requires_grad_()
        y = layer(leaf) if weight is None else leaf @ weight.t()
        results.append([y.detach(), *torch.autograd.grad(y, leaf, upstream.to(y.dtype))])
    for ours, floats, exact in zip(*results, strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).norm() <= max(2 * (floats - exact).norm(), 1e-6 * exact.norm())


@needs_instructions
def test_digits_of_a_row_that_is_not_finite_spoil_no_other():
    x = torch.randn(4, 33)
    x[1, 7], x[2] = float("nan"), 0.0
    weight = whole_numbers(20, 33)
    found = int8._sum_of_digits(*rows.quantize_digits(x), weight, torch.ones(20))
    assert found[1].isnan().all() and not found[2].any()
    torch.testing.assert_close(found[[0, 3]], x[[0, 3]] @ weight.float().t(), rtol=1e-5, atol=1e-3)


@needs_instructions
def test_several_threads_give_what_one_gives_and_leave_other_products_as_they_are():
    numbers, scale, weight = whole_numbers(300, 100), torch.rand(300, 1), whole_numbers(200, 100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append([products.multiply(numbers, scale, weight, None, False, way) for way in products.ways()])
            # A library that uses the same tiles goes on as it would by itself.
            results[-1].append(torch._int_mm(numbers, weight.t()).float() * scale)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found, results[0][0]) for found in (*results[0], *results[1]))


@needs_int16
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 140), sides, sides)
def test_int16_products_are_sums_of_whole_numbers_rescaled(n, inner, outer):
    deep, levels = rows.fine_sides(inner)
    numbers = torch.zeros(n, deep, dtype=torch.int16)
    numbers[:, :inner] = torch.randint(-levels, levels + 1, (n, inner))
    weight, scale, columns = whole_numbers(outer, inner), torch.rand(n, 1), torch.rand(outer)
    whole = (numbers[:, :inner].double() @ weight.double().t()).to(torch.int32)
    expected = int8._rescale(whole, scale, columns, kernels=False)
    assert torch.equal(products.multiply_int16(numbers, scale, weight, columns), expected)


@needs_int16
@pytest.mark.parametrize("inner", [1, 576, 1536, products._LONGEST_SUM])
def test_the_longest_sum_of_the_largest_int16_numbers_fits(inner):
    deep, levels = rows.fine_sides(inner)
    numbers, weight = torch.full((1, deep), levels, dtype=torch.int16), torch.full((1, inner), -128, dtype=torch.int8)
    found = products.multiply_int16(numbers, torch.ones(1, 1), weight, torch.ones(1))
    assert found.item() == pytest.approx(-128 * levels * inner, rel=1e-6)


@needs_int16
@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), sides)
def test_int16_rows_are_within_half_a_step_of_their_floats(n, width):
    x = torch.randn(n, width) * torch.logspace(-6, 6, n)[:, None]
    numbers, scale = rows.quantize_finely(x)
    _, levels = rows.fine_sides(width)
    assert not numbers[:, width:].any() and int(numbers.abs().max()) <= levels
    error = (numbers[:, :width].double() * scale.double() - x.double()).abs()
    # A step is up to 60,000 steps from zero, where a float32 is off by some thousandths of one.
    assert bool((error <= 0.51 * scale).all())


@needs_int16
def test_an_int16_row_that_is_not_finite_spoils_no_other():
    x, weight = torch.randn(5, 64), whole_numbers(30, 64)
    x[2, 7], x[4, 0] = float("nan"), float("inf")
    found = products.multiply_int16(*rows.quantize_finely(x), weight, torch.ones(30))
    assert (~found.isfinite()).any(1).nonzero().flatten().tolist() == [2, 4]
