"""Attention of packed segments in one kernel, which neither gathers nor pads, and keeps no scores.

Shapes: N tokens that run, G tokens that are given. A heads, A' heads of keys, D head size.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.backbone.native.build import load_kernels
from pipeline.backbone.native.rows import supports
from pipeline.backbone.segments import Segments

__all__ = ["DistanceBias", "Forest", "Parts", "attend", "attend_growing", "make_forest", "rotated", "supports"]

_P = ctypes.c_void_p
_SIGNATURE = [_P, ctypes.c_float, *[_P] * 16]
_LANES = 16
"""Floats of the widest vector that the kernel reads."""

Sees = Literal["causal", "whole", "ancestors"]
"""What a token sees beside its segment's ancestors: its segment up to itself, all of it, or none of it."""
_SEES: dict[Sees, int] = {"causal": 0, "whole": 1, "ancestors": 2}


@dataclass(frozen=True, eq=False)
class Forest:
    """Segments in the order in which the kernel walks them: tree by tree, siblings beside each other.

    A tree is a prompt with all that follows it. Siblings share their ancestors' keys, which stay in the cache.
    """

    segments: Segments
    order: np.ndarray
    """Segments that run."""
    trees: np.ndarray
    """Index in `order` of each tree's first segment, and the end of the last tree."""
    most_before: int
    """Tokens of the longest chain of ancestors."""


def make_forest(segments: Segments) -> Forest:
    # Threads share the work by trees and heads: one thread sums the gradients of a tree's keys, in a fixed order.
    roots = np.array([chain[0] for chain in segments.chains()])
    run = np.array(segments.run)
    order = run[np.lexsort((run, segments.parents[run], roots[run]))].astype(np.int64)
    _, first = np.unique(roots[order], return_index=True)
    trees = np.append(first, len(order)).astype(np.int64)
    return Forest(segments, order, trees, int(segments.before.max()))


Rotation = tuple[Tensor, Tensor]
"""Cosine and sine `[N, D / 2]` of the angles by which each token's queries and keys are rotated."""


def rotated(x: Tensor, rotation: Rotation) -> Tensor:
    """X `[N, A, D]` as the kernel rotates it: pairs lie half a head apart."""
    cosine, sine = (part[:, None] for part in rotation)
    first, second = x.chunk(2, -1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], -1)


@dataclass(frozen=True, eq=False)
class DistanceBias:
    """What is added to a score by how far behind its query a key stands, as in T5."""

    table: Tensor
    """`[A, 2 L - 1]` float32 for the distances from 1 - L to L - 1, without a gradient."""

    @property
    def zero(self) -> int:
        """The column of the distance 0."""
        return self.table.shape[1] // 2

    @cached_property
    def readable(self) -> Tensor:
        """The same with columns behind it, which whole vectors reach into."""
        return functional.pad(self.table, (0, _LANES)).contiguous()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    forest: Forest,
    rotation: Rotation | None = None,
    sees: Sees = "causal",
    bias: DistanceBias | None = None,
) -> Tensor:
    """Q `[N, A, D]`, k and v `[G + N, A', D]`, all float32 -> `[N, A, D]`.

    With a rotation, q and k are rotated first, except for given keys, which are rotated already. Where tokens see their
    ancestors alone, k and v are those of given segments, `[G, A', D]`. A bias reaches as far as the longest chain.
    """
    run = partial(_run, scaling=scaling, forest=forest, rotation=rotation, sees=sees, bias=bias)
    out: Tensor = _PackedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), run)
    return out


@dataclass(frozen=True, eq=False)
class Parts:
    """Where the keys and values lie that one more token of each row attends to, part by part.

    A part is `[tokens, A', D]`, contiguous. The last part of each row ends with room for the new token.
    """

    first: np.ndarray
    """`[B + 1]` the first part of each row, and the end of the last row's."""
    keys: np.ndarray
    """Addresses."""
    values: np.ndarray
    lengths: np.ndarray
    """Tokens of each part, with the new one."""
    most: int
    """Tokens of the row that has most."""


def attend_growing(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, parts: Parts, rotation: Rotation | None = None
) -> Tensor:
    """Q `[B, A, D]`, k and v `[B, A', D]` of one new token a row, all float32 -> `[B, A, D]`, without a gradient.

    Puts each k, rotated if a rotation is given, and each v behind the row's others.
    """
    kernels = load_kernels()
    assert kernels is not None
    function = kernels.growing_attention
    if function.argtypes is None:
        function.argtypes, function.restype = [_P, ctypes.c_float, *[_P] * 10], None
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    sides = np.array([q.shape[1], k.shape[1], q.shape[2], len(q), parts.most], dtype=np.int64)
    cosine, sine = (None, None) if rotation is None else (part.data_ptr() for part in rotation)
    arrays = (parts.first, parts.keys, parts.values, parts.lengths)
    tensors = [t.data_ptr() for t in (q, k, v, out)]
    function(sides.ctypes.data, scaling, cosine, sine, *(array.ctypes.data for array in arrays), *tensors)
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, run: Callable[..., None]) -> Tensor:
        # No scores: kept for every layer they would outgrow all else, so the backward pass computes them again.
        ctx.save_for_backward(q, k, v)
        ctx.run = run
        out = torch.empty_like(q)
        run(q, k, v, out=out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        q, k, v = ctx.saved_tensors
        # Keys and values collect gradients from many segments, so these start at zero; each query has one.
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        ctx.run(q, k, v, grad=grad.contiguous(), dq=dq, dk=dk, dv=dv)
        return dq, dk, dv, None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    forest: Forest,
    rotation: Rotation | None,
    sees: Sees,
    bias: DistanceBias | None,
    out: Tensor | None = None,
    grad: Tensor | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> None:
    """Call the kernel: forward if `out` is given, else backward. Pointers carry no types: `supports` checks them."""
    kernels = load_kernels()
    assert kernels is not None
    function = kernels.packed_attention
    if function.argtypes is None:
        function.argtypes, function.restype = _SIGNATURE, None
    segments = forest.segments
    longest = int(segments.lengths[segments.given :].max())
    table = None if bias is None else bias.readable
    columns = (0, 0) if bias is None else (bias.readable.shape[1], bias.zero)
    counts = (segments.given_tokens, len(forest.trees) - 1, forest.most_before, longest)
    # Sizes in the order in which the C function reads them; int64, as its `const int64_t *`.
    sides = np.array([q.shape[1], k.shape[1], q.shape[2], *counts, _SEES[sees], *columns], dtype=np.int64)
    arrays = (sides, segments.starts, segments.lengths, segments.parents, forest.order, forest.trees)
    cosine, sine = (None, None) if rotation is None else (part.data_ptr() for part in rotation)
    # `arrays` stays alive until the call returns, so the addresses stay valid.
    first, *others = (array.ctypes.data for array in arrays)
    tensors = [None if t is None else t.data_ptr() for t in (table, q, k, v, out, grad, dq, dk, dv)]
    function(first, scaling, cosine, sine, tensors[0], *others, *tensors[1:])
