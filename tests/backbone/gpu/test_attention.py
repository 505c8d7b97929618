"""The fused attention of GPUs, by Triton's interpreter on a CPU, against PyTorch's operators and the CPU's kernel.

`make test-triton` installs Triton beside the environment and runs it; without Triton the tests are skipped.
"""

import os

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported
pytest.importorskip("triton", reason="Triton is not installed: make test-triton")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backbone.gpu import attention
from pipeline.backbone.segments import make_segments
from tests.backbone.native.test_attention import (
    CPU,
    assert_a_tree_gone_nan_leaves_the_others_as_they_were,
    assert_same,
    by_torch,
    rotated,
    tensors,
)


@st.composite
def forests(draw):
    """Prompts, texts behind them and labels behind texts; the prompts may be given. Some are longer than a tile."""
    prompts = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    lengths, parents = list(prompts), [None] * len(prompts)
    for _ in range(draw(st.integers(1, 5))):
        parents.append(draw(st.integers(0, len(lengths) - 1)))
        lengths.append(draw(st.integers(1, 40)))
    return make_segments(lengths, parents, len(prompts) if draw(st.booleans()) else 0)


def by_triton(segments, q, k, v, rotation=None):
    assert rotation is None, "another kernel rotates"
    return attention.attend(q, k, v, q.shape[-1] ** -0.5, attention.make_tables(segments, CPU))


@settings(max_examples=10, deadline=None)
@given(forests(), st.sampled_from([(4, 2, 8), (3, 3, 20), (2, 1, 64)]))
def test_outputs_and_gradients_are_those_of_pytorchs_operators(segments, sides):
    assert_same(segments, sides, attend=by_triton)


def test_half_precision_is_within_its_rounding_of_float64():
    # Not bfloat16: the interpreter multiplies the bit patterns of its numbers (findings/).
    segments = make_segments([40, 33, 7, 4, 9], [None, None, 0, 1, 1])
    (q, k, v), upstream = tensors(segments, 4, 2, 16)
    low = [x.detach().half().requires_grad_() for x in (q, k, v)]
    high = [x.detach().double().requires_grad_() for x in low]
    ours, expected = by_triton(segments, *low), by_torch(segments, *high)
    torch.testing.assert_close(ours.double(), expected, rtol=0.005, atol=0.005)
    mine = torch.autograd.grad(ours, low, upstream.half())
    theirs = torch.autograd.grad(expected, high, upstream.half().double())
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.01, atol=0.01)


def test_a_tree_gone_nan_leaves_the_others_as_they_were_bit_by_bit():
    assert_a_tree_gone_nan_leaves_the_others_as_they_were(by_triton)


@pytest.mark.parametrize(("heads", "key_heads", "size"), [(4, 2, 20), (3, 1, 64)])
def test_one_launch_rotates_queries_and_keys_as_transformers_does_and_turns_gradients_back(heads, key_heads, size):
    torch.manual_seed(0)
    q, k = (torch.randn(7, n, size, requires_grad=True) for n in (heads, key_heads))
    angles = torch.randn(7, size // 2)
    rotation = (angles.cos(), angles.sin())
    ours, expected = attention.rotate(q, k, rotation), [rotated(x, rotation) for x in (q, k)]
    upstream = [torch.randn_like(x) for x in (q, k)]
    gradients = [torch.autograd.grad(both, (q, k), upstream) for both in (ours, expected)]
    for mine, theirs in zip((*ours, *gradients[0]), (*expected, *gradients[1]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
