"""The frozen model run behind soft prompts: `[P; X]`, rows of many prompts in one batch.

Every function takes the model first, to be called through `Backbone.run`. A batch's rows are
right-padded; a row's result does not depend on the rows beside it. For encoder-decoder models
the prompt stands before the encoder's input (Lester et al. 2021).

Shapes: B rows, T tokens, P prompt tokens, H hidden, V vocabulary, L labels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from pipeline.backbone.files import FAMILIES

TokenRows = Sequence[np.ndarray]
"""One array of token ids a row, of any lengths."""


@dataclass(frozen=True)
class Rows:
    """Rows to run: for each, the soft prompt that stands before it and its input tokens."""

    prompts: Sequence[Tensor]
    """Soft prompts `[P_s, H]`; lengths may differ."""
    prompt_of_row: Sequence[int]
    inputs: TokenRows


def target_nll(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """Negative log-likelihood of each row's target, summed over its tokens: `[B]` float32, in nats.

    Differentiable in the prompts. Logits are computed at target positions only.
    """
    if _is_encoder_decoder(model):
        return _seq2seq_nll(model, rows, targets)
    texts = [np.concatenate([x, y]) for x, y in zip(rows.inputs, targets, strict=True)]
    embeds, _ = _with_prompts(model, Rows(rows.prompts, rows.prompt_of_row, texts))
    hidden = model.base_model(inputs_embeds=embeds, use_cache=False).last_hidden_state  # [B, T, H]
    starts = [len(rows.prompts[s]) + len(x) for s, x in zip(rows.prompt_of_row, rows.inputs, strict=True)]
    row_index = np.repeat(np.arange(len(targets)), [len(y) for y in targets])
    # The token at position t is predicted at t - 1.
    position = np.concatenate([start - 1 + np.arange(len(y)) for start, y in zip(starts, targets, strict=True)])
    at = hidden[_tensor(row_index, hidden), _tensor(position, hidden)]  # [sum T, H]
    logits = model.get_output_embeddings()(at).float()
    nll = functional.cross_entropy(logits, _tensor(np.concatenate(targets), hidden), reduction="none")
    return nll.new_zeros(len(targets)).index_add(0, _tensor(row_index, hidden), nll)


@torch.no_grad()
def label_log_likelihoods(model: Any, rows: Rows, labels: Sequence[TokenRows]) -> list[np.ndarray]:
    """log P(label | prompt, input) for each row's own label set: B arrays `[L_b]` float32, in nats.

    The prompt and input run once a row; only the labels' tokens run once a label.
    """
    pairs = np.concatenate([np.full(len(of_row), b) for b, of_row in enumerate(labels)])
    candidates = [label for of_row in labels for label in of_row]
    score = _seq2seq_label_nll if _is_encoder_decoder(model) else _causal_label_nll
    scores = -score(model, rows, pairs, candidates).float().cpu().numpy()
    return np.split(scores, np.cumsum([len(of_row) for of_row in labels])[:-1])


@torch.no_grad()
def greedy_decode(
    model: Any, rows: Rows, max_new_tokens: int, eos: int, all_done: Callable[[bool], bool] = bool
) -> list[np.ndarray]:
    """The most likely continuation, token by token, up to and without `eos`: B arrays of token ids.

    `all_done` turns "this rank is done" into "every rank is done": under ZeRO-3 all stop together.
    """
    start, step = (_seq2seq_steps if _is_encoder_decoder(model) else _causal_steps)(model, rows)
    tokens = start()
    out = [tokens]
    done = tokens == eos
    while len(out) < max_new_tokens and not all_done(bool(done.all())):
        tokens = step(tokens, len(out) - 1)
        out.append(tokens)
        done |= tokens == eos
    ids = torch.stack(out, dim=1).cpu().numpy()  # [B, T]
    return [row[: np.argmax(row == eos)] if (row == eos).any() else row for row in ids]


def _is_encoder_decoder(model: Any) -> bool:
    return FAMILIES[model.config.model_type] == "encoder-decoder"


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.long, device=like.device)


def _padded(rows: TokenRows, fill: int = 0) -> np.ndarray:
    out = np.full((len(rows), max(1, *(len(row) for row in rows))), fill, dtype=np.int64)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def _mask(lengths: np.ndarray, width: int) -> np.ndarray:
    return (np.arange(width) < lengths[:, None]).astype(np.int64)


def _with_prompts(model: Any, rows: Rows) -> tuple[Tensor, np.ndarray]:
    """`[P; X]` as embeddings `[B, T, H]`, right-padded, and the rows' lengths `[B]`."""
    embedding = model.get_input_embeddings()
    device = rows.prompts[0].device
    ids = torch.as_tensor(_padded(rows.inputs), device=device)
    text = embedding(ids)  # [B, T, H]
    prompt_lengths = np.array([len(rows.prompts[s]) for s in rows.prompt_of_row])
    lengths = prompt_lengths + [len(x) for x in rows.inputs]
    offsets = np.cumsum([0, *(len(prompt) for prompt in rows.prompts)])
    source = torch.cat([*(p.to(text.dtype) for p in rows.prompts), text.flatten(0, 1)])
    width, t = int(lengths.max()), ids.shape[1]
    at = np.arange(width)
    index = np.empty((len(lengths), width), dtype=np.int64)
    for b, s in enumerate(rows.prompt_of_row):
        p = prompt_lengths[b]
        # Padding repeats a token of the row itself: a prompt gone NaN must stay in its own rows.
        in_text = offsets[-1] + b * t + np.clip(at - p, 0, t - 1)
        index[b] = np.where(at < p, offsets[s] + at, in_text)
    return functional.embedding(torch.as_tensor(index, device=device), source), lengths


# Decoder-only: the prompt and input fill a cache; what follows reads it.


def _causal_prefix(model: Any, rows: Rows) -> tuple[Any, Tensor, np.ndarray, int]:
    embeds, lengths = _with_prompts(model, rows)
    output = model.base_model(inputs_embeds=embeds, use_cache=True, past_key_values=DynamicCache())
    last = output.last_hidden_state[torch.arange(len(lengths)), _tensor(lengths - 1, embeds)]
    logits = model.get_output_embeddings()(last).float()  # [B, V]: the first token after the input
    return output.past_key_values, logits, lengths, embeds.shape[1]


def _continue(model: Any, ids: Tensor, cache: Any, lengths: np.ndarray, width: int, cached: int) -> Tensor:
    """Hidden states `[B, T, H]` of tokens that follow a right-padded prefix and `cached` tokens after it."""
    after = np.ones((len(lengths), cached + ids.shape[1]), dtype=np.int64)
    mask = np.concatenate([_mask(lengths, width), after], axis=1)
    positions = lengths[:, None] + cached + np.arange(ids.shape[1])
    output = model.base_model(
        input_ids=ids,
        past_key_values=cache,
        attention_mask=_tensor(mask, ids),
        position_ids=_tensor(positions, ids),
        use_cache=True,
    )
    return output.last_hidden_state


def _causal_label_nll(model: Any, rows: Rows, pairs: np.ndarray, candidates: TokenRows) -> Tensor:
    cache, first_logits, lengths, width = _causal_prefix(model, rows)
    index = _tensor(pairs, first_logits)
    ids = torch.as_tensor(_padded(candidates), device=first_logits.device)  # [B*L, T]
    nll = functional.cross_entropy(first_logits[index], ids[:, 0], reduction="none")
    if ids.shape[1] == 1:
        return nll
    cache.batch_select_indices(index)
    hidden = _continue(model, ids[:, :-1], cache, lengths[pairs], width, 0)
    logits = model.get_output_embeddings()(hidden).float()
    rest = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # [B*L, T-1]
    target_lengths = np.array([len(label) for label in candidates])
    return nll + (rest * _tensor(_mask(target_lengths, ids.shape[1])[:, 1:], ids)).sum(1)


def _causal_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor, int], Tensor]]:
    cache, first_logits, lengths, width = _causal_prefix(model, rows)

    def step(tokens: Tensor, cached: int) -> Tensor:
        hidden = _continue(model, tokens[:, None], cache, lengths, width, cached)
        return model.get_output_embeddings()(hidden[:, -1]).argmax(-1)

    return lambda: first_logits.argmax(-1), step


# Encoder-decoder: the encoder runs `[P; X]` once a row; the decoder attends to it.


def _encode(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    embeds, lengths = _with_prompts(model, rows)
    mask = _tensor(_mask(lengths, embeds.shape[1]), embeds)
    return model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, mask


def _seq2seq_logits_nll(model: Any, encoded: Tensor, mask: Tensor, targets: TokenRows) -> Tensor:
    ids = torch.as_tensor(_padded(targets), device=encoded.device)
    start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        attention_mask=mask,
        decoder_input_ids=torch.cat([start, ids[:, :-1]], dim=1),
        use_cache=False,
    ).logits.float()
    nll = functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # [B, T]
    lengths = np.array([len(target) for target in targets])
    return (nll * _tensor(_mask(lengths, ids.shape[1]), ids)).sum(1)


def _seq2seq_nll(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    return _seq2seq_logits_nll(model, *_encode(model, rows), targets)


def _seq2seq_label_nll(model: Any, rows: Rows, pairs: np.ndarray, candidates: TokenRows) -> Tensor:
    encoded, mask = _encode(model, rows)
    index = _tensor(pairs, encoded)
    return _seq2seq_logits_nll(model, encoded[index], mask[index], candidates)


def _seq2seq_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor, int], Tensor]]:
    encoded, mask = _encode(model, rows)
    memory: dict[str, Any] = {"past_key_values": None}

    def step(tokens: Tensor, cached: int) -> Tensor:
        output = model(
            encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
            attention_mask=mask,
            decoder_input_ids=tokens[:, None],
            use_cache=True,
            **memory,
        )
        memory["past_key_values"] = output.past_key_values
        return output.logits[:, -1].argmax(-1)

    first = torch.full((len(mask),), model.config.decoder_start_token_id, device=mask.device)
    return lambda: step(first, 0), step
