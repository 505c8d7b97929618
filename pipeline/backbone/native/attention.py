"""Attention of packed segments in one kernel, which neither gathers nor pads, and keeps no scores.

Shapes: N tokens that run, G tokens that are given. A heads, A' heads of keys, D head size.
"""

import ctypes
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.native.build import load_kernels
from pipeline.backbone.native.rows import supports
from pipeline.backbone.segments import Segments

__all__ = ["Forest", "attend", "make_forest", "supports"]

_P = ctypes.c_void_p
_SIGNATURE = [_P, ctypes.c_float, *[_P] * 15]


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


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, forest: Forest, rotation: Rotation | None = None) -> Tensor:
    """Q `[N, A, D]`, k and v `[G + N, A', D]`, all float32 -> `[N, A, D]`.

    With a rotation, q and k are rotated first, except for given keys, which are rotated already.
    """
    out: Tensor = _PackedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), scaling, forest, rotation)
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, forest: Forest, rotation: Rotation | None
    ) -> Tensor:
        # No scores: kept for every layer they would outgrow all else, so the backward pass computes them again.
        ctx.save_for_backward(q, k, v)
        ctx.run = partial(_run, scaling=scaling, forest=forest, rotation=rotation)
        out = torch.empty_like(q)
        ctx.run(q, k, v, out=out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        (grad,) = grads
        q, k, v = ctx.saved_tensors
        # Keys and values collect gradients from many segments, so these start at zero; each query has one.
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        ctx.run(q, k, v, grad=grad.contiguous(), dq=dq, dk=dk, dv=dv)
        return dq, dk, dv, None, None, None


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float,
    forest: Forest,
    rotation: Rotation | None,
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
    # Sizes in the order in which the C function reads them; int64, as its `const int64_t *`.
    sides = np.array(
        [q.shape[1], k.shape[1], q.shape[2], segments.given_tokens, len(forest.trees) - 1, forest.most_before, longest],
        dtype=np.int64,
    )
    arrays = (sides, segments.starts, segments.lengths, segments.parents, forest.order, forest.trees)
    cosine, sine = (None, None) if rotation is None else (part.data_ptr() for part in rotation)
    # `arrays` stays alive until the call returns, so the addresses stay valid.
    first, *others = (array.ctypes.data for array in arrays)
    tensors = (q, k, v, out, grad, dq, dk, dv)
    function(first, scaling, cosine, sine, *others, *(None if t is None else t.data_ptr() for t in tensors))
