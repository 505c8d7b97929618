"""The frozen model run behind soft prompts: `[P; X]`, rows of many prompts in one batch.

Every function takes the model first, to be called through `Backbone.run`. A batch's rows are
right-padded; a row's result does not depend on the rows beside it.

Decoder-only: the prompt comes first and attention is causal, so its keys and values do not depend
on the text behind it. Each prompt runs once a batch and its rows attend to it, exactly as if it ran
once a row (see packed.py). Encoder-decoder: the prompt stands before the encoder's input, row by
row (Lester et al. 2021).

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
from pipeline.backbone.packed import Layout, make_layout, run_packed

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
    used, of_row = np.unique(rows.prompt_of_row, return_inverse=True)
    prompts = [rows.prompts[s] for s in used]
    hidden, layout = _run_behind_prompts(model, prompts, texts, list(of_row))
    # The token at position t is predicted at t - 1.
    before = [
        layout.starts[len(prompts) + b] + len(x) - 1 + np.arange(len(y))
        for b, (x, y) in enumerate(zip(rows.inputs, targets, strict=True))
    ]
    nll = _token_nll(model, hidden, np.concatenate(before), np.concatenate(targets))  # [sum T]
    row_index = np.repeat(np.arange(len(targets)), [len(y) for y in targets])
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
        tokens = step(tokens)
        out.append(tokens)
        done |= tokens == eos
    ids = torch.stack(out, dim=1).cpu().numpy()  # [B, T]
    return [row[: np.argmax(row == eos)] if (row == eos).any() else row for row in ids]


def _is_encoder_decoder(model: Any) -> bool:
    return FAMILIES[model.config.model_type] == "encoder-decoder"


def _float_type(model: Any) -> torch.dtype:
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _tensor(values: np.ndarray, like: Tensor) -> Tensor:
    return torch.as_tensor(values, dtype=torch.long, device=like.device)


def _padded(rows: TokenRows, fill: int = 0) -> np.ndarray:
    out = np.full((len(rows), max(1, *(len(row) for row in rows))), fill, dtype=np.int64)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return out


def _mask(lengths: np.ndarray, width: int) -> np.ndarray:
    return (np.arange(width) < lengths[:, None]).astype(np.int64)


def _padded_embeddings(sequences: Sequence[Tensor]) -> Tensor:
    """`[T_b, H]` each -> `[B, T, H]`. Padding repeats a sequence's own last embedding.

    So that a prompt gone NaN stays in its own rows.
    """
    longest = max(len(sequence) for sequence in sequences)
    at = [torch.arange(longest, device=sequence.device).clamp(max=len(sequence) - 1) for sequence in sequences]
    return torch.stack([sequence[index] for sequence, index in zip(sequences, at, strict=True)])


# Decoder-only, scored: prompts, inputs and labels in one packed row.


def _run_behind_prompts(
    model: Any, prompts: Sequence[Tensor], texts: TokenRows, parents: Sequence[int]
) -> tuple[Tensor, Layout]:
    """Pack prompts and the texts behind them (a parent is a prompt's place, or beyond them a text's): `[N, H]`."""
    device = prompts[0].device
    lengths = [*map(len, prompts), *map(len, texts)]
    layout = make_layout(lengths, [*(None for _ in prompts), *map(int, parents)], device)
    words = model.get_input_embeddings()(_tensor(np.concatenate(texts), prompts[0]))
    embeddings = torch.cat([*(prompt.to(words.dtype) for prompt in prompts), words])
    return run_packed(model, embeddings, layout), layout


def _token_nll(model: Any, hidden: Tensor, places: np.ndarray, tokens: np.ndarray) -> Tensor:
    """-log P of `tokens` `[n]`, each predicted from the hidden state at its place: `[n]`."""
    logits = model.get_output_embeddings()(hidden[_tensor(places, hidden)]).float()
    return functional.cross_entropy(logits, _tensor(tokens, hidden), reduction="none")


def _causal_label_nll(model: Any, rows: Rows, pairs: np.ndarray, candidates: TokenRows) -> Tensor:
    used, of_row = np.unique(rows.prompt_of_row, return_inverse=True)
    prompts = [rows.prompts[s] for s in used]
    inputs = len(prompts) + np.arange(len(rows.inputs))  # segments of the inputs, then those of the labels
    # A label's last token is predicted, and predicts nothing.
    longer = [i for i, label in enumerate(candidates) if len(label) > 1]
    texts = [*rows.inputs, *(candidates[i][:-1] for i in longer)]
    hidden, layout = _run_behind_prompts(model, prompts, texts, [*of_row, *inputs[pairs[longer]]])
    ends = layout.starts[inputs] + [len(x) - 1 for x in rows.inputs]
    places = [ends[pairs]]
    tokens = [np.array([label[0] for label in candidates])]
    of_label = [np.arange(len(candidates))]
    for segment, i in enumerate(longer, start=len(prompts) + len(rows.inputs)):
        places.append(layout.starts[segment] + np.arange(len(candidates[i]) - 1))
        tokens.append(candidates[i][1:])
        of_label.append(np.full(len(candidates[i]) - 1, i))
    nll = _token_nll(model, hidden, np.concatenate(places), np.concatenate(tokens))
    return nll.new_zeros(len(candidates)).index_add(0, _tensor(np.concatenate(of_label), hidden), nll)


# Decoder-only, decoded: prompt, input and token after token, each behind the keys and values of
# what came before.


@dataclass
class _Context:
    """What has been run so far, of B rows."""

    cache: DynamicCache
    mask: np.ndarray
    """`[B, T]`: 1 where the cache holds a token, 0 where it holds padding."""


def _prompt_context(model: Any, rows: Rows) -> _Context:
    used, of_row = np.unique(rows.prompt_of_row, return_inverse=True)
    prompts = [rows.prompts[s] for s in used]
    embeds = _padded_embeddings(prompts).to(_float_type(model))  # [S, P, H]
    cache = DynamicCache()
    model.base_model(inputs_embeds=embeds, use_cache=True, past_key_values=cache)
    lengths = np.array([len(prompt) for prompt in prompts])
    cache.batch_select_indices(_tensor(of_row, embeds))
    return _Context(cache, _mask(lengths, embeds.shape[1])[of_row])


def _extend(model: Any, context: _Context, tokens: TokenRows) -> Tensor:
    """Run the rows' next tokens, right-padded, and remember them: hidden states `[B, T, H]`."""
    lengths = np.array([len(row) for row in tokens])
    ids = _padded(tokens)
    # Rows that are done run on beside longer ones; what they would say beyond the context is not used.
    positions = np.minimum(
        context.mask.sum(1)[:, None] + np.arange(ids.shape[1]), model.config.max_position_embeddings - 1
    )
    context.mask = np.concatenate([context.mask, _mask(lengths, ids.shape[1])], axis=1)
    device = context.cache.layers[0].keys.device
    output = model.base_model(
        input_ids=torch.as_tensor(ids, device=device),
        past_key_values=context.cache,
        attention_mask=torch.as_tensor(context.mask, device=device),
        position_ids=torch.as_tensor(positions, device=device),
        use_cache=True,
    )
    return output.last_hidden_state


def _causal_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    context = _prompt_context(model, rows)
    hidden = _extend(model, context, rows.inputs)
    last = [len(x) - 1 for x in rows.inputs]
    first = model.get_output_embeddings()(hidden[torch.arange(len(last)), last]).argmax(-1)

    def step(tokens: Tensor) -> Tensor:
        hidden = _extend(model, context, list(tokens[:, None].cpu().numpy()))
        return model.get_output_embeddings()(hidden[:, -1]).argmax(-1)

    return lambda: first, step


# Encoder-decoder: the encoder runs `[P; X]` once a row; the decoder attends to it.


def _encode(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """The encoder's output `[B, T, H]` for `[P; X]`, right-padded, and its mask `[B, T]`."""
    texts = model.get_input_embeddings()(_tensor(_padded(rows.inputs), rows.prompts[0]))  # [B, T, H]
    prompts = [prompt.to(texts.dtype) for prompt in rows.prompts]
    joined = [
        torch.cat([prompts[s], text[: len(x)]])
        for s, text, x in zip(rows.prompt_of_row, texts, rows.inputs, strict=True)
    ]
    embeds = _padded_embeddings(joined)
    mask = _tensor(_mask(np.array([len(row) for row in joined]), embeds.shape[1]), embeds)
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


def _seq2seq_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    encoded, mask = _encode(model, rows)
    memory: dict[str, Any] = {"past_key_values": None}

    def step(tokens: Tensor) -> Tensor:
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
    return lambda: step(first), step
