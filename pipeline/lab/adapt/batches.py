"""The stretches of text of each step, and the examples made of them, as a pure function of (seed, step)."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipeline.corpus.token_set import Int32
from pipeline.errors import CorpusError
from pipeline.lab.adapt.objectives import Markers, make_example
from pipeline.lab.full_weights.step import Examples
from pipeline.settings import ObjectiveSettings
from pipeline.tuning.trials import random_numbers


@dataclass(frozen=True)
class TextBatches:
    text: Int32
    """The tokens `[N]` of all documents, one after the other."""
    tokens: int
    """Tokens of a stretch."""
    batch_size: int
    objective: ObjectiveSettings
    markers: Markers
    seed: int

    def __post_init__(self) -> None:
        if len(self.text) < self.tokens:
            raise CorpusError(
                f"corpus: it has {len(self.text)} tokens, less than one stretch of {self.tokens} ('tokens'); give more "
                "text or lower it"
            )

    def examples(self, step: int) -> Examples:
        """The examples of a step. Each epoch takes all stretches in its own random order."""
        stretches = len(self.text) // self.tokens
        made = []
        for place in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, within = divmod(place, stretches)
            first = int(_epoch_order(self.seed, stretches, epoch)[within]) * self.tokens
            stretch = self.text[first : first + self.tokens].astype(np.int64)
            made.append(
                make_example(self.objective, stretch, self.markers, random_numbers(self.seed, "example", place))
            )
        return Examples([example.input for example in made], [example.target for example in made])


@lru_cache(maxsize=4)
def _epoch_order(seed: int, stretches: int, epoch: int) -> np.ndarray:
    return random_numbers(seed, "stretches", epoch).permutation(stretches)
