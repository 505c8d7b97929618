"""Reduces a series to few points, and maps values to places on an axis."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting.html.night import Series

_LOG_FROM = 50.0
"""An axis is logarithmic when its greatest value is so many times its least: a spike would flatten the rest."""


@dataclass(frozen=True)
class Bucket:
    """Neighbouring steps of a series, drawn as one point."""

    step: float
    mean: float | None
    """None when no value is finite; the line then has a gap."""
    low: float
    high: float


def thin(series: Series, most: int) -> list[Bucket]:
    """At most `most` buckets of equally many points, each with its mean and its range."""
    width = max(1, math.ceil(len(series) / most))
    return [_bucket(series[start : start + width]) for start in range(0, len(series), width)]


def _bucket(part: Series) -> Bucket:
    step = sum(step for step, _ in part) / len(part)
    values = [value for _, value in part if value is not None and math.isfinite(value)]
    if not values:
        return Bucket(step, None, 0.0, 0.0)
    return Bucket(step, sum(values) / len(values), min(values), max(values))


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` at places from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = (math.log(each) for each in (low, high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        """Round numbers within the axis; at least one."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            found = [10.0**power for power in powers][:: max(1, len(powers) // 4)]
            return found or [self.low, self.high]
        return [number * self.step for number in self._numbers(self.step)]

    @property
    def step(self) -> float:
        """Between linear ticks: the greatest of 1, 2, 5 × a power of ten that gives three ticks or more."""
        power = 10.0 ** math.ceil(math.log10(self.high - self.low))
        steps = (factor * power / 10**smaller for smaller in range(3) for factor in (5, 2, 1))
        return next(step for step in steps if len(self._numbers(step)) >= 3)

    def _numbers(self, step: float) -> range:
        return range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)


def axis_of(values: Sequence[float], start: float, end: float, may_be_log: bool = False) -> Axis:
    """An axis that covers the values with a little room, also when they are all the same."""
    low, high = min(values), max(values)
    if may_be_log and low > 0 and high / low > _LOG_FROM:
        return Axis(low / 1.2, high * 1.2, start, end, log=True)
    largest = max(abs(low), abs(high))
    # Differences near a float's precision are not stretched to the whole height.
    room = max(0.06 * (high - low), 1e-6 * largest, 1e-9) if high > low else 0.1 * largest or 0.1
    return Axis(low - room, high + room, start, end)


def coordinate(place: float) -> str:
    """A coordinate with one digit, which is a fifth of a pixel on the finest screen."""
    return f"{place:.1f}".removesuffix(".0")
