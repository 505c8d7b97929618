"""Encoder-decoder models behind soft prompts: `[P; X]` before the encoder, row by row (Lester et al. 2021).

The model itself does what families do differently: masks, windows and blocks, the head with its scale, bias or cap,
and the token that a target begins behind. So no family is named here.

Shapes: B rows, T tokens, P prompt tokens, H hidden, N tokens of all targets.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.embedding import embed_words
from pipeline.backbone.output import best_tokens, layers_of, summed, target_of_token, token_nll
from pipeline.backbone.rows import Rows, TokenRows, as_indices, mask_of, pad_embeddings, pad_ids

_UNLABELLED = -100
"""What transformers' models take for padding among labels."""


def target_nll(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """-log P of each row's target: `[B]` float32."""
    return _decoder_nll(model, *_encode(model, rows), targets)


def target_states(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """The hidden states `[N, H]` that predict the N tokens of all targets, one after the other."""
    return _decoder_states(model, *_encode(model, rows), targets)


def label_nll(model: Any, rows: Rows, pairs: np.ndarray, candidates: TokenRows) -> Tensor:
    """-log P of candidates, each behind the row that `pairs` names: `[len(candidates)]` float32."""
    encoded, mask = _encode(model, rows)
    # The encoder ran once a row; its output is repeated for each of the row's labels.
    index = as_indices(pairs, mask)
    repeated = type(encoded)(last_hidden_state=encoded.last_hidden_state[index])
    return _decoder_nll(model, repeated, mask[index], candidates)


def decoding_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions: one returns the first tokens `[B]`, the other takes tokens `[B]` and returns the next ones."""
    encoded, mask = _encode(model, rows)
    memory: dict[str, Any] = {"past_key_values": None}

    def step(tokens: Tensor) -> Tensor:
        output = layers_of(model)(
            input_ids=tokens[:, None],
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=mask,
            use_cache=True,
            **memory,
        )
        memory["past_key_values"] = output.past_key_values
        return best_tokens(model, output.last_hidden_state[:, -1])

    def start() -> Tensor:
        tokens = step(torch.full((len(mask),), first_token(model), device=mask.device))
        # A translator is told its language so, as in transformers' `generate`. Its targets begin with that token, too.
        forced = model.generation_config.forced_bos_token_id
        return tokens if forced is None else torch.full_like(tokens, forced)

    return start, step


def first_token(model: Any) -> int:
    """The token that decoding begins behind, by the rule of transformers' `generate`."""
    known = model.generation_config
    first = known.bos_token_id if known.decoder_start_token_id is None else known.decoder_start_token_id
    assert first is not None, "`read_config` refuses a model without one"
    return int(first)


def decoder_inputs(model: Any, targets: TokenRows, device: torch.device) -> Tensor:
    """What the decoder reads `[B, T]` while it is scored on targets: each shifted by one, behind the token before it.

    The family's own rule for training says which token that is: mBART's and PLBart's is the target's own last one.
    """
    lengths = np.array([len(target) for target in targets])
    ids = pad_ids(targets)
    labels = torch.as_tensor(np.where(mask_of(lengths, ids.shape[1]), ids, _UNLABELLED), device=device)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels)
        return shifted
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    return torch.cat([start, torch.as_tensor(ids[:, :-1], device=device)], dim=1)


def _encode(model: Any, rows: Rows) -> tuple[Any, Tensor]:
    """The encoder's output for `[P; X]`, right-padded, as its own kind of object, and its mask `[B, T]`."""
    # The encoder looks both ways, so a prompt has no state of its own that could be kept.
    prompts = [prompt for prompt in rows.prompts if isinstance(prompt, Tensor)]
    texts = embed_words(model, as_indices(pad_ids(rows.inputs), prompts[0]))  # [B, T, H]
    joined = [
        torch.cat([prompts[s].to(texts.dtype), text[: len(x)]])
        for s, text, x in zip(rows.prompt_of_row, texts, rows.inputs, strict=True)
    ]
    embeds = pad_embeddings(joined)
    mask = as_indices(mask_of(np.array([len(row) for row in joined]), embeds.shape[1]), embeds)
    output = model.get_encoder()(inputs_embeds=embeds, attention_mask=mask)
    # The family's own kind: a mixture of experts looks there for more than hidden states.
    return type(output)(last_hidden_state=output.last_hidden_state), mask


def _decoder_nll(model: Any, encoded: Any, mask: Tensor, targets: TokenRows) -> Tensor:
    """-log P of targets `[B]`, one for each row of the encoder's output."""
    states = _decoder_states(model, encoded, mask, targets)
    nll = token_nll(model, states, as_indices(np.concatenate(targets), states))  # [N]
    return summed(nll, target_of_token(targets), len(targets))


def _decoder_states(model: Any, encoded: Any, mask: Tensor, targets: TokenRows) -> Tensor:
    """The hidden states `[N, H]` that predict the tokens of targets, one for each row of the encoder's output."""
    # Teacher forcing. Padding stands behind a target's tokens, where a decoder does not look.
    hidden = layers_of(model)(
        input_ids=decoder_inputs(model, targets, mask.device),
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state  # [B, T, H]
    lengths = np.array([len(target) for target in targets])
    states: Tensor = hidden[as_indices(mask_of(lengths, hidden.shape[1]), hidden).bool()]
    return states
