"""Rows that are being answered, token by token: they join between two tokens, and leave when they are done.

Shapes: B rows, T tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch

from pipeline.backbone.growing import GrowingRows
from pipeline.backbone.host import Backbone
from pipeline.backbone.rows import Rows

Key = TypeVar("Key")


@dataclass(eq=False)
class _Running(Generic[Key]):
    key: Key
    end: int
    """The token that ends its answer."""
    most: int
    ids: list[int] = field(default_factory=list)
    """The answer so far, with the token that ends it."""

    @property
    def done(self) -> bool:
        return self.ids[-1] == self.end or len(self.ids) >= self.most

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

    def join(
        self, rows: Rows, keys: Sequence[Key], ends: Sequence[int], most: Sequence[int]
    ) -> list[tuple[Key, np.ndarray]]:
        """Take rows up, each with a key, the token that ends its answer, and the most tokens of one.

        -> the answers `[T]` of those that are done with their first token.
        """
        places, tokens = self._backbone.run(_join, self._growing, rows)
        for place, key, end, longest in zip(places, keys, ends, most, strict=True):
            self._rows[place] = _Running(key, end, longest)
        return self._took(places, tokens)

    def step(self) -> list[tuple[Key, np.ndarray]]:
        """One token more for every row -> the answers `[T]` that are done, by key."""
        places = list(self._rows)
        before = torch.tensor([self._rows[place].ids[-1] for place in places], device=self._backbone.device)
        return self._took(places, self._backbone.run(_step, self._growing, places, before))

    def _took(self, places: Sequence[int], tokens: Sequence[int]) -> list[tuple[Key, np.ndarray]]:
        for place, token in zip(places, tokens, strict=True):
            self._rows[place].ids.append(token)
        done = [place for place in places if self._rows[place].done]
        self._growing.leave(done)
        return [(row.key, row.answer()) for row in map(self._rows.pop, done)]


@torch.no_grad()
def _join(model: object, growing: GrowingRows, rows: Rows) -> tuple[list[int], list[int]]:
    places, tokens = growing.join(model, rows)
    return places, tokens.tolist()


@torch.no_grad()
def _step(model: object, growing: GrowingRows, places: Sequence[int], tokens: torch.Tensor) -> list[int]:
    found: list[int] = growing.step(model, places, tokens).tolist()
    return found
