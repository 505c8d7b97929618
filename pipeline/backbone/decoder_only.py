"""Decoder-only models behind soft prompts.

The prompt comes first and attention is causal, so its keys and values do not depend on the text
behind it. Each prompt therefore runs once a batch, and its rows attend to it exactly as if it ran
once a row. A prompt whose keys and values were kept (`prompt_states`) does not run at all.

Shapes: B rows, S prompts, T tokens, P prompt tokens, N tokens of all segments, H hidden, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from pipeline.backbone.packed import Layout, make_layout, run_packed
from pipeline.backbone.rows import PromptState, Rows, TokenRows, as_indices, mask_of, pad_embeddings, pad_ids


def target_nll(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """-log P of each row's target: `[B]` float32."""
    # A target's last token predicts nothing that is scored, so it does not run.
    texts = [np.concatenate([x, y[:-1]]) for x, y in zip(rows.inputs, targets, strict=True)]
    # Only prompts that some row of this batch uses: each runs once, whatever its number of rows.
    used, of_row = np.unique(rows.prompt_of_row, return_inverse=True)
    prompts = [rows.prompts[s] for s in used]
    hidden, layout = run_behind_prompts(model, prompts, texts, list(of_row))
    # The token at position t is predicted at t - 1.
    before = [
        layout.starts[len(prompts) + b] + len(x) - 1 + np.arange(len(y))
        for b, (x, y) in enumerate(zip(rows.inputs, targets, strict=True))
    ]
    # Logits at these positions alone: over all positions they would be the step's largest tensor.
    nll = token_nll(model, hidden, np.concatenate(before), np.concatenate(targets))  # [sum T]
    row_index = np.repeat(np.arange(len(targets)), [len(y) for y in targets])
    return nll.new_zeros(len(targets)).index_add(0, as_indices(row_index, hidden), nll)


def run_behind_prompts(
    model: Any, prompts: Sequence[Tensor | PromptState], texts: TokenRows, parents: Sequence[int]
) -> tuple[Tensor, Layout]:
    """Run prompts and the texts behind them, packed: hidden states `[N, H]` and where they lie.

    `parents` has an entry for each text: the index of the prompt that it follows, or `len(prompts)` + the index of the
    text that it follows.
    """
    device = prompts[0].device
    given, fresh = _given_and_fresh(prompts)
    lengths = [*map(len, prompts), *map(len, texts)]
    layout = make_layout(lengths, [*(None for _ in prompts), *map(int, parents)], device, len(given))
    words = model.get_input_embeddings()(as_indices(np.concatenate(texts), prompts[0]))
    # Prompts are float32 for their optimizer; the model runs in its own type, and the cast passes gradients on.
    embeddings = torch.cat([*(prompt.to(words.dtype) for prompt in fresh), words])
    return run_packed(model, embeddings, layout, given), layout


def _given_and_fresh(prompts: Sequence[Tensor | PromptState]) -> tuple[list[PromptState], list[Tensor]]:
    """The prompts that ran before and are given as keys and values, and those that have to run now."""
    given = [prompt for prompt in prompts if isinstance(prompt, PromptState)]
    fresh = [prompt for prompt in prompts if isinstance(prompt, Tensor)]
    assert not given or not fresh, "either all prompts of a batch are given, or all run"
    return given, fresh


def prompt_states(model: Any, prompts: Sequence[Tensor]) -> list[PromptState]:
    """Run prompts `[P_s, H]` and keep their keys and values, which the tokens behind them attend to."""
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    embeds = pad_embeddings(prompts).to(dtype)  # [S, P, H]
    cache = DynamicCache()
    # No mask is needed: padding stands behind a prompt's tokens, and causal attention does not look there.
    model.base_model(inputs_embeds=embeds, use_cache=True, past_key_values=cache)
    keys = torch.stack([layer.keys for layer in cache.layers]).transpose(2, 3)  # [L, S, P, A', D]
    values = torch.stack([layer.values for layer in cache.layers]).transpose(2, 3)
    # Contiguous copies: a view would keep the padded tensor of all prompts in memory.
    return [
        PromptState(keys[:, s, : len(prompt)].contiguous(), values[:, s, : len(prompt)].contiguous())
        for s, prompt in enumerate(prompts)
    ]


def token_nll(model: Any, hidden: Tensor, places: np.ndarray, tokens: np.ndarray) -> Tensor:
    """-log P of `tokens` `[n]`, each predicted from the hidden state at its place: `[n]`."""
    logits = model.get_output_embeddings()(hidden[as_indices(places, hidden)]).float()
    return functional.cross_entropy(logits, as_indices(tokens, hidden), reduction="none")


def label_nll(model: Any, rows: Rows, pairs: np.ndarray, candidates: TokenRows) -> Tensor:
    """-log P of candidates, each behind the row that `pairs` names: `[len(candidates)]` float32."""
    used, of_row = np.unique(rows.prompt_of_row, return_inverse=True)
    prompts = [rows.prompts[s] for s in used]
    inputs = len(prompts) + np.arange(len(rows.inputs))  # segments of the inputs, then those of the labels
    # A label's last token predicts nothing, so a label of one token needs no segment of its own.
    longer = [i for i, label in enumerate(candidates) if len(label) > 1]
    texts = [*rows.inputs, *(candidates[i][:-1] for i in longer)]
    hidden, layout = run_behind_prompts(model, prompts, texts, [*of_row, *inputs[pairs[longer]]])
    # The input's last token predicts the first token of every label behind it.
    ends = layout.starts[inputs] + [len(x) - 1 for x in rows.inputs]
    places = [ends[pairs]]
    tokens = [np.array([label[0] for label in candidates])]
    of_label = [np.arange(len(candidates))]
    for segment, i in enumerate(longer, start=len(prompts) + len(rows.inputs)):
        places.append(layout.starts[segment] + np.arange(len(candidates[i]) - 1))
        tokens.append(candidates[i][1:])
        of_label.append(np.full(len(candidates[i]) - 1, i))
    nll = token_nll(model, hidden, np.concatenate(places), np.concatenate(tokens))
    return nll.new_zeros(len(candidates)).index_add(0, as_indices(np.concatenate(of_label), hidden), nll)


# Decoding runs the prompt, the input, and then token after token, each behind the keys and values of what came before.
# It uses transformers' own cache, since rows that grow token by token gain nothing from packing.


@dataclass
class _Context:
    """What B rows have run so far."""

    cache: DynamicCache
    mask: np.ndarray
    """`[B, T]`: 1 where the cache holds a token, 0 where it holds padding."""
    device: torch.device


def _prompt_context(model: Any, rows: Rows) -> _Context:
    """A cache that starts with each row's prompt, right-padded to the longest prompt."""
    used, of_row = np.unique(rows.prompt_of_row, return_inverse=True)
    given, fresh = _given_and_fresh([rows.prompts[s] for s in used])
    device, cache = rows.prompts[used[0]].device, DynamicCache()
    if not any(len(rows.prompts[s]) for s in used):  # no prompt before any row
        return _Context(cache, np.zeros((len(rows.inputs), 0), dtype=np.int64), device)
    states = given or prompt_states(model, fresh)
    index = as_indices(of_row, states[0].keys)
    for layer in range(len(states[0].keys)):
        keys = pad_embeddings([state.keys[layer] for state in states])[index]  # [B, P, A', D]
        values = pad_embeddings([state.values[layer] for state in states])[index]
        cache.update(keys.transpose(1, 2), values.transpose(1, 2), layer)
    lengths = np.array([len(state) for state in states])
    return _Context(cache, mask_of(lengths, max(lengths))[of_row], device)


def _extend(model: Any, context: _Context, tokens: TokenRows) -> Tensor:
    """Run the rows' next tokens, right-padded, and remember them: hidden states `[B, T, H]`."""
    lengths = np.array([len(row) for row in tokens])
    ids = pad_ids(tokens)
    # A row that is done runs on beside longer ones, maybe beyond the model's context. Its tokens are not used, but its
    # position must stay within the table of positions. Padding before a token takes no position.
    positions = np.minimum(
        context.mask.sum(1)[:, None] + np.arange(ids.shape[1]), model.config.max_position_embeddings - 1
    )
    context.mask = np.concatenate([context.mask, mask_of(lengths, ids.shape[1])], axis=1)
    output = model.base_model(
        input_ids=torch.as_tensor(ids, device=context.device),
        past_key_values=context.cache,
        attention_mask=torch.as_tensor(context.mask, device=context.device),
        position_ids=torch.as_tensor(positions, device=context.device),
        use_cache=True,
    )
    return output.last_hidden_state


def decoding_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions: one returns the first tokens `[B]`, the other takes tokens `[B]` and returns the next ones."""
    context = _prompt_context(model, rows)
    hidden = _extend(model, context, rows.inputs)
    last = [len(x) - 1 for x in rows.inputs]
    first = model.get_output_embeddings()(hidden[torch.arange(len(last)), last]).argmax(-1)

    def step(tokens: Tensor) -> Tensor:
        hidden = _extend(model, context, list(tokens[:, None].cpu().numpy()))
        return model.get_output_embeddings()(hidden[:, -1]).argmax(-1)

    return lambda: first, step
