"""Rows that are being answered, token by token: they join between two tokens, and leave when they are done.

Shapes: B rows, T tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from pipeline.backbone.growing import GrowingRows
from pipeline.backbone.host import Backbone
from pipeline.backbone.rows import Rows

Key = TypeVar("Key")
Stopped = Callable[[Sequence[int]], bool]
"""Whether an answer of these ids needs no more tokens."""


@dataclass(eq=False)
class _Running(Generic[Key]):
    key: Key
    end: int
    """The token that ends its answer."""
    most: int
    stopped: Stopped
    ids: list[int] = field(default_factory=list)
    """The answer so far, with the token that ends it."""

    @property
    def done(self) -> bool:
        return self.ids[-1] == self.end or len(self.ids) >= self.most or self.stopped(self.ids)

    def answer(self) -> np.ndarray:
        """`[T]`, without the token that ends it."""
        ids = self.ids[:-1] if self.ids[-1] == self.end else self.ids
        return np.array(ids, dtype=np.int64)


class RunningBatch(Generic[Key]):
    """Greedy answers to many rows of a packed decoder-only model. Each row gets the tokens that it gets alone."""

    def __init__(self, backbone: Backbone) -> None:
        assert backbone.shares_prompts
        self._backbone = backbone
        self._growing = GrowingRows()
        self._rows: dict[int, _Running[Key]] = {}

    def __len__(self) -> int:
        """B"""
        return len(self._rows)

    def unfinished(self) -> list[Key]:
        """Of the rows that are not done."""
        return [row.key for row in self._rows.values()]

    def written(self) -> Iterator[tuple[Key, Sequence[int]]]:
        """The answers so far, `[T]` ids, of the rows that are not done."""
        return ((row.key, row.ids) for row in self._rows.values())

    def join(
        self,
        rows: Rows,
        keys: Sequence[Key],
        ends: Sequence[int],
        most: Sequence[int],
        stopped: Sequence[Stopped] | None = None,
    ) -> list[tuple[Key, np.ndarray]]:
        """Take rows up, each with a key, the token that ends its answer, the most tokens of one, and what else ends it.

        -> the answers `[T]` of those that are done with their first token.
        """
        numbers, tokens = self._backbone.run(_join, self._growing, rows)
        stops = stopped or [lambda _: False] * len(keys)
        for number, key, end, longest, stop in zip(numbers, keys, ends, most, stops, strict=True):
            self._rows[number] = _Running(key, end, longest, stop)
        return self._took(numbers, tokens)

    def drop(self, unwanted: Callable[[Key], bool]) -> None:
        """Let rows leave whose answers nobody waits for."""
        gone = [number for number, row in self._rows.items() if unwanted(row.key)]
        self._growing.leave(gone)
        for number in gone:
            del self._rows[number]

    def step(self) -> list[tuple[Key, np.ndarray]]:
        """One token more for every row -> the answers `[T]` that are done, by key."""
        numbers = list(self._rows)
        before = torch.tensor([self._rows[number].ids[-1] for number in numbers], device=self._backbone.device)
        return self._took(numbers, self._backbone.run(_step, self._growing, numbers, before))

    def _took(self, numbers: Sequence[int], tokens: Sequence[int]) -> list[tuple[Key, np.ndarray]]:
        for number, token in zip(numbers, tokens, strict=True):
            self._rows[number].ids.append(token)
        done = [number for number in numbers if self._rows[number].done]
        self._growing.leave(done)
        return [(row.key, row.answer()) for row in map(self._rows.pop, done)]


@torch.no_grad()
def _join(model: object, growing: GrowingRows, rows: Rows) -> tuple[list[int], list[int]]:
    numbers, tokens = growing.join(model, rows)
    return numbers, tokens.tolist()


@torch.no_grad()
def _step(model: object, growing: GrowingRows, numbers: Sequence[int], tokens: torch.Tensor) -> list[int]:
    found: list[int] = growing.step(model, numbers, tokens).tolist()
    return found
