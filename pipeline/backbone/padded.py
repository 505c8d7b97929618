"""Decoder-only models whose rows run padded, `[P; X; Y]` each: the way for what cannot be packed.

A state-space layer or linear attention runs over its whole row, and some families build their own masks. Every row has
its own copy of its prompt, as in other libraries. Padding stands behind a row, where nothing causal looks.

Shapes: B rows, T tokens, P prompt tokens, H hidden.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.decoder_only import inputs_beside, pad_token
from pipeline.backbone.embedding import embed_words
from pipeline.backbone.output import best_tokens, layers_of, summed, target_of_token, token_nll
from pipeline.backbone.rows import Rows, TokenRows, as_indices, mask_of, pad_embeddings, pad_ids
from pipeline.backbone.transfer import to_device

_SHARED_TOKENS = 384
"""Tokens of texts that share a row at most."""


def target_nll(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """-log P of each row's target: `[B]` float32."""
    nll = token_nll(model, target_states(model, rows, targets), as_indices(np.concatenate(targets), rows.prompts[0]))
    return summed(nll, target_of_token(targets), len(targets))


def target_states(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """The hidden states `[N, H]` that predict the N tokens of all targets, one after the other."""
    # A target's last token predicts nothing that is scored, so it does not run.
    texts = [np.concatenate([x, y[:-1]]) for x, y in zip(rows.inputs, targets, strict=True)]
    hidden = _run(model, rows.prompts, rows.prompt_of_row, texts)
    return _states_before(hidden, _ends(rows), np.arange(len(targets)), targets)


def label_nll(model: Any, rows: Rows, pairs: np.ndarray, candidates: TokenRows) -> Tensor:
    """-log P of candidates, each behind the row that `pairs` names: `[len(candidates)]` float32."""
    # Labels of one token are predicted at the end of their row, which runs once for all of them. A longer label is
    # a row of its own, and the first one of each row serves those too.
    texts, of_text, text_of = list[np.ndarray](), list[int](), np.zeros(len(candidates), dtype=np.int64)
    for row, x in enumerate(rows.inputs):
        own = np.flatnonzero(pairs == row).tolist()
        longer = [i for i in own if len(candidates[i]) > 1]
        text_of[own] = len(texts)
        text_of[longer] += np.arange(len(longer))
        texts += [np.concatenate([x, candidates[i][:-1]]) for i in longer] or [x]
        of_text += [row] * max(1, len(longer))
    hidden = _run(model, rows.prompts, [rows.prompt_of_row[row] for row in of_text], texts)
    return _scored(model, hidden, _ends(rows)[of_text], text_of, candidates)


def decoding_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions: one returns the first tokens `[B]`, the other takes tokens `[B]` and returns the next ones."""
    first, step = growing_rows(model, rows, model.keeps_rows)
    return lambda: best_tokens(model, first), lambda tokens: best_tokens(model, step(tokens))


def growing_rows(model: Any, rows: Rows, kept: bool) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The rows' last hidden states `[B, H]`, and a function from their next tokens `[B]` to those behind them.

    `kept`: the family's own cache holds what ran before, which is exact only for some (see `proof`); without it each
    token runs its whole row again.
    """
    return _kept_rows(model, rows) if kept else _rows_run_again(model, rows)


def _rows_run_again(model: Any, rows: Rows) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    texts = list(rows.inputs)
    before = np.array([len(rows.prompts[s]) for s in rows.prompt_of_row])

    def last() -> Tensor:
        hidden = _run(model, rows.prompts, rows.prompt_of_row, texts)
        return hidden[torch.arange(len(texts)), as_indices(before + [len(text) - 1 for text in texts], hidden)]

    def step(tokens: Tensor) -> Tensor:
        texts[:] = [np.append(text, token) for text, token in zip(texts, tokens.tolist(), strict=True)]
        return last()

    return last(), step


def _kept_rows(model: Any, rows: Rows) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    # Padding stands before rows here: behind them a state would run on over it.
    joined, ids = _joined(model, rows.prompts, rows.prompt_of_row, rows.inputs)
    lengths = np.array([len(row) for row in joined])
    longest = int(lengths.max())
    mask = as_indices(mask_of(lengths, longest)[:, ::-1].copy(), joined[0])
    embeddings = torch.stack([torch.cat([row[:1].expand(longest - len(row), -1), row]) for row in joined])
    padded_ids = np.stack([np.pad(of_row, (longest - len(of_row), 0)) for of_row in ids])
    layers, cache = layers_of(model), None

    def run(embeddings: Tensor, ids: Tensor) -> Tensor:
        nonlocal cache
        given = {} if cache is None else {_cache_name(layers): cache}
        if "position_ids" in signature(layers.forward).parameters:
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        more = inputs_beside(model, ids)
        output = layers(inputs_embeds=embeddings, attention_mask=mask, use_cache=True, **given, **more)
        cache = getattr(output, _cache_name(layers))
        hidden: Tensor = output.last_hidden_state[:, -1]
        return hidden

    def step(tokens: Tensor) -> Tensor:
        nonlocal mask
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        return run(embed_words(model, tokens[:, None]), tokens[:, None])

    return run(embeddings, as_indices(padded_ids, embeddings)), step


def _ends(rows: Rows) -> np.ndarray:
    """`[B]`: the place in each row that predicts its target's first token."""
    return np.array([len(rows.prompts[s]) + len(x) - 1 for s, x in zip(rows.prompt_of_row, rows.inputs, strict=True)])


def _joined(
    model: Any, prompts: Sequence[Any], of_row: Sequence[int], texts: TokenRows
) -> tuple[list[Tensor], list[np.ndarray]]:
    """Each row's prompt and text, as embeddings `[T_b, H]` and as tokens `[T_b]`, where a prompt's are padding."""
    words = embed_words(model, as_indices(pad_ids(texts), prompts[0]))
    joined = [
        torch.cat([prompts[s].to(words.dtype), of_text[: len(text)]])
        for s, of_text, text in zip(of_row, words, texts, strict=True)
    ]
    padding = pad_token(model)
    ids = [np.concatenate([np.full(len(prompts[s]), padding), x]) for s, x in zip(of_row, texts, strict=True)]
    return joined, ids


def _run(model: Any, prompts: Sequence[Any], of_row: Sequence[int], texts: TokenRows) -> Tensor:
    if model.keeps_prompts and not torch.is_grad_enabled():
        return hidden_states(model, prompts, of_row, texts, kept=True)
    if model.way == "shared":
        return sharing_prompts(model, prompts, of_row, texts)
    return hidden_states(model, prompts, of_row, texts)


def hidden_states(
    model: Any, prompts: Sequence[Any], of_row: Sequence[int], texts: TokenRows, kept: bool = False
) -> Tensor:
    """Last hidden states `[B, T, H]` of prompts and the texts behind them, right-padded.

    `kept`: each prompt runs once, and its rows go on from its state. This is exact only for some families (see
    `proof`), has no gradients, and zeros at the prompts' own places.
    """
    if kept:
        return _behind_kept_prompts(model, prompts, of_row, texts)
    joined, ids = _joined(model, prompts, of_row, texts)
    embeddings = pad_embeddings(joined)
    lengths = np.array([len(row) for row in joined])
    # Positions are not given: some families have none, and the others count from the row's first token.
    output = layers_of(model)(
        inputs_embeds=embeddings,
        attention_mask=as_indices(mask_of(lengths, embeddings.shape[1]), embeddings),
        use_cache=False,
        **inputs_beside(model, as_indices(pad_ids(ids), embeddings)),
    )
    hidden: Tensor = output.last_hidden_state
    return hidden


def sharing_prompts(model: Any, prompts: Sequence[Any], of_row: Sequence[int], texts: TokenRows) -> Tensor:
    """The same for families that take a mask of tokens by tokens: some texts share a row, and its prompt.

    Their layers must keep to the mask and to given positions, and have no window of their own (see `proof`).
    """
    shared = _shared_rows(of_row, texts)
    rows = [_SharedRow(prompts[s], [texts[b] for b in members]) for s, members in shared]
    longest = max(len(row) for row in rows)
    joined, ids = _joined(model, prompts, [s for s, _ in shared], [np.concatenate(row.texts) for row in rows])
    embeddings = pad_embeddings(joined)
    seen = to_device(np.stack([row.seen(longest) for row in rows]), embeddings.device)
    mask = torch.zeros(seen.shape, dtype=embeddings.dtype, device=embeddings.device)
    output = layers_of(model)(
        inputs_embeds=embeddings,
        attention_mask=mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[:, None],
        position_ids=as_indices(np.stack([row.positions(longest) for row in rows]), embeddings),
        use_cache=False,
        **inputs_beside(model, as_indices(pad_ids(ids), embeddings)),
    )
    # Each text behind its prompt again, as if it had a row of its own.
    width = max(len(prompts[s]) + len(text) for s, text in zip(of_row, texts, strict=True))
    places = np.zeros((len(texts), width), dtype=np.int64)
    for at, ((_, members), row) in enumerate(zip(shared, rows, strict=True)):
        for b, own in zip(members, row.places(), strict=True):
            places[b, : len(own)] = at * longest + own
    hidden: Tensor = output.last_hidden_state.flatten(0, 1)[as_indices(places, embeddings)]
    return hidden


def _shared_rows(of_row: Sequence[int], texts: TokenRows) -> list[tuple[int, list[int]]]:
    """Texts that share a row, each with the prompt that stands there: attention is within a row, so rows stay short."""
    shared: list[tuple[int, list[int]]] = []
    for s in sorted(set(of_row)):
        room = 0
        for b in (b for b, of in enumerate(of_row) if of == s):
            room -= len(texts[b])
            if room < 0:
                shared.append((s, []))
                room = _SHARED_TOKENS - len(texts[b])
            shared[-1][1].append(b)
    return shared


@dataclass(frozen=True)
class _SharedRow:
    """A prompt and the texts behind it, one after the other."""

    prompt: Tensor
    texts: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.texts))

    def _padded(self, values: list[np.ndarray], width: int) -> np.ndarray:
        return np.pad(np.concatenate(values), (0, width - len(self)), mode="edge")

    def positions(self, width: int) -> np.ndarray:
        """`[width]`: each text's begin behind the prompt."""
        before = len(self.prompt)
        return self._padded([np.arange(before), *(before + np.arange(len(text)) for text in self.texts)], width)

    def seen(self, width: int) -> np.ndarray:
        """`[width, width]`: a token sees what stands before it of its own text and of the prompt."""
        owners = [np.zeros(len(self.prompt), int), *(np.full(len(text), i) for i, text in enumerate(self.texts, 1))]
        owner, order = self._padded(owners, width), np.arange(width)
        of_prompt = order[None] < len(self.prompt)
        return (order[None] <= order[:, None]) & (of_prompt | (owner[:, None] == owner[None]))

    def places(self) -> list[np.ndarray]:
        """Of each text, the places of the prompt and its own."""
        starts = len(self.prompt) + np.cumsum([0, *map(len, self.texts)])
        prompt = np.arange(len(self.prompt))
        return [
            np.append(prompt, start + np.arange(len(text))) for start, text in zip(starts, self.texts, strict=False)
        ]


def _behind_kept_prompts(model: Any, prompts: Sequence[Any], of_row: Sequence[int], texts: TokenRows) -> Tensor:
    lengths = [len(prompts[s]) + len(text) for s, text in zip(of_row, texts, strict=True)]
    hidden: Tensor | None = None
    for s in sorted(set(of_row)):
        rows = [row for row, of in enumerate(of_row) if of == s]
        found = _behind_one(model, prompts[s], [texts[row] for row in rows])
        if hidden is None:
            hidden = found.new_zeros(len(texts), max(lengths), found.shape[-1])
        start = len(prompts[s])
        hidden[rows, start : start + found.shape[1]] = found
    assert hidden is not None
    return hidden


def _behind_one(model: Any, prompt: Tensor, texts: TokenRows) -> Tensor:
    """Last hidden states `[B, T, H]` of right-padded texts that follow one prompt `[P, H]`."""
    layers, before = layers_of(model), len(prompt)
    ids = as_indices(pad_ids(texts), prompt)
    words = embed_words(model, ids)
    given: dict[str, Any] = {}
    if before:
        padding = ids.new_full((1, before), pad_token(model))
        first = layers(inputs_embeds=prompt[None].to(words.dtype), use_cache=True, **inputs_beside(model, padding))
        cache = getattr(first, _cache_name(layers))
        cache.reorder_cache(ids.new_zeros(len(texts)))  # a copy for each row
        given = {_cache_name(layers): cache, "use_cache": True}
        if "position_ids" in signature(layers.forward).parameters:
            given["position_ids"] = (before + torch.arange(ids.shape[1], device=ids.device))[None].expand_as(ids)
    mask = mask_of(np.array([before + len(text) for text in texts]), before + ids.shape[1])
    output = layers(inputs_embeds=words, attention_mask=as_indices(mask, prompt), **given, **inputs_beside(model, ids))
    hidden: Tensor = output.last_hidden_state
    return hidden


def _cache_name(layers: Any) -> str:
    """What the family calls its cache: Mamba has a word of its own."""
    return "cache_params" if "cache_params" in signature(layers.forward).parameters else "past_key_values"


def _scored(model: Any, hidden: Tensor, ends: np.ndarray, row_of: np.ndarray, targets: TokenRows) -> Tensor:
    """-log P of targets, the i-th behind the place `ends[row_of[i]]` of its row: `[len(targets)]`."""
    states = _states_before(hidden, ends, row_of, targets)
    nll = token_nll(model, states, as_indices(np.concatenate(targets), hidden))
    return summed(nll, target_of_token(targets), len(targets))


def _states_before(hidden: Tensor, ends: np.ndarray, row_of: np.ndarray, targets: TokenRows) -> Tensor:
    """The states `[N, H]` that predict the N tokens of targets, which stand as in `_scored`."""
    places = np.concatenate([ends[row] + np.arange(len(y)) for row, y in zip(row_of, targets, strict=True)])
    return hidden[as_indices(row_of[target_of_token(targets)], hidden), as_indices(places, hidden)]
