"""Token segments that follow one another like branches of trees, packed into one row.

An input follows its soft prompt, a label follows its input. The first segments may be given, which means that their
keys and values are known: they do not run, and others only attend to them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Segments:
    lengths: np.ndarray
    """Tokens of each segment. An empty one (no prompt at all) does not run, and nothing follows it."""
    parents: np.ndarray
    """The segment that each one follows, which stands earlier; -1 at the root of a tree."""
    given: int
    """How many of the first segments do not run."""

    @cached_property
    def run(self) -> list[int]:
        return [segment for segment in range(self.given, len(self.lengths)) if self.lengths[segment]]

    @property
    def given_tokens(self) -> int:
        return int(self.lengths[: self.given].sum())

    @cached_property
    def starts(self) -> np.ndarray:
        """Index of each segment's first token; given segments lie at -G to -1."""
        # Counted so that 0 is the first token that runs: hidden states exist for those alone.
        return np.cumsum(self.lengths) - self.lengths - self.given_tokens

    @cached_property
    def before(self) -> np.ndarray:
        """Tokens of each segment's ancestors."""
        before = np.zeros_like(self.lengths)
        # A parent comes before its children, so its own count is ready.
        for segment, parent in enumerate(self.parents):
            if parent >= 0:
                before[segment] = before[parent] + self.lengths[parent]
        return before

    def places(self) -> list[np.ndarray]:
        """Indices of the tokens of each segment."""
        return [np.arange(start, start + n) for start, n in zip(self.starts, self.lengths, strict=True)]

    def chains(self) -> list[list[int]]:
        """Each segment behind all its ancestors, the root first."""
        chains: list[list[int]] = []
        for segment, parent in enumerate(self.parents):
            chains.append([*(chains[parent] if parent >= 0 else []), segment])
        return chains

    def positions(self) -> np.ndarray:
        """`[N]` position of each token that runs, as if it stood right behind its ancestors."""
        return np.concatenate([self.before[s] + np.arange(self.lengths[s]) for s in self.run])

    def all_positions(self) -> np.ndarray:
        """`[G + N]`: those of given segments too, which come first."""
        return np.concatenate([before + np.arange(n) for before, n in zip(self.before, self.lengths, strict=True)])


def make_segments(lengths: Sequence[int], parents: Sequence[int | None], given: int = 0) -> Segments:
    """Check the order of segments, and lift what follows an empty segment to that segment's own parent."""
    above = np.array([-1 if parent is None else parent for parent in parents], dtype=np.int64)
    assert (above < np.arange(len(above))).all()
    for segment, parent in enumerate(above):
        if parent >= 0 and not lengths[parent]:
            above[segment] = above[parent]
    return Segments(np.array(lengths, dtype=np.int64), above, given)
