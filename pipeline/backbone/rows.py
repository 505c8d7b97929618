"""Rows to run behind soft prompts, and how rows of different lengths are put side by side.

Shapes: B rows, T tokens, P prompt tokens, H hidden, L layers, A' heads of keys, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TokenRows = Sequence[np.ndarray]
"""One array of token ids a row, of any lengths."""


@dataclass(frozen=True, eq=False)
class PromptState:
    """A soft prompt after it ran through a decoder-only model: all that the tokens behind it look at."""

    keys: Tensor
    """`[L, P, A', D]`, rotated to the prompt's positions where the model rotates."""
    values: Tensor
    """`[L, P, A', D]`"""

    def __len__(self) -> int:
        """P"""
        return self.keys.shape[1]

    @property
    def device(self) -> torch.device:
        return self.keys.device

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


@dataclass(frozen=True)
class Rows:
    """Rows to run: for each, the soft prompt that stands before it and its input tokens."""

    prompts: Sequence[Tensor] | Sequence[PromptState]
    """Soft prompts `[P_s, H]`, or what they left when they ran before; lengths may differ, and be 0: no prompt."""
    prompt_of_row: Sequence[int]
    inputs: TokenRows


def as_indices(values: np.ndarray, like: Tensor | PromptState) -> Tensor:
    """Whole numbers as a tensor beside another one."""
    return torch.as_tensor(values, dtype=torch.long, device=like.device)


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
    """`[T_b, ...]` each -> `[B, T, ...]`. Padding repeats a sequence's own last embedding; an empty one's is zeros.

    So that a prompt gone NaN stays in its own rows.
    """
    longest = max(len(sequence) for sequence in sequences)
    return torch.stack([_padded(sequence, longest) for sequence in sequences])


def _padded(sequence: Tensor, longest: int) -> Tensor:
    if not len(sequence):
        return sequence.new_zeros(longest, *sequence.shape[1:])
    return sequence[torch.arange(longest, device=sequence.device).clamp(max=len(sequence) - 1)]
