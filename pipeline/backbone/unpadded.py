"""Encoder-decoder rows one after another in one row, without padding, for families whose positions are distances (T5).

An encoder looks both ways, so a prompt runs with each of its rows. But no product with weights sees padding: each token
attends to its own row, and a decoder's to the row that it answers. Families that give a token the number of its place
would count on through the rows behind the first, and so are padded.

Shapes: B rows, N tokens of all rows, E tokens of all encoder rows. A heads, D head size, H hidden. R rows of a group, Q
its longest queries, K its longest keys.
"""

from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from pipeline.backbone.native import attention as native_attention
from pipeline.backbone.native.attention import DistanceBias, Sees
from pipeline.backbone.segments import Segments, make_segments
from pipeline.backbone.transfer import to_device

# By class name: what they compute takes a whole model's configuration to try. `proof` compares the whole model.
_ATTENTIONS = ("T5Attention", "MT5Attention", "UMT5Attention")


@dataclass(frozen=True, eq=False)
class _Group:
    """Rows of like length, padded by each row's last token, for attention by PyTorch's operators."""

    queries: Tensor
    """`[R, Q]` indices of tokens."""
    keys: Tensor
    """`[R, K]`: the same among all tokens, those that are given included."""
    visible: Tensor
    """`[R, 1, Q, K]`: whether a query sees a key."""


@dataclass(frozen=True, eq=False)
class Attended:
    """The keys that the tokens of each row see."""

    segments: Segments
    sees: Sees
    _groups: dict[torch.device, tuple[list[_Group], Tensor]] = field(default_factory=dict)

    @cached_property
    def forest(self) -> native_attention.Forest:
        return native_attention.make_forest(self.segments)

    def groups(self, device: torch.device) -> tuple[list[_Group], Tensor]:
        """Rows in groups of like length, and `[N]` the place of each token in the groups' outputs."""
        if device not in self._groups:  # once for all layers
            self._groups[device] = self._in_groups(device)
        return self._groups[device]

    def _in_groups(self, device: torch.device) -> tuple[list[_Group], Tensor]:
        places, chains = self.segments.places(), self.segments.chains()
        own = {row: places[row] for row in self.segments.run}
        seen = {row: chains[row][:-1] if self.sees == "ancestors" else [row] for row in own}
        keys = {row: np.concatenate([places[s] for s in seen[row]]) + self.segments.given_tokens for row in own}
        # Padded by powers of two, a group wastes less than half of either side.
        alike = {row: tuple((len(side[row]) - 1).bit_length() for side in (own, keys)) for row in own}
        groups, order = [], []
        for kind in sorted(set(alike.values())):
            rows = [row for row in own if alike[row] == kind]
            queries, of_keys = _padded([own[row] for row in rows]), _padded([keys[row] for row in rows])
            lengths = np.array([len(keys[row]) for row in rows])
            visible = np.arange(of_keys.shape[1]) < lengths[:, None, None, None]
            if self.sees == "causal":
                visible = visible & (np.arange(of_keys.shape[1]) <= np.arange(queries.shape[1])[:, None])
            visible = np.broadcast_to(visible, (len(rows), 1, queries.shape[1], of_keys.shape[1])).copy()
            groups.append(_Group(*(to_device(part, device) for part in (queries, of_keys, visible))))
            order.append(queries.ravel())
        # A row's padding repeats its last token, and so do the outputs: any of them is that token's.
        _, first = np.unique(np.concatenate(order), return_index=True)
        return groups, to_device(first, device)


def encoder_rows(lengths: np.ndarray) -> Attended:
    """Rows of an encoder: a token sees all of its row."""
    return Attended(make_segments(lengths.tolist(), [None] * len(lengths)), "whole")


def decoder_rows(lengths: np.ndarray) -> Attended:
    """Rows of a decoder: a token sees its row up to itself."""
    return Attended(make_segments(lengths.tolist(), [None] * len(lengths)), "causal")


def across(encoder: Attended, decoder: Attended, row_of: np.ndarray) -> Attended:
    """A decoder's rows look at encoder rows, each at the one whose number stands in `row_of`."""
    lengths = [*encoder.segments.lengths, *decoder.segments.lengths]
    given = len(encoder.segments.lengths)
    return Attended(make_segments(lengths, [*[None] * given, *map(int, row_of)], given), "ancestors")


@dataclass(frozen=True, eq=False)
class UnpaddedRun:
    """One forward pass of a stack, as the attention of its layers sees it."""

    own: Attended
    across: Attended | None
    """What a decoder sees of its encoder's rows."""
    kernels: bool
    _biases: dict[int, DistanceBias] = field(default_factory=dict)

    def bias(self, attention: Any) -> DistanceBias | None:
        """The bias of an attention that has one of its own."""
        if not attention.has_relative_attention_bias:
            return None
        if id(attention) not in self._biases:
            longest = int(self.own.segments.lengths.max())
            behind = attention.compute_bias(1, longest, past_seen_tokens=longest - 1)  # seen from the last token
            before = attention.compute_bias(1, longest)  # seen from the first
            table = torch.cat([behind, before[..., 1:]], -1)[0, :, 0].float()
            self._biases[id(attention)] = DistanceBias(table)
        return self._biases[id(attention)]


_current: ContextVar[UnpaddedRun | None] = ContextVar("unpadded run", default=None)


def run_unpadded(stack: Any, run: UnpaddedRun, **inputs: Tensor) -> Tensor:
    """Last hidden states `[1, N, H]` of a stack whose inputs `[1, N, ...]` are rows one after another."""
    token = _current.set(run)
    try:
        hidden: Tensor = stack(**inputs, **({"use_cache": False} if run.across else {})).last_hidden_state
    finally:
        _current.reset(token)
    return hidden


class RelativeAttention(nn.Module):
    """transformers' attention of the T5 kind, which in an unpadded run keeps to each row."""

    def __init__(self, usual: nn.Module) -> None:
        super().__init__()
        self._modules = usual._modules  # one shared dictionary: a layer that is replaced later is replaced in both
        self._usual: list[Any] = [usual]  # in a list, which hides it from PyTorch: its parameters would be listed twice

    def forward(self, hidden_states: Tensor, **rest: Any) -> tuple[Any, ...]:
        """`[1, N, H]` -> `[1, N, H]`, the bias for the layers behind it where the family shares one, and no weights."""
        run, usual = _current.get(), self._usual[0]
        if run is None:
            answer: tuple[Any, ...] = usual(hidden_states, **rest)
            return answer
        encoded = rest.get("key_value_states", rest.get("encoder_hidden_states"))
        # Views, made once: the layers quantise what they share once.
        x = hidden_states.flatten(0, 1)
        source = x if encoded is None else encoded.flatten(0, 1)
        q, k, v = (
            project(of).unflatten(-1, (-1, usual.key_value_proj_dim))
            for project, of in ((usual.q, x), (usual.k, source), (usual.v, source))
        )
        bias = None if encoded is not None else rest.get("position_bias") or run.bias(usual)
        seen = run.own if encoded is None else run.across
        assert seen is not None
        out = attend(q, k, v, seen, bias, run.kernels)
        y = usual.o(out.flatten(1))[None]
        return (y, None) if type(usual).__name__ == "UMT5Attention" else (y, bias, None)


def relative_attention(usual: nn.Module) -> RelativeAttention | None:
    """What stands in for an attention; None for one that is not of that kind."""
    return RelativeAttention(usual) if type(usual).__name__ in _ATTENTIONS else None


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Attended, bias: DistanceBias | None, kernels: bool) -> Tensor:
    """Q `[N, A, D]`, k and v `[N, A, D]` or, across, `[E, A, D]` -> `[N, A, D]`; dot products are not scaled."""
    # Fine-tuning trains the bias, too, and the kernel gives it no gradient.
    learns = bias is not None and bias.table.requires_grad
    if kernels and not learns and native_attention.supports(q, k, v):
        return native_attention.attend(q, k, v, 1.0, seen.forest, sees=seen.sees, bias=bias)
    remember = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or learns)
    groups, order = seen.groups(q.device)
    # Scores are computed again in the backward pass: kept for every layer, they would outgrow all else.
    outputs = [
        checkpoint(_attend_group, q, k, v, group, bias, use_reentrant=False)
        if remember
        else _attend_group(q, k, v, group, bias)
        for group in groups
    ]
    return torch.cat(outputs)[order]


def _attend_group(q: Tensor, k: Tensor, v: Tensor, group: _Group, bias: DistanceBias | None) -> Tensor:
    """Outputs `[R * Q, A, D]` of rows that are padded to the longest of their group."""
    queries, keys = group.queries, group.keys
    mask = torch.zeros(group.visible.shape, dtype=q.dtype, device=q.device).masked_fill(~group.visible, -torch.inf)
    if bias is not None:
        places = [torch.arange(side.shape[1], device=q.device) for side in (queries, keys)]
        mask = mask + bias.table[:, places[1] - places[0][:, None] + bias.zero].to(q.dtype)
    query, key, value = (x[index].transpose(1, 2) for x, index in ((q, queries), (k, keys), (v, keys)))  # [R, A, ·, D]
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
    return out.transpose(1, 2).flatten(0, 1)


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    """`[rows, longest]`; a row's padding repeats its last entry, so that a NaN stays among its own."""
    longest = max(map(len, rows))
    return np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in rows])
