"""Rows to run behind soft prompts, and ways to pad rows of different lengths.

Shapes: B rows, T tokens, P prompt tokens, H hidden, A' heads of keys, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.transfer import to_device

TokenRows = Sequence[np.ndarray]
"""One array of token ids a row, of any lengths."""
NO_TOKENS = np.empty(0, dtype=np.int64)
_FEWEST_SHARED = 8
"""Tokens below which a beginning is not worth a segment of its own, such as a tokenizer's bos alone."""


@dataclass(frozen=True, eq=False)
class PromptState:
    """Keys and values of a soft prompt that ran through a decoder-only model: all that tokens behind it attend to."""

    keys: Sequence[Tensor]
    """`[P, A', D]` of each layer, rotated to the prompt's positions where the model rotates."""
    values: Sequence[Tensor]
    """`[P, A', D]` of each layer."""

    def __len__(self) -> int:
        """P"""
        return len(self.keys[0])

    @property
    def device(self) -> torch.device:
        return self.keys[0].device

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (*self.keys, *self.values))


@dataclass(frozen=True)
class Rows:
    """Rows to run: for each, the soft prompt that stands before it and its input tokens."""

    prompts: Sequence[Tensor] | Sequence[PromptState]
    """Soft prompts `[P_s, H]`, or the states of prompts that ran before. Lengths may differ; 0 means no prompt."""
    prompt_of_row: Sequence[int]
    inputs: TokenRows
    shared: Sequence[int] = ()
    """Tokens that all inputs behind each prompt begin with alike, and that run once; none: they run with each row. At
    least one token of an input is its own."""


def common_beginnings(inputs: TokenRows, group_of_row: Sequence[int], groups: int) -> list[int]:
    """For each group of rows, the tokens that all its inputs begin with alike; 0 where that is not worth a segment.

    A template's fixed beginning is found this way, whatever the tokenizer makes of where it ends.
    """
    first: dict[int, np.ndarray] = {}
    shared = [0] * groups
    for ids, group in zip(inputs, group_of_row, strict=True):
        if group not in first:
            first[group], shared[group] = ids, max(0, len(ids) - 1)
            continue
        most = max(0, min(shared[group], len(ids) - 1))
        differs = first[group][:most] != ids[:most]
        shared[group] = int(differs.argmax()) if differs.any() else most
    return [tokens if tokens >= _FEWEST_SHARED else 0 for tokens in shared]


def as_indices(values: np.ndarray, like: Tensor | PromptState) -> Tensor:
    """Integers as a tensor on the device of another one."""
    return to_device(values, like.device, torch.long)


def pad_ids(rows: TokenRows) -> np.ndarray:
    """Token ids `[B, T]`, right-padded with 0."""
    out = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def mask_of(lengths: np.ndarray, width: int) -> np.ndarray:
    """`[B, width]`: 1 for tokens, 0 for the padding behind them."""
    return (np.arange(width) < lengths[:, None]).astype(np.int64)


def pad_embeddings(sequences: Sequence[Tensor]) -> Tensor:
    """`[T_b, ...]` each -> `[B, T, ...]`. Padding repeats a sequence's own last embedding; an empty one gets zeros.

    With its own embedding as padding, a prompt that went NaN stays in its own rows.
    """
    longest = max(len(sequence) for sequence in sequences)

    def padded(sequence: Tensor) -> Tensor:
        if not len(sequence):
            return sequence.new_zeros(longest, *sequence.shape[1:])
        return sequence[torch.arange(longest, device=sequence.device).clamp(max=len(sequence) - 1)]

    return torch.stack([padded(sequence) for sequence in sequences])
