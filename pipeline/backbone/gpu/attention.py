"""Attention of packed segments as one fused operation on GPUs; see `attention_kernels` for how it works.

Shapes: N tokens that run, G tokens that are given. A heads, A' heads of keys, D head size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone import gpu
from pipeline.backbone.segments import Segments
from pipeline.backbone.transfer import to_device

_TILE = 32
"""Tokens of a block of queries or keys: rows of text have about as many."""
_WIDEST = 256
"""Head sizes above this do not fit a streaming multiprocessor's memory."""
_TYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Tables:
    """What the kernels read of a packed row's segments, int32 on the device; see `attention_kernels`."""

    given: int
    """Tokens that do not run."""
    query_blocks: Tensor
    """`[2, blocks]`: segment and first token of each block of tokens that run."""
    key_blocks: Tensor
    """`[2, blocks]`: the same of all tokens."""
    segments: Tensor
    """`[3, S]`: starts, sizes and parents."""
    first_below: Tensor
    """`[S + 1]`"""
    below: Tensor


def make_tables(segments: Segments, device: torch.device) -> Tables:
    """One copy to the device, whatever the number of segments."""
    count = len(segments.lengths)
    below: list[list[int]] = [[] for _ in range(count)]
    for segment, chain in enumerate(segments.chains()):
        if segment >= segments.given:
            for above in chain:
                below[above].append(segment)
    parts = [
        _blocks(segments.lengths, segments.given),
        _blocks(segments.lengths, 0),
        np.stack([segments.starts + segments.given_tokens, segments.lengths, segments.parents]),
        np.cumsum([0, *map(len, below)]),
        np.array([segment for listed in below for segment in listed]),
    ]
    flat = to_device(np.concatenate([part.ravel() for part in parts]).astype(np.int32), device)
    tensors = [piece.view(part.shape) for piece, part in zip(flat.split([p.size for p in parts]), parts, strict=True)]
    return Tables(segments.given_tokens, *tensors)


def _blocks(lengths: np.ndarray, first: int) -> np.ndarray:
    """`[2, blocks]` of the segments from `first` on, the longest segments first, which take the most time."""
    order = first + np.argsort(-lengths[first:], kind="stable")
    listed = [(segment, at) for segment in order.tolist() for at in range(0, int(lengths[segment]), _TILE)]
    return np.array(listed).reshape(-1, 2).T


def supports(x: Tensor, head_size: int) -> bool:
    """Whether these kernels can be used for heads of this size, in x's type and on its device."""
    return gpu.runs_on(x.device) and x.dtype in _TYPES and head_size <= _WIDEST


def attend(q: Tensor, k: Tensor, v: Tensor, scaling: float, tables: Tables) -> Tensor:
    """Q `[N, A, D]`, k and v `[G + N, A', D]`, all of one type -> `[N, A, D]`; sums are in float32."""
    out: Tensor = _PackedAttention.apply(q.contiguous(), k.contiguous(), v.contiguous(), scaling, tables)
    return out


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scaling: float, tables: Tables) -> Tensor:
        from pipeline.backbone.gpu import attention_kernels

        out, log_sums = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.scaling, ctx.tables = scaling, tables
        ctx.save_for_backward(q, k, v, out, log_sums)
        grid = (tables.query_blocks.shape[1], q.shape[1])
        attention_kernels.forward[grid](
            q, k, v, out, log_sums, *tables.query_blocks, *tables.segments, *_sides(q, k, scaling, tables), **_tiles(q)
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from pipeline.backbone.gpu import attention_kernels

        q, k, v, out, log_sums = ctx.saved_tensors
        tables, grad = ctx.tables, grads[0].contiguous()
        shares = torch.empty_like(log_sums)  # the first kernel writes them, and the second one reads them
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        given = (q, k, v, grad, log_sums, shares)
        sides, tiles = _sides(q, k, ctx.scaling, tables), _tiles(q)
        queries = (tables.query_blocks.shape[1], q.shape[1])
        attention_kernels.backward_queries[queries](
            *given, out, dq, *tables.query_blocks, *tables.segments, *sides, **tiles
        )
        starts, sizes, _ = tables.segments
        attention_kernels.backward_keys[(tables.key_blocks.shape[1], k.shape[1])](
            *given, dk, dv, *tables.key_blocks, starts, sizes, tables.first_below, tables.below, *sides, **tiles
        )
        return dq, dk, dv, None, None


def _sides(q: Tensor, k: Tensor, scaling: float, tables: Tables) -> tuple[int, float, int, int]:
    return tables.given, scaling, q.shape[1], k.shape[1]


def _tiles(q: Tensor) -> dict[str, int]:
    size = q.shape[-1]
    return {"SIZE": size, "WIDE": max(16, _power_of_two(size)), "M": _TILE, "N": _TILE}


def rotate(q: Tensor, k: Tensor, rotation: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Q `[N, A, D]` and k `[N, A', D]` turned by cosine and sine `[N, D / 2]`, float32, in one launch."""
    turned: tuple[Tensor, Tensor] = _Rotated.apply(q.contiguous(), k.contiguous(), *rotation)
    return turned


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, Tensor]:
        ctx.rotation = cosine, sine
        return _rotated(q, k, cosine, sine, 1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq, dk = (grad.contiguous() for grad in grads)
        cosine, sine = ctx.rotation
        return *_rotated(dq, dk, cosine, sine, -1.0), None, None


def _rotated(q: Tensor, k: Tensor, cosine: Tensor, sine: Tensor, direction: float) -> tuple[Tensor, Tensor]:
    from pipeline.backbone.gpu import attention_kernels

    turned, half = (torch.empty_like(q), torch.empty_like(k)), q.shape[-1] // 2
    tiles = {"HALF": half, "WIDE": _power_of_two(half), "HEADS": _power_of_two(max(q.shape[1], k.shape[1]))}
    attention_kernels.rotate[(len(q),)](q, k, *turned, cosine, sine, q.shape[1], k.shape[1], direction, **tiles)
    return turned


def _power_of_two(size: int) -> int:
    """The least one that is not below `size`."""
    return 1 << (size - 1).bit_length()
