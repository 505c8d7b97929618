"""Many token segments run through a decoder-only model in one row, without padding.

A segment follows its parent: an input follows a soft prompt, a label follows an input. It attends
to its ancestors and, causally, to itself; so a prompt shared by many rows runs once and its
gradient is the sum over them (exact; known as shared-prefix forward, arXiv 2506.05433). Products
with weights see every token once; only attention gathers what each segment looks at. A prompt whose
keys and values are given does not run at all.

Shapes: N tokens that run, G tokens that are given, R segments of one depth, T their longest, K their
longest view, A heads, D head size.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.backbone.rows import PromptState

_NAME = "prompt_bank_packed"


@dataclass(frozen=True)
class _Level:
    """The segments of one depth, padded to one another for attention alone."""

    query: Tensor
    """`[R, T]` places of tokens; padding repeats the segment's last one, whose numbers are its own."""
    key: Tensor
    """`[R, K]` places among the tokens that are given and, after them, those that run."""
    mask: Tensor
    """`[R, 1, T, K]`: what a token may look at."""
    used: Tensor
    """Places in `[R * T]` that are no padding."""


@dataclass(frozen=True)
class Layout:
    """Where the tokens of each segment lie in the packed row, and what they look at."""

    starts: np.ndarray
    """First place of each segment; those that are given lie at -G to -1."""
    positions: Tensor
    """`[1, N]`: of each token behind its ancestors."""
    levels: tuple[_Level, ...]
    order: Tensor
    """`[N]`: place of each token in the levels' outputs, one after the other."""


def make_layout(lengths: Sequence[int], parents: Sequence[int | None], device: torch.device, given: int = 0) -> Layout:
    """Lay out segments of `lengths` tokens (each at least 1); a parent comes before its children.

    The first `given` segments do not run: they are only looked at.
    """
    given_tokens = sum(lengths[:given])
    starts = np.concatenate([[0], np.cumsum(lengths)])[:-1] - given_tokens
    run = range(given, len(lengths))
    chains = [_chain(segment, parents) for segment in range(len(lengths))]
    places = [np.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    before = [sum(lengths[s] for s in chain[:-1]) for chain in chains]
    positions = np.concatenate([before[s] + np.arange(lengths[s]) for s in run])
    levels, seen = [], []
    for depth in sorted({len(chains[s]) for s in run}):
        members = [s for s in run if len(chains[s]) == depth]
        views = [given_tokens + np.concatenate([places[s] for s in chains[member]]) for member in members]
        levels.append(_level([places[m] for m in members], views, [before[m] for m in members], device))
        seen.append(np.concatenate([places[m] for m in members]))
    order = np.argsort(np.concatenate(seen))
    return Layout(starts, _tensor(positions[None], device), tuple(levels), _tensor(order, device))


def _chain(segment: int, parents: Sequence[int | None]) -> list[int]:
    chain = [segment]
    while (parent := parents[chain[0]]) is not None:
        assert parent < chain[0]
        chain.insert(0, parent)
    return chain


def _level(own: list[np.ndarray], views: list[np.ndarray], before: list[int], device: torch.device) -> _Level:
    longest, widest = max(map(len, own)), max(map(len, views))
    query = np.stack([np.pad(row, (0, longest - len(row)), mode="edge") for row in own])
    key = np.stack([np.pad(row, (0, widest - len(row)), mode="edge") for row in views])
    # A token sees its ancestors and its own segment up to itself; padding sees what the last token sees.
    own_length = np.array([len(row) for row in own])[:, None]
    sees = np.array(before)[:, None] + np.minimum(np.arange(longest), own_length - 1) + 1  # [R, T]
    mask = np.arange(widest) < sees[:, :, None]
    used = np.flatnonzero(np.arange(longest) < own_length)
    allowed = torch.as_tensor(mask[:, None], device=device)
    return _Level(_tensor(query, device), _tensor(key, device), allowed, _tensor(used, device))


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.as_tensor(values, dtype=torch.long, device=device)


def run_packed(model: Any, embeddings: Tensor, layout: Layout, given: Sequence[PromptState] = ()) -> Tensor:
    """Last hidden states `[N, H]` of packed input embeddings `[N, H]`, behind the layout's given segments."""
    with _packed_attention(model):
        output = model.base_model(
            inputs_embeds=embeddings[None], position_ids=layout.positions, use_cache=False, layout=layout, given=given
        )
    return output.last_hidden_state[0]


@contextmanager
def _packed_attention(model: Any) -> Iterator[None]:
    usual = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = usual


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    layout: Layout,
    given: Sequence[PromptState],
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: q `[1, A, N, D]`, k and v `[1, A', N, D]` -> `[1, N, A, D]`."""
    assert attention_mask is None and dropout == 0.0
    groups = query.shape[1] // key.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, A, D]
    if given:  # [G + N, A', D]
        k = torch.cat([*(state.keys[module.layer_idx] for state in given), k])
        v = torch.cat([*(state.values[module.layer_idx] for state in given), v])
    outputs = []
    for level in layout.levels:
        out = functional.scaled_dot_product_attention(
            q[level.query].transpose(1, 2),  # [R, A, T, D]
            k[level.key].transpose(1, 2).repeat_interleave(groups, dim=1),
            v[level.key].transpose(1, 2).repeat_interleave(groups, dim=1),
            attn_mask=level.mask,
            scale=scaling,
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1)[level.used])
    return torch.cat(outputs)[layout.order][None], None


ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
