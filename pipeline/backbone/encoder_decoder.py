"""Encoder-decoder models behind soft prompts: `[P; X]` before the encoder, row by row (Lester et al. 2021).

The model itself does what families do differently: masks, windows and blocks, the head with its scale, bias or cap,
and the token that a target begins behind. So no family is named here. Rows are padded to the longest, or lie one after
another where that is exact (see `unpadded`).

Shapes: B rows, T tokens, P prompt tokens, H hidden, N tokens of all targets, E tokens of all encoder rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.embedding import embed_words
from pipeline.backbone.output import best_tokens, layers_of, summed, target_of_token, token_nll
from pipeline.backbone.rows import Rows, TokenRows, as_indices, mask_of, pad_embeddings, pad_ids
from pipeline.backbone.transfer import to_device
from pipeline.backbone.unpadded import Attended, UnpaddedRun, across, decoder_rows, encoder_rows, run_unpadded

_UNLABELLED = -100
"""What transformers' models take for padding among labels."""


@dataclass(frozen=True)
class _Encoded:
    """What the encoder makes of rows `[P; X]`."""

    states: Tensor
    """`[B, T, H]`, padded on the right, or `[1, E, H]`, one row after another."""
    rows: Attended
    """Where each row lies among the E."""

    @property
    def mask(self) -> Tensor:
        """`[B, T]` of padded states."""
        return as_indices(mask_of(self.rows.segments.lengths, self.states.shape[1]), self.states)

    def padded(self) -> "_Encoded":
        if len(self.states) == len(self.rows.segments.lengths):
            return self
        rows = self.states[0].split(self.rows.segments.lengths.tolist())
        return _Encoded(pad_embeddings(rows), self.rows)


def target_nll(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """-log P of each row's target: `[B]` float32."""
    return _decoder_nll(model, _encode(model, rows), np.arange(len(targets)), targets)


def target_states(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """The hidden states `[N, H]` that predict the N tokens of all targets, one after the other."""
    return _decoder_states(model, _encode(model, rows), np.arange(len(targets)), targets)


def label_nll(model: Any, rows: Rows, pairs: np.ndarray, candidates: TokenRows) -> Tensor:
    """-log P of candidates, each behind the row that `pairs` names: `[len(candidates)]` float32."""
    # The encoder runs once a row, whatever the number of the row's labels.
    return _decoder_nll(model, _encode(model, rows), pairs, candidates)


def decoding_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions: one returns the first tokens `[B]`, the other takes tokens `[B]` and returns the next ones."""
    encoded = _encode(model, rows).padded()
    mask = encoded.mask
    memory: dict[str, Any] = {"past_key_values": None}

    def step(tokens: Tensor) -> Tensor:
        output = layers_of(model)(
            input_ids=tokens[:, None],
            encoder_hidden_states=encoded.states,
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
    labels = to_device(np.where(mask_of(lengths, ids.shape[1]), ids, _UNLABELLED), device)
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels)
        return shifted
    start = torch.full_like(labels[:, :1], model.config.decoder_start_token_id)
    return torch.cat([start, to_device(ids[:, :-1], device)], dim=1)


def _encode(model: Any, rows: Rows) -> _Encoded:
    # The encoder looks both ways, so a prompt has no state of its own that could be kept.
    prompts = [prompt for prompt in rows.prompts if isinstance(prompt, Tensor)]
    words = embed_words(model, as_indices(np.concatenate(rows.inputs), prompts[0]))  # [tokens of all inputs, H]
    texts = words.split([len(x) for x in rows.inputs])
    joined = [
        part for s, text in zip(rows.prompt_of_row, texts, strict=True) for part in (prompts[s].to(text.dtype), text)
    ]
    lengths = np.array([len(rows.prompts[s]) + len(x) for s, x in zip(rows.prompt_of_row, rows.inputs, strict=True)])
    placed, encoder = encoder_rows(lengths), model.get_encoder()
    if model.way == "packed":
        run = UnpaddedRun(placed, None, model.kernels)
        return _Encoded(run_unpadded(encoder, run, inputs_embeds=torch.cat(joined)[None]), placed)
    embeds = pad_embeddings(torch.cat(joined).split(lengths.tolist()))
    mask = as_indices(mask_of(lengths, embeds.shape[1]), embeds)
    return _Encoded(encoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, placed)


def _decoder_nll(model: Any, encoded: _Encoded, row_of: np.ndarray, targets: TokenRows) -> Tensor:
    """-log P of targets `[len(targets)]`, each behind the encoder's row whose number stands in `row_of`."""
    states = _decoder_states(model, encoded, row_of, targets)
    nll = token_nll(model, states, as_indices(np.concatenate(targets), states))  # [N]
    return summed(nll, target_of_token(targets), len(targets))


def _decoder_states(model: Any, encoded: _Encoded, row_of: np.ndarray, targets: TokenRows) -> Tensor:
    """The hidden states `[N, H]` that predict the tokens of targets, each behind the row that `row_of` names."""
    # Teacher forcing.
    ids = decoder_inputs(model, targets, encoded.states.device)
    lengths = np.array([len(target) for target in targets])
    # By number and not by a mask: how many a mask lets through is known on the device alone.
    used = as_indices(np.flatnonzero(mask_of(lengths, ids.shape[1])), ids)
    if model.way == "packed":
        own = decoder_rows(lengths)
        run = UnpaddedRun(own, across(encoded.rows, own, row_of), model.kernels)
        tokens = ids.flatten()[used][None]
        return run_unpadded(layers_of(model), run, input_ids=tokens, encoder_hidden_states=encoded.states)[0]
    index = as_indices(row_of, ids)
    states, mask = encoded.states[index], encoded.mask[index]
    # Padding stands behind a target's tokens, where a decoder does not look.
    hidden: Tensor = layers_of(model)(
        input_ids=ids, encoder_hidden_states=states, encoder_attention_mask=mask, use_cache=False
    ).last_hidden_state  # [B, T, H]
    return hidden.flatten(0, 1)[used]
