"""Starting points of a soft prompt (Lester et al. 2021, section 3.2 and appendix; `examples`: Context Tuning, 2025)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.host import Backbone
from pipeline.corpus.token_set import TokenSet
from pipeline.tuning.trials import Trial, random_numbers

COMMON_TOKENS = 5_000
"""Vocabularies list frequent tokens first; the paper samples from the 5,000 most common."""
SIZED_BY = 500
"""Tokens whose embeddings tell how large those of a model are."""


def initial_prompt(
    trial: Trial,
    backbone: Backbone,
    tokenizer: Any,
    labels: Sequence[str] | None,
    warm_starts: Mapping[str, np.ndarray],
    train: TokenSet | None = None,
    draw: int = 0,
) -> Tensor:
    """A trial's first prompt `[P, H]`, float32. Every rank makes the same one, in the same order.

    `random` is uniform with the RMS of the model's own embeddings. The paper's ±0.5 fits the T5 that it tunes;
    embeddings of other models are a tenth of that, or three times as large.
    `train` is needed for `init: examples`. `draw` numbers the starts that a trial may choose from.
    """
    prompt, generator = trial.settings.prompt, trial.generator("init", draw)
    if prompt.init == "random":
        values = generator.uniform(-1.0, 1.0, (prompt.length, backbone.hidden_size))
        largest = math.sqrt(3.0) * embeddings_rms(backbone, tokenizer)  # that of a uniform draw with this RMS
        return torch.as_tensor(values * largest, dtype=torch.float32, device=backbone.device)
    if prompt.init == "bank":
        return torch.as_tensor(fit_length(warm_starts[trial.name], prompt.length), device=backbone.device)
    if prompt.init == "text":
        assert prompt.text is not None
        ids = tokenizer(prompt.text, add_special_tokens=False).input_ids
        if len(ids) <= prompt.length:
            return backbone.embed(torch.as_tensor(np.resize(ids, prompt.length)))
        # No word of the user's own is left out: neighbours share a vector.
        return torch.stack(
            [words.mean(0) for words in backbone.embed(torch.as_tensor(ids)).tensor_split(prompt.length)]
        )
    if prompt.init == "examples":
        assert train is not None
        tokens = np.concatenate([solved_row(train, row) for row in example_rows(trial, train, draw)])
        # Cut at its beginning: the example next to the input is whole.
        return backbone.embed(torch.as_tensor(np.resize(tokens[-prompt.length :], prompt.length)))
    sampled = sampled_tokens(generator, tokenizer, backbone.embedding_rows, prompt.length)
    if prompt.init == "sampled_vocab":
        return backbone.embed(torch.as_tensor(sampled))
    known = [ids for label in labels or () if (ids := tokenizer(label, add_special_tokens=False).input_ids)]
    rows = [backbone.embed(torch.as_tensor(ids)).mean(0, keepdim=True) for ids in known[: prompt.length]]  # [1, H] each
    rest = backbone.embed(torch.as_tensor(sampled[len(rows) :])) if len(rows) < prompt.length else None
    return torch.cat([*rows, *([] if rest is None else [rest])])


def example_rows(trial: Trial, train: TokenSet, draw: int) -> np.ndarray:
    """Numbers `[n]` of the solved rows that a prompt starts from: as many as its length has room for, at least one."""
    length = trial.settings.prompt.length
    drawn = trial.generator("init", draw).choice(len(train), min(length, len(train)), replace=False)
    # Every step asks for this: lengths come from the offsets, without the rows' tokens.
    shown = train.take(drawn)
    lengths = shown.input_lengths + shown.target_lengths
    return drawn[: 1 + int(np.searchsorted(np.cumsum(lengths), length))]


def rows_started_from(trial: Trial, train: TokenSet) -> np.ndarray:
    """Numbers of the train rows, in rising order, that a trial's starts show solved, unless those are all there are.

    The trial does not learn from them: it would find their targets in its own prompt.
    """
    prompt = trial.settings.prompt
    if prompt.init != "examples":
        return np.empty(0, dtype=np.int64)
    shown = np.unique(np.concatenate([example_rows(trial, train, draw) for draw in range(prompt.draws)]))
    return shown if len(shown) < len(train) else shown[:0]


def solved_row(train: TokenSet, row: int) -> np.ndarray:
    """Token ids `[T]` of a row's input and target."""
    return np.concatenate([train.input_ids(row), train.target_ids(row)])


def fit_length(prompt: np.ndarray, length: int) -> np.ndarray:
    """A prompt `[Q, H]` cut, or repeated from its start, to `[length, H]`."""
    return prompt[np.arange(length) % len(prompt)].astype(np.float32)


def mean_prompt(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of prompts `[Q_i, H]`, each repeated from its start to the length of the longest: `[Q, H]`."""
    longest = max(map(len, prompts))
    return np.stack([fit_length(prompt, longest) for prompt in prompts]).mean(axis=0)


def embeddings_rms(backbone: Backbone, tokenizer: Any) -> float:
    """RMS of the embeddings' entries as the model's first layer sees them, over some common tokens.

    Every rank must call this, and gets the same.
    """
    sampled = sampled_tokens(random_numbers("embeddings_rms"), tokenizer, backbone.embedding_rows, SIZED_BY)
    return float(backbone.embed(torch.as_tensor(sampled)).pow(2).mean().sqrt())


def sampled_tokens(generator: np.random.Generator, tokenizer: Any, rows: int, length: int) -> np.ndarray:
    """Ids of `length` common tokens, different ones as far as there are enough; `rows` of them have an embedding."""
    special = set(tokenizer.all_special_ids)
    common = [token for token in range(min(len(tokenizer), rows, COMMON_TOKENS)) if token not in special]
    return generator.choice(common, size=length, replace=length > len(common))
