"""Starting points of a soft prompt (Lester et al. 2021, section 3.2 and appendix)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.host import Backbone
from pipeline.tuning.trials import Trial

COMMON_TOKENS = 5_000
"""Vocabularies list frequent tokens first; the paper samples from the 5,000 most common."""


def initial_prompt(
    trial: Trial,
    backbone: Backbone,
    tokenizer: Any,
    labels: Sequence[str] | None,
    warm_starts: Mapping[str, np.ndarray],
) -> Tensor:
    """A trial's first prompt `[P, H]`, float32. Every rank makes the same one, in the same order."""
    prompt, generator = trial.settings.prompt, trial.generator("init")
    if prompt.init == "random":
        values = generator.uniform(-0.5, 0.5, (prompt.length, backbone.hidden_size))
        return torch.as_tensor(values, dtype=torch.float32, device=backbone.device)
    if prompt.init == "bank":
        return torch.as_tensor(fit_length(warm_starts[trial.name], prompt.length), device=backbone.device)
    sampled = _sampled_tokens(generator, tokenizer, backbone.embedding_rows, prompt.length)
    if prompt.init == "sampled_vocab":
        return backbone.embed(torch.as_tensor(sampled))
    if prompt.init == "text":
        assert prompt.text is not None
        ids = tokenizer(prompt.text, add_special_tokens=False).input_ids
        return backbone.embed(torch.as_tensor(np.resize(ids, prompt.length)))
    known = [ids for label in labels or () if (ids := tokenizer(label, add_special_tokens=False).input_ids)]
    rows = [backbone.embed(torch.as_tensor(ids)).mean(0, keepdim=True) for ids in known[: prompt.length]]  # [1, H] each
    rest = backbone.embed(torch.as_tensor(sampled[len(rows) :])) if len(rows) < prompt.length else None
    return torch.cat([*rows, *([] if rest is None else [rest])])


def fit_length(prompt: np.ndarray, length: int) -> np.ndarray:
    """A prompt `[Q, H]` cut, or repeated from its start, to `[length, H]`."""
    return prompt[np.arange(length) % len(prompt)].astype(np.float32)


def mean_prompt(prompts: Sequence[np.ndarray]) -> np.ndarray:
    """The mean of prompts `[Q_i, H]`, each repeated from its start to the length of the longest: `[Q, H]`."""
    longest = max(map(len, prompts))
    return np.stack([fit_length(prompt, longest) for prompt in prompts]).mean(axis=0)


def _sampled_tokens(generator: np.random.Generator, tokenizer: Any, rows: int, length: int) -> np.ndarray:
    special = set(tokenizer.all_special_ids)
    common = [token for token in range(min(len(tokenizer), rows, COMMON_TOKENS)) if token not in special]
    return generator.choice(common, size=length, replace=length > len(common))
