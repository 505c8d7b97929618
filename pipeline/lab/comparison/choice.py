"""Choose by the mean dev metric over seeds, and by nothing else.

A choice cannot depend on test rows: a `MeasuredCandidate` has no test metric, and ranks that tune do not get the test
split (`study`).
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
    """Mean and spread of one figure over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for a single value."""


@dataclass(frozen=True)
class SeedGroup:
    """Candidates that differ only in their seed."""

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
    def succeeded(self) -> tuple[MeasuredCandidate, ...]:
        """The members that did not fail."""
        return tuple(member for member in self.members if member.failed is None)

    def best(self, metric: str) -> MeasuredCandidate | None:
        """The member with the best dev metric; the first one of equals."""
        return max(self.succeeded, key=lambda m: goodness(metric, m.value, m.loss), default=None)


def spread(values: Sequence[float]) -> Spread | None:
    """Mean and sample standard deviation; None without values."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(statistics.fmean(values), deviation)


def group_over_seeds(measured: Iterable[MeasuredCandidate]) -> list[SeedGroup]:
    """Groups in the order of their first members."""
    found: dict[tuple[str, str, str], list[MeasuredCandidate]] = {}
    for one in measured:
        found.setdefault(one.candidate.group, []).append(one)
    return [SeedGroup(tuple(members)) for members in found.values()]


def choose_best(groups: Iterable[SeedGroup], metrics: Mapping[str, str]) -> dict[tuple[str, str], SeedGroup]:
    """By (method, task), the group with the best mean dev metric; the first one of equals.

    metrics: by task. A group with a failed seed is chosen only where every group has one.
    """
    chosen: dict[tuple[str, str], SeedGroup] = {}
    for group in groups:
        if not group.succeeded:
            continue
        key = (group.method, group.task)
        if key not in chosen or _rank(group, metrics[group.task]) > _rank(chosen[key], metrics[group.task]):
            chosen[key] = group
    return chosen


def _rank(group: SeedGroup, metric: str) -> tuple[bool, tuple[float, float]]:
    value, loss = (
        statistics.fmean(figures) for figures in zip(*((m.value, m.loss) for m in group.succeeded), strict=True)
    )
    best = goodness(metric, value, loss)
    return len(group.succeeded) == len(group.members), best if math.isfinite(value) else (-math.inf, -math.inf)
