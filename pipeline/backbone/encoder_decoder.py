"""Encoder-decoder models behind soft prompts: `[P; X]` before the encoder, row by row (Lester et al. 2021).

Shapes: B rows, T tokens, P prompt tokens, H hidden.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput

from pipeline.backbone.rows import Rows, TokenRows, as_indices, mask_of, pad_embeddings, pad_ids


def target_nll(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """-log P of each row's target: `[B]` float32."""
    return _decoder_nll(model, *_encode(model, rows), targets)


def label_nll(model: Any, rows: Rows, pairs: np.ndarray, candidates: TokenRows) -> Tensor:
    """-log P of candidates, each behind the row that `pairs` names: `[len(candidates)]` float32."""
    encoded, mask = _encode(model, rows)
    # The encoder ran once a row; its output is repeated for each of the row's labels.
    index = as_indices(pairs, encoded)
    return _decoder_nll(model, encoded[index], mask[index], candidates)


def decoding_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions: one returns the first tokens `[B]`, the other takes tokens `[B]` and returns the next ones."""
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


def _encode(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """The encoder's output `[B, T, H]` for `[P; X]`, right-padded, and its mask `[B, T]`."""
    # The encoder looks both ways, so a prompt has no state of its own that could be kept.
    prompts = [prompt for prompt in rows.prompts if isinstance(prompt, Tensor)]
    texts = model.get_input_embeddings()(as_indices(pad_ids(rows.inputs), prompts[0]))  # [B, T, H]
    joined = [
        torch.cat([prompts[s].to(texts.dtype), text[: len(x)]])
        for s, text, x in zip(rows.prompt_of_row, texts, rows.inputs, strict=True)
    ]
    embeds = pad_embeddings(joined)
    mask = as_indices(mask_of(np.array([len(row) for row in joined]), embeds.shape[1]), embeds)
    return model.get_encoder()(inputs_embeds=embeds, attention_mask=mask).last_hidden_state, mask


def _decoder_nll(model: Any, encoded: Tensor, mask: Tensor, targets: TokenRows) -> Tensor:
    """-log P of targets `[B]`, one for each row of the encoder's output."""
    ids = torch.as_tensor(pad_ids(targets), device=encoded.device)
    # Teacher forcing: the decoder sees the target shifted by one, behind its start token.
    start = torch.full_like(ids[:, :1], model.config.decoder_start_token_id)
    logits = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded),
        attention_mask=mask,
        decoder_input_ids=torch.cat([start, ids[:, :-1]], dim=1),
        use_cache=False,
    ).logits.float()
    nll = functional.cross_entropy(logits.transpose(1, 2), ids, reduction="none")  # [B, T]
    lengths = np.array([len(target) for target in targets])
    return (nll * as_indices(mask_of(lengths, ids.shape[1]), ids)).sum(1)
