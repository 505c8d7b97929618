"""The compiled attention against the same attention by PyTorch's operators."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.backbone import packed_attention
from pipeline.backbone.native import attention
from pipeline.backbone.native.build import load_kernels
from pipeline.backbone.segments import make_segments

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler on this machine")
CPU = torch.device("cpu")


@st.composite
def forests(draw):
    """Prompts, texts behind them and labels behind texts; the prompts may be given."""
    prompts = draw(st.lists(st.integers(1, 70), min_size=1, max_size=3))
    lengths, parents = list(prompts), [None] * len(prompts)
    for _ in range(draw(st.integers(1, 8))):
        parents.append(draw(st.integers(0, len(lengths) - 1)))
        lengths.append(draw(st.integers(1, 40)))
    return make_segments(lengths, parents, len(prompts) if draw(st.booleans()) else 0)


def tensors(segments, heads, key_heads, size):
    torch.manual_seed(0)
    total = int(segments.lengths.sum())
    run = total - segments.given_tokens
    shapes = [(run, heads, size), (total, key_heads, size), (total, key_heads, size)]
    return [torch.randn(shape, requires_grad=True) for shape in shapes], torch.randn(run, heads, size)


def by_torch(segments, q, k, v, rotation=None):
    if rotation is not None:
        q, own = (rotated(x, rotation) for x in (q, k[segments.given_tokens :]))
        k = torch.cat([k[: segments.given_tokens], own])
    levels = packed_attention.make_levels(segments, CPU)
    return packed_attention.attend(q * q.shape[-1] ** -0.5, k, v, levels)


def by_kernel(segments, q, k, v, rotation=None):
    return attention.attend(q, k, v, q.shape[-1] ** -0.5, attention.make_forest(segments), rotation)


def rotated(x, rotation):
    """As transformers rotates: pairs lie half a head apart."""
    cosine, sine = (part.repeat(1, 2)[:, None] for part in rotation)
    first, second = x.chunk(2, -1)
    return x * cosine + torch.cat([-second, first], -1) * sine


def assert_same(segments, sides, rotation=None, attend=by_kernel):
    (q, k, v), upstream = tensors(segments, *sides)
    expected, ours = (side(segments, q, k, v, rotation) for side in (by_torch, attend))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    gradients = [torch.autograd.grad(y, (q, k, v), upstream) for y in (ours, expected)]
    for name, mine, theirs in zip("qkv", *gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"d{name}: {m}")


@settings(max_examples=40, deadline=None)
@given(forests(), st.sampled_from([(4, 2, 8), (3, 3, 20), (9, 3, 64), (8, 1, 16)]))
def test_outputs_and_gradients_are_those_of_pytorchs_operators(segments, sides):
    assert_same(segments, sides)


@settings(max_examples=20, deadline=None)
@given(forests())
def test_rotating_inside_the_kernel_is_rotating_before_it(segments):
    angles = torch.randn(int(segments.lengths.sum()) - segments.given_tokens, 10)
    assert_same(segments, (4, 2, 20), (angles.cos().contiguous(), angles.sin().contiguous()))


def assert_a_tree_gone_nan_leaves_the_others_as_they_were(attend):
    segments = make_segments([5, 3, 7, 4, 9], [None, None, 0, 1, 1])
    (q, k, v), upstream = tensors(segments, 4, 2, 16)
    second = torch.cat([torch.arange(5, 8), torch.arange(15, 28)])
    first = torch.cat([torch.arange(0, 5), torch.arange(8, 15)])
    before = attend(segments, q, k, v)
    gradients = torch.autograd.grad(before, (q, k, v), upstream)
    spoiled = [x.detach().clone().index_fill_(0, second, float("nan")).requires_grad_() for x in (q, k, v)]
    after = attend(segments, *spoiled)
    spoiled_gradients = torch.autograd.grad(after, spoiled, upstream)
    assert torch.equal(before[first], after[first]) and after[second].isnan().all()
    for mine, theirs in zip(gradients, spoiled_gradients, strict=True):
        assert torch.equal(mine[first], theirs[first])


def test_a_tree_gone_nan_leaves_the_others_as_they_were_bit_by_bit():
    assert_a_tree_gone_nan_leaves_the_others_as_they_were(by_kernel)


def test_several_threads_give_what_one_gives_bit_by_bit():
    segments = make_segments([30, 20, 7, 4, 9], [None, None, 0, 1, 1])
    (q, k, v), upstream = tensors(segments, 4, 2, 16)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out = by_kernel(segments, q, k, v)
            results.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, many) for one, many in zip(*results, strict=True))
