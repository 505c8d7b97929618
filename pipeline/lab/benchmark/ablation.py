"""What each part of a fast step gains: the same loss, computed without that part.

Each function stands in for `prompted.target_nll` of a decoder-only model: `[B]` float32, in nats.
"""

from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn import functional

from pipeline.backbone import decoder_only
from pipeline.backbone.output import summed, token_nll
from pipeline.backbone.packed import Layout
from pipeline.backbone.rows import Rows, TokenRows, as_indices


def prompt_per_row(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """Every row runs its own copy of its prompt, as PEFT does."""
    own: Any = [rows.prompts[s] for s in rows.prompt_of_row]
    return decoder_only.target_nll(model, Rows(own, range(len(own)), rows.inputs), targets)


def beginning_per_row(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """Every row runs what all rows of its task begin with."""
    return decoder_only.target_nll(model, replace(rows, shared=()), targets)


def padded_rows(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """Every row is padded to the longest one of the batch."""
    texts = _texts(rows, targets)
    longest = max(map(len, texts))
    padded = [np.pad(text, (0, longest - len(text))) for text in texts]
    hidden, layout = decoder_only.run_behind_prompts(model, rows.prompts, padded, rows.prompt_of_row)
    places, tokens = _predicted(rows, targets, layout)
    nll = token_nll(model, hidden[as_indices(places, hidden)], as_indices(tokens, hidden))
    return _by_row(nll, targets)


def all_logits(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """Logits are computed at every position of every row."""
    hidden, layout = decoder_only.run_behind_prompts(model, rows.prompts, _texts(rows, targets), rows.prompt_of_row)
    places, tokens = _predicted(rows, targets, layout)
    first = int(layout.starts[len(rows.prompts)])
    logits = model.get_output_embeddings()(hidden[first:])[as_indices(places - first, hidden)].float()
    return _by_row(functional.cross_entropy(logits, as_indices(tokens, hidden), reduction="none"), targets)


def _texts(rows: Rows, targets: TokenRows) -> list[np.ndarray]:
    return [np.concatenate([x, y[:-1]]) for x, y in zip(rows.inputs, targets, strict=True)]


def _predicted(rows: Rows, targets: TokenRows, layout: Layout) -> tuple[np.ndarray, np.ndarray]:
    """The index where each target token is predicted, and the token."""
    starts = layout.starts[len(rows.prompts) :]
    places = [start + len(x) - 1 + np.arange(len(y)) for start, x, y in zip(starts, rows.inputs, targets, strict=True)]
    return np.concatenate(places), np.concatenate(targets)


def _by_row(nll: Tensor, targets: TokenRows) -> Tensor:
    of_row = np.repeat(np.arange(len(targets)), [len(y) for y in targets])
    return summed(nll, of_row, len(targets))
