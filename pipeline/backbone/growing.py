"""Rows of a decoder-only model that grow token by token: they join while others grow, and leave when they are done.

A row's keys and values lie in room of its own, behind those of its prompt, which its neighbours share. So a token
writes its own key and value, and nothing else moves. What is kept is what the attention of the layers saw, so this is
exact for whatever is exact when packed.

Shapes: B rows, S places for rows, R tokens of a place, L layers, A' heads of keys, D head size.
"""

from collections.abc import Callable, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
from torch import Tensor

from pipeline.backbone.decoder_only import inputs_beside, run_behind_prompts, trees_of
from pipeline.backbone.embedding import embed_words
from pipeline.backbone.native import attention as native_attention
from pipeline.backbone.output import best_tokens
from pipeline.backbone.packed import KeysAndValues, Layout, NotPlainError, make_layout, run_packed
from pipeline.backbone.rows import PromptState, Rows, as_indices

_SPARE = 32
"""Tokens by which places are larger than what is needed at once."""


def decoding_steps(model: Any, rows: Rows) -> tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]:
    """Two functions: one returns the first tokens `[B]`, the other takes tokens `[B]` and returns the next ones."""
    growing = GrowingRows()
    numbers, first = growing.join(model, rows)
    return lambda: first, lambda tokens: growing.step(model, numbers, tokens)


class GrowingRows:
    """Rows that are under way. Each has a number, from when it joins until it leaves, and a place, which may change."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        """`[S, R, A', D]` of each layer."""
        self._values: list[Tensor] = []
        self._places: dict[int, int] = {}
        """By a row's number."""
        self._numbers = count()
        self._before: dict[int, list[PromptState]] = {}
        """By place: what the row's own tokens stand behind."""
        self._lengths = np.zeros(0, dtype=np.int64)
        """`[S]` tokens in each place."""
        self._by_kernel = True

    def __len__(self) -> int:
        """B"""
        return len(self._before)

    @property
    def nbytes(self) -> int:
        """Bytes of all places, free ones too."""
        return sum(part.nbytes for part in (*self._keys, *self._values))

    def join(self, model: Any, rows: Rows) -> tuple[list[int], Tensor]:
        """Run rows up to their first token: -> their numbers, and the tokens `[B]`."""
        trees, kept = trees_of(rows), KeysAndValues()
        hidden, layout = run_behind_prompts(model, trees.prompts, [*trees.beginnings, *trees.own], trees.parents, kept)
        state = PromptState(*([kept[layer][side].contiguous() for layer in sorted(kept)] for side in (0, 1)))
        texts, segments = trees.segments, layout.segments
        starts, lengths = layout.starts[texts], segments.lengths[texts]
        places = self._take_places(state, lengths)
        chains, states = segments.chains(), _states_before(trees.prompts, layout, int(texts[0]), state)
        for place, segment in zip(places, texts.tolist(), strict=True):
            self._before[place] = [states[above] for above in chains[segment][:-1]]
        at, within = _tokens_of(np.array(places), lengths)
        tokens = np.concatenate([start + np.arange(n) for start, n in zip(starts, lengths, strict=True)])
        own = as_indices(tokens, hidden)
        self._write(at, within, PromptState([k[own] for k in state.keys], [v[own] for v in state.values]))
        self._lengths[places] = lengths
        numbers = list(islice(self._numbers, len(places)))
        self._places |= zip(numbers, places, strict=True)
        return numbers, best_tokens(model, hidden[as_indices(starts + lengths - 1, hidden)])

    def step(self, model: Any, numbers: Sequence[int], tokens: Tensor) -> Tensor:
        """Let some rows take one token each, `[B]` -> the tokens `[B]` that follow them."""
        at = np.array([self._places[number] for number in numbers])
        self._make_room(len(self._lengths), int(self._lengths[at].max()) + 1)
        hidden = self._run_by_kernel(model, at, tokens)
        if hidden is None:
            hidden = self._run(model, at, tokens)
        self._lengths[at] += 1
        return best_tokens(model, hidden)

    def leave(self, numbers: Sequence[int]) -> None:
        """Free the places of rows that are done."""
        for number in numbers:
            place = self._places.pop(number)
            del self._before[place]
            self._lengths[place] = 0

    def _run_by_kernel(self, model: Any, at: np.ndarray, tokens: Tensor) -> Tensor | None:
        """Hidden states `[B, H]`, with keys read where they lie; None where some layer's attention is not plain."""
        if not (self._by_kernel and getattr(model, "kernels", False) and native_attention.supports(*self._keys)):
            return None
        before = [self._before[place] for place in at.tolist()]
        after = self._lengths[at] + 1
        lengths = [[*map(len, states), int(n)] for states, n in zip(before, after, strict=True)]
        totals = [sum(of_row) for of_row in lengths]
        # Of where tokens stand, layers ask for their positions alone.
        parents = [*(None for _ in at), *range(len(at))]
        layout = make_layout([*(n - 1 for n in totals), *np.ones_like(at)], parents, tokens.device, len(at))
        parts = self._parts(at, before, lengths, max(totals))
        try:
            more = inputs_beside(model, tokens[None])
            return run_packed(model, embed_words(model, tokens), layout, more=more, parts=parts)
        except NotPlainError:
            self._by_kernel = False
            return None

    def _parts(
        self, at: np.ndarray, before: list[list[PromptState]], lengths: list[list[int]], most: int
    ) -> Callable[[int], native_attention.Parts]:
        """Of each layer, where the parts of the rows at some places lie."""
        rooms = _addresses(self._keys, self._values)  # [2, L]
        strides = np.array([[room.stride(0) * 4 for room in side] for side in (self._keys, self._values)])
        known = {id(state): _addresses(state.keys, state.values) for states in before for state in states}
        columns = [
            column
            for place, states in zip(at.tolist(), before, strict=True)
            for column in (*(known[id(state)] for state in states), rooms + place * strides)
        ]
        keys, values = np.stack(columns, axis=-1)  # [L, parts] each
        first = np.concatenate([[0], np.cumsum([len(of_row) for of_row in lengths])])
        flat = np.concatenate(lengths)
        return lambda layer: native_attention.Parts(first, keys[layer], values[layer], flat, most)

    def _run(self, model: Any, at: np.ndarray, tokens: Tensor) -> Tensor:
        """The same with all keys gathered, on any device and for any family."""
        number: dict[int, int] = {}
        shared, parents = list[PromptState](), list[int | None]()
        behind = list[int | None]()
        for place in at.tolist():
            above = None
            for state in self._before[place]:
                if id(state) not in number:
                    number[id(state)] = len(shared)
                    shared.append(state)
                    parents.append(above)
                above = number[id(state)]
            behind.append(above)
        lengths, given = self._lengths[at], len(shared) + len(at)
        layout = make_layout(
            [*map(len, shared), *lengths, *np.ones_like(at)],
            [*parents, *behind, *range(len(shared), given)],
            tokens.device,
            given,
        )
        own, kept = self._own(at), KeysAndValues()
        more = inputs_beside(model, tokens[None])
        hidden = run_packed(model, embed_words(model, tokens), layout, [*shared, own], kept, more)
        state = PromptState(*([kept[layer][side] for layer in sorted(kept)] for side in (0, 1)))
        self._write(at, lengths, state)
        return hidden

    def _own(self, at: np.ndarray) -> PromptState:
        """The keys and values at some places, one row behind the other."""
        places, within = (as_indices(of_token, self._keys[0]) for of_token in _tokens_of(at, self._lengths[at]))
        keys, values = ([room[places, within] for room in side] for side in (self._keys, self._values))
        return PromptState(keys, values)

    def _write(self, places: np.ndarray, within: np.ndarray, state: PromptState) -> None:
        at, to = as_indices(places, self._keys[0]), as_indices(within, self._keys[0])
        for rooms, side in ((self._keys, state.keys), (self._values, state.values)):
            for room, part in zip(rooms, side, strict=True):
                room[at, to] = part

    def _take_places(self, like: PromptState, lengths: np.ndarray) -> list[int]:
        """Places for rows of these lengths, free ones first."""
        if not len(self):  # so that a large batch of before holds no memory for good
            self._keys, self._values = (
                [part.new_empty(0, 0, *part.shape[1:]) for part in side] for side in (like.keys, like.values)
            )
            self._lengths = self._lengths[:0]
        self._move_together(len(self) + len(lengths), int(max(lengths.max(), self._lengths.max(initial=0))) + 1)
        free = [place for place in range(len(self._lengths)) if place not in self._before]
        missing = max(0, len(lengths) - len(free))
        total = len(self._lengths)
        if missing:
            total = max(total + missing, total + total // 2)
            free = [*free, *range(len(self._lengths), total)]
        self._make_room(total, int(lengths.max()) + 1)
        return free[: len(lengths)]

    def _move_together(self, places: int, tokens: int) -> None:
        """Where much more room is there than so many places of so many tokens take, keep no more than rows fill.

        Else one long row beside many short ones, or many short ones before a long one, would leave room for as many
        rows as there ever were, each as long as the longest ever was.
        """
        has, room = self._keys[0].shape[:2]
        if has <= 2 * places and room <= 2 * tokens + _SPARE:
            return
        kept = sorted(self._before)
        at, wide = as_indices(np.array(kept, dtype=np.int64), self._keys[0]), min(room, tokens + _SPARE)
        self._keys, self._values = ([part[at, :wide] for part in side] for side in (self._keys, self._values))
        new = {place: number for number, place in enumerate(kept)}
        self._places = {number: new[place] for number, place in self._places.items()}
        self._before = {new[place]: states for place, states in self._before.items()}
        self._lengths = self._lengths[kept]

    def _make_room(self, places: int, tokens: int) -> None:
        """Make places for so many rows of so many tokens, at least."""
        has, room = self._keys[0].shape[:2]
        if places > has or tokens > room:
            wide = tokens + max(_SPARE, tokens // 2) if tokens > room else room
            self._keys, self._values = (
                [_larger(part, places, wide) for part in side] for side in (self._keys, self._values)
            )
            self._lengths = np.concatenate([self._lengths, np.zeros(places - len(self._lengths), dtype=np.int64)])


def _larger(room: Tensor, places: int, tokens: int) -> Tensor:
    larger = room.new_zeros(places, tokens, *room.shape[2:])
    larger[: room.shape[0], : room.shape[1]] = room
    return larger


def _addresses(keys: Sequence[Tensor], values: Sequence[Tensor]) -> np.ndarray:
    """`[2, L]`"""
    return np.array([[part.data_ptr() for part in side] for side in (keys, values)], dtype=np.int64)


def _tokens_of(places: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each token of rows of these lengths: the row's place, and the token's number in it."""
    return np.repeat(places, lengths), np.concatenate([np.arange(n) for n in lengths])


def _states_before(
    prompts: Sequence[Tensor | PromptState], layout: Layout, shared: int, ran: PromptState
) -> list[PromptState]:
    """Of the first `shared` segments, what rows behind them attend to: as given, or a copy of what ran."""
    states = []
    for segment in range(shared):
        prompt = prompts[segment] if segment < len(prompts) else None
        if not isinstance(prompt, PromptState):
            start = int(layout.starts[segment])
            own = slice(start, start + int(layout.segments.lengths[segment]))
            prompt = PromptState([part[own].clone() for part in ran.keys], [part[own].clone() for part in ran.values])
        states.append(prompt)
    return states
