"""A stretch of text -> an input and a target. Pure functions of the tokens and a random generator.

Shapes: T tokens of the stretch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.settings import ObjectiveSettings

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Markers:
    """Token ids of special tokens."""

    eos: int
    sentinels: Sequence[int]
    """Ids of `<extra_id_0>`, `<extra_id_1>`, …; the first one stands for the first span."""


@dataclass(frozen=True)
class TrainingExample:
    input: Ids
    """Ends with eos, like the input of a task."""
    target: Ids
    """Ends with eos."""


def make_example(
    objective: ObjectiveSettings, tokens: Ids, markers: Markers, random: np.random.Generator
) -> TrainingExample:
    """One example of `[T]` tokens, T at least 2."""
    if objective.name == "prefix_lm":
        return prefix_lm(tokens, int(random.integers(1, len(tokens))), markers)
    noise = noise_mask(len(tokens), objective.noise_density, objective.mean_span, random)
    return span_corruption(tokens, noise, markers, objective.sentinels_in_targets)


def prefix_lm(tokens: Ids, prefix: int, markers: Markers) -> TrainingExample:
    """The first `prefix` tokens are the input, the others the target: Lester et al. (2021, section 3.2) adapt T5 so.

    `make_example` draws the split uniformly, as in Raffel et al. (2020, section 3.3.1).
    """
    return TrainingExample(_ended(tokens[:prefix], markers), _ended(tokens[prefix:], markers))


def span_corruption(
    tokens: Ids, noise: npt.NDArray[np.bool_], markers: Markers, sentinels_in_targets: bool
) -> TrainingExample:
    """A sentinel replaces each span of noise in the input, and stands before that span in the target (Raffel et al.
    2020, section 3.1.4).

    `noise` `[T]` begins with text and ends with noise, as in T5's own code, so that no last sentinel follows.
    """
    begins = noise & ~np.r_[False, noise[:-1]]
    sentinels = np.asarray(markers.sentinels, np.int64)[: begins.sum()]
    marked = tokens.astype(np.int64)
    marked[begins] = sentinels
    shown = marked[~noise | begins]
    said = tokens[noise].astype(np.int64)
    if sentinels_in_targets:
        said = np.insert(said, np.flatnonzero(begins[noise]), sentinels)
    return TrainingExample(_ended(shown, markers), _ended(said, markers))


def noise_mask(length: int, density: float, mean_span: float, random: np.random.Generator) -> npt.NDArray[np.bool_]:
    """`[length]`: True for noise. Spans of text and of noise alternate, with lengths drawn as in T5."""
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(span_count(length, density, mean_span), length - noise)
    text_lengths, noise_lengths = _parts(length - noise, spans, random), _parts(noise, spans, random)
    lengths = np.stack([text_lengths, noise_lengths], 1).ravel()
    return np.repeat(np.tile([False, True], spans), lengths)


def span_count(length: int, density: float, mean_span: float) -> int:
    """The largest number of noise spans among `length` tokens."""
    noise = min(max(round(length * density), 1), length - 1)
    return max(1, round(noise / mean_span))


def _parts(total: int, count: int, random: np.random.Generator) -> Ids:
    """`[count]` integers of at least 1 that sum to `total`, every such list equally likely."""
    cuts = np.sort(random.choice(total - 1, count - 1, replace=False)) + 1
    return np.diff(np.r_[0, cuts, total]).astype(np.int64)


def _ended(tokens: Ids, markers: Markers) -> Ids:
    return np.append(tokens, markers.eos).astype(np.int64)
