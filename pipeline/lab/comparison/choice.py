"""Choosing: on the mean dev metric over seeds, and on nothing else.

What is chosen from (`MeasuredCandidate`) has no test metric to look at, and tuning ranks are not given the test split
(`study`): that a choice follows from test rows is not forbidden, but impossible.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.lab.comparison.candidates import MeasuredCandidate
from pipeline.tuning.metrics import goodness


@dataclass(frozen=True)
class Spread:
    """Of one figure over seeds."""

    mean: float
    deviation: float | None
    """Standard deviation of a sample; None of a single one."""


@dataclass(frozen=True)
class SeedGroup:
    """Candidates that differ in their seed alone."""

    members: tuple[MeasuredCandidate, ...]

    @property
    def method(self) -> str:
        return self.members[0].candidate.method

    @property
    def task(self) -> str:
        return self.members[0].candidate.task

    @property
    def choice(self) -> Mapping[str, Any]:
        return self.members[0].candidate.choice

    @property
    def whole(self) -> tuple[MeasuredCandidate, ...]:
        """The members that did not fail."""
        return tuple(member for member in self.members if member.failed is None)

    def best(self, metric: str) -> MeasuredCandidate | None:
        """The member with the best dev metric, the first of equals."""
        return max(self.whole, key=lambda m: goodness(metric, m.value, m.loss), default=None)


def spread(values: Sequence[float]) -> Spread | None:
    """None of nothing."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation)


def group_by_seed(measured: Iterable[MeasuredCandidate]) -> list[SeedGroup]:
    """In the order in which the groups' first members come."""
    found: dict[tuple[str, str, str], list[MeasuredCandidate]] = {}
    for one in measured:
        found.setdefault(one.candidate.group, []).append(one)
    return [SeedGroup(tuple(members)) for members in found.values()]


def choose_best(groups: Iterable[SeedGroup], metrics: Mapping[str, str]) -> dict[tuple[str, str], SeedGroup]:
    """By (method, task), the group with the best mean dev metric, the first of equals.

    metrics: of each task. A group of which a seed failed is taken only where every group has one.
    """
    chosen: dict[tuple[str, str], SeedGroup] = {}
    for group in groups:
        if not group.whole:
            continue
        key = (group.method, group.task)
        if key not in chosen or _rank(group, metrics[group.task]) > _rank(chosen[key], metrics[group.task]):
            chosen[key] = group
    return chosen


def _rank(group: SeedGroup, metric: str) -> tuple[bool, tuple[float, float]]:
    value, loss = (statistics.fmean(figures) for figures in zip(*((m.value, m.loss) for m in group.whole), strict=True))
    best = goodness(metric, value, loss)
    return len(group.whole) == len(group.members), best if math.isfinite(value) else (-math.inf, -math.inf)
