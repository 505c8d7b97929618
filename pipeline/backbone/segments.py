"""Token segments that follow one another like branches of trees, packed into one row.

An input follows its soft prompt, a label follows its input. The first segments may be given: they do not run, and
are only looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Segments:
    lengths: np.ndarray
    """Tokens of each segment; one of none (no prompt at all) does not run, and nothing follows it."""
    parents: np.ndarray
    """The segment that each follows, an earlier one; -1 at the root of a tree."""
    given: int
    """How many segments, the first ones, do not run."""

    @cached_property
    def run(self) -> list[int]:
        return [segment for segment in range(self.given, len(self.lengths)) if self.lengths[segment]]

    @property
    def given_tokens(self) -> int:
        return int(self.lengths[: self.given].sum())

    @cached_property
    def starts(self) -> np.ndarray:
        """First token of each segment; those that are given lie at -G to -1."""
        return np.cumsum(self.lengths) - self.lengths - self.given_tokens

    @cached_property
    def before(self) -> np.ndarray:
        """Tokens of each segment's ancestors."""
        before = np.zeros_like(self.lengths)
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                before[segment] = before[parent] + self.lengths[parent]
        return before

    def places(self) -> list[np.ndarray]:
        """The tokens of each segment."""
        return [np.arange(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]

    def chains(self) -> list[list[int]]:
        """Each segment behind all its ancestors, the root first."""
        chains: list[list[int]] = []
        for segment, parent in enumerate(self.parents):
            chains.append([*(chains[parent] if parent >= 0 else []), segment])
        return chains

    def positions(self) -> np.ndarray:
        """`[N]`: of each token that runs, behind its ancestors."""
        return np.concatenate([self.before[s] + np.arange(self.lengths[s]) for s in self.run])


def make_segments(lengths: Sequence[int], parents: Sequence[int | None], given: int = 0) -> Segments:
    """Segments in an order in which a parent comes before its children; what follows an empty one follows its own."""
    above = np.array([-1 if parent is None else parent for parent in parents], dtype=np.int64)
    assert (above < np.arange(len(above))).all()
    for segment, parent in enumerate(above):
        if parent >= 0 and not lengths[parent]:
            above[segment] = above[parent]
    return Segments(np.array(lengths, dtype=np.int64), above, given)
