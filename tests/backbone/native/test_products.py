"""The compiled int8 products against PyTorch's, each way that this processor has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backbone import int8
from pipeline.backbone.native import products

needs_instructions = pytest.mark.skipif(not products.ways(), reason="no compiler, or no instructions for int8 products")
sides = st.one_of(st.integers(1, 140), st.sampled_from([576, 1536]))


def whole_numbers(*shape):
    """All numbers of 8 bits, -128 too."""
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@needs_instructions
@settings(max_examples=60, deadline=None)
@given(st.integers(1, 80), sides, sides, st.booleans())
def test_products_are_pytorchs_rescaled_bit_by_bit(n, inner, outer, across):
    rows, scale = whole_numbers(n, inner), torch.rand(n, 1)
    weight = whole_numbers(inner, outer) if across else whole_numbers(outer, inner)
    columns = None if across else torch.rand(outer)
    # By floats of 64 bits, which are exact here: torch's own product is wrong where the sum has one term.
    whole = (rows.double() @ (weight if across else weight.t()).double()).to(torch.int32)
    expected = int8._rescale(whole, scale, columns, kernels=False)
    for way in products.ways():
        assert torch.equal(products.multiply(rows, scale, weight, columns, across, way), expected)


@needs_instructions
def test_the_longest_sum_of_the_largest_numbers_fits():
    rows, weight = (torch.full((1, products._LONGEST_SUM), -128, dtype=torch.int8) for _ in range(2))
    rows = rows.clamp(min=-127)  # as activations are quantised
    for way in products.ways():
        found = products.multiply(rows, torch.ones(1, 1), weight, None, across=False, way=way)
        assert found.item() == 127 * 128 * products._LONGEST_SUM


@needs_instructions
def test_a_row_that_is_not_finite_makes_no_other_so():
    rows, scale, weight = whole_numbers(40, 64), torch.rand(40, 1), whole_numbers(64, 64)
    scale[7] = float("nan")
    for way in products.ways():
        found = products.multiply(rows, scale, weight, None, across=True, way=way)
        assert found.isnan().any(1).nonzero().flatten().tolist() == [7]


@needs_instructions
def test_several_threads_give_what_one_gives_and_leave_other_products_as_they_are():
    rows, scale, weight = whole_numbers(300, 100), torch.rand(300, 1), whole_numbers(200, 100)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append([products.multiply(rows, scale, weight, None, False, way) for way in products.ways()])
            # A library that uses the same tiles goes on as it would by itself.
            results[-1].append(torch._int_mm(rows, weight.t()).float() * scale)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found, results[0][0]) for found in (*results[0], *results[1]))
