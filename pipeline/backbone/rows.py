"""Rows to run behind soft prompts, and how rows of different lengths are put side by side.

Shapes: B rows, T tokens, P prompt tokens, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TokenRows = Sequence[np.ndarray]
"""One array of token ids a row, of any lengths."""


@dataclass(frozen=True)
class Rows:
    """Rows to run: for each, the soft prompt that stands before it and its input tokens."""

    prompts: Sequence[Tensor]
    """Soft prompts `[P_s, H]`; lengths may differ."""
    prompt_of_row: Sequence[int]
    inputs: TokenRows


def as_indices(values: np.ndarray, like: Tensor) -> Tensor:
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
    """`[T_b, H]` each -> `[B, T, H]`. Padding repeats a sequence's own last embedding.

    So that a prompt gone NaN stays in its own rows.
    """
    longest = max(len(sequence) for sequence in sequences)
    at = [torch.arange(longest, device=sequence.device).clamp(max=len(sequence) - 1) for sequence in sequences]
    return torch.stack([sequence[index] for sequence, index in zip(sequences, at, strict=True)])
