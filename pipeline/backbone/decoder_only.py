"""Decoder-only models behind soft prompts.

The prompt comes first and attention is causal, so its keys and values do not depend on the text
behind it. Each prompt therefore runs once a batch, and its rows attend to it exactly as if it ran
once a row. So does what all rows behind a prompt begin with, such as an instruction of the task's template. A
prompt whose keys and values were kept (`prompt_state`) does not run at all.

Shapes: B rows, S prompts, T tokens, P prompt tokens, N tokens of all segments, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone.embedding import embed_words
from pipeline.backbone.output import (
    label_token_nll,
    layers_of,
    summed,
    target_of_token,
    token_nll,
)
from pipeline.backbone.packed import KeysAndValues, Layout, make_layout, run_packed
from pipeline.backbone.rows import NO_TOKENS, PromptState, Rows, TokenRows, as_indices


def target_nll(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """-log P of each row's target: `[B]` float32."""
    nll = token_nll(model, target_states(model, rows, targets), as_indices(np.concatenate(targets), rows.prompts[0]))
    return summed(nll, target_of_token(targets), len(targets))


def target_states(model: Any, rows: Rows, targets: TokenRows) -> Tensor:
    """The hidden states `[N, H]` that predict the N tokens of all targets, one after the other."""
    trees = trees_of(rows)
    # A target's last token predicts nothing that is scored, so it does not run.
    texts = [np.concatenate([x, y[:-1]]) for x, y in zip(trees.own, targets, strict=True)]
    hidden, layout = run_behind_prompts(model, trees.prompts, [*trees.beginnings, *texts], trees.parents)
    # The token at position t is predicted at t - 1.
    starts = layout.starts[trees.segments]
    before = [start + len(x) - 1 + np.arange(len(y)) for start, x, y in zip(starts, trees.own, targets, strict=True)]
    # Logits at these positions alone: over all positions they would be the step's largest tensor.
    return hidden[as_indices(np.concatenate(before), hidden)]


@dataclass(frozen=True, eq=False)
class Trees:
    """Rows as segments: prompts, then what all rows behind one of them begin with, then the rest of each row."""

    prompts: list[Tensor | PromptState]
    """Those that some row uses: each runs once, whatever its number of rows."""
    beginnings: list[np.ndarray]
    own: list[np.ndarray]
    """[B] the tokens of each input behind its beginning; at least one."""
    parents: list[int]
    """Of each beginning and each row."""

    @property
    def segments(self) -> np.ndarray:
        """`[B]` the segments of the rows."""
        return len(self.prompts) + len(self.beginnings) + np.arange(len(self.own))


def trees_of(rows: Rows) -> Trees:
    """Each row behind its prompt, and between them what it has in common with the prompt's other rows."""
    used, of_row = np.unique(rows.prompt_of_row, return_inverse=True)
    shared = [rows.shared[s] if rows.shared else 0 for s in used]
    leading = [int(place) for place in np.flatnonzero(shared)]
    first_row = {place: int(np.argmax(of_row == place)) for place in leading}
    beginnings = [rows.inputs[first_row[place]][: shared[place]] for place in leading]
    above = {place: len(used) + number for number, place in enumerate(leading)}
    parents = [*leading, *(above.get(int(place), int(place)) for place in of_row)]
    own = [ids[shared[place] :] for ids, place in zip(rows.inputs, of_row, strict=True)]
    return Trees([rows.prompts[s] for s in used], beginnings, own, parents)


def run_behind_prompts(
    model: Any,
    prompts: Sequence[Tensor | PromptState],
    texts: TokenRows,
    parents: Sequence[int],
    kept: KeysAndValues | None = None,
) -> tuple[Tensor, Layout]:
    """Run prompts and the texts behind them, packed: hidden states `[N, H]` and where they lie.

    `parents` has an entry for each text: the index of the prompt that it follows, or `len(prompts)` + the index of the
    text that it follows. Keys and values of what runs go into `kept`, if it is there.
    """
    device = prompts[0].device
    given, fresh = _given_and_fresh(prompts)
    lengths = [*map(len, prompts), *map(len, texts)]
    layout = make_layout(lengths, [*(None for _ in prompts), *map(int, parents)], device, len(given))
    ids = as_indices(np.concatenate(texts), prompts[0])
    words = embed_words(model, ids)
    # Prompts are float32 for their optimizer; the model runs in its own type, and the cast passes gradients on.
    embeddings = torch.cat([*(prompt.to(words.dtype) for prompt in fresh), words])
    more = inputs_beside(model, torch.cat([ids.new_full((sum(map(len, fresh)),), pad_token(model)), ids])[None])
    return run_packed(model, embeddings, layout, given, kept, more), layout


def inputs_beside(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What some families' layers get from token ids `[B, T]` beside embeddings: Gemma's inputs of each layer."""
    if not asks_for_tokens(model):
        return {}
    return {"per_layer_inputs": layers_of(model).get_per_layer_inputs(ids)}


def asks_for_tokens(model: Any) -> bool:
    """Whether the family's layers get inputs of their own from tokens."""
    return bool(getattr(model.config, "hidden_size_per_layer_input", None))


def pad_token(model: Any) -> int:
    """The token that a prompt's rows are where a family asks for tokens."""
    return int(model.config.pad_token_id or 0)


def _given_and_fresh(prompts: Sequence[Tensor | PromptState]) -> tuple[list[PromptState], list[Tensor]]:
    """The prompts that ran before and are given as keys and values, and those that have to run now."""
    given = [prompt for prompt in prompts if isinstance(prompt, PromptState)]
    fresh = [prompt for prompt in prompts if isinstance(prompt, Tensor)]
    assert not given or not fresh, "either all prompts of a batch are given, or all run"
    return given, fresh


def prompt_state(model: Any, prompt: Tensor, beginning: np.ndarray = NO_TOKENS) -> PromptState:
    """Run a prompt `[P, H]`, and what rows behind it begin with, `[T]`, and keep their keys and values.

    The tokens behind them attend to these.
    """
    kept: KeysAndValues = {}
    run_behind_prompts(model, [prompt], [beginning], [0], kept)
    state = _state(kept)
    # Copies: families that make queries, keys and values in one product keep all three while a view of one is there.
    keys, values = ([_copied(part) for part in side] for side in (state.keys, state.values))
    return PromptState(keys, values)


def label_nll(model: Any, rows: Rows, pairs: np.ndarray, candidates: TokenRows) -> Tensor:
    """-log P of candidates, each behind the row that `pairs` names: `[len(candidates)]` float32."""
    trees = trees_of(rows)
    inputs = trees.segments  # behind them stand the segments of the labels
    # A label's last token predicts nothing, so a label of one token needs no segment of its own.
    longer = [i for i, label in enumerate(candidates) if len(label) > 1]
    texts = [*trees.beginnings, *trees.own, *(candidates[i][:-1] for i in longer)]
    hidden, layout = run_behind_prompts(model, trees.prompts, texts, [*trees.parents, *inputs[pairs[longer]]])
    # The input's last token predicts the first token of every label behind it.
    ends = layout.starts[inputs] + [len(x) - 1 for x in trees.own]
    places = [ends[pairs]]
    tokens = [np.array([label[0] for label in candidates])]
    of_label = [np.arange(len(candidates))]
    for segment, i in enumerate(longer, start=int(inputs[-1]) + 1):
        places.append(layout.starts[segment] + np.arange(len(candidates[i]) - 1))
        tokens.append(candidates[i][1:])
        of_label.append(np.full(len(candidates[i]) - 1, i))
    own, place_of_token = np.unique(np.concatenate(places), return_inverse=True)
    wanted = as_indices(np.concatenate(tokens), hidden)
    nll = label_token_nll(model, hidden[as_indices(own, hidden)], wanted, place_of_token)
    return summed(nll, np.concatenate(of_label), len(candidates))


def _state(kept: KeysAndValues) -> PromptState:
    pairs = [kept[layer] for layer in sorted(kept)]
    return PromptState([keys for keys, _ in pairs], [values for _, values in pairs])


def _copied(part: Tensor) -> Tensor:
    return part.clone(memory_format=torch.contiguous_format)
