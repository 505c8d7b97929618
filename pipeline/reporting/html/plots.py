"""Small plots as geometry, which the template `plot.svg.jinja` writes down. Places are in units of the viewBox."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.reporting.html.night import Curve, PastVersion, Series, TaskNight
from pipeline.reporting.html.scale import Axis, Bucket, axis_of, coordinate, thin
from pipeline.reporting.words import figure

WIDTH, HEIGHT = 340, 156
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 330, 8, 134
_POINTS, _POINTS_OF_OTHERS, _POINTS_OF_SPARK = 140, 40, 32
MOST_OTHERS = 24
"""Trials of a sweep drawn beside the best one."""


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Dot:
    x: float
    y: float
    kind: str
    text: str
    """The tooltip."""


@dataclass(frozen=True)
class Plot:
    title: str
    """A description for readers who cannot see the plot."""
    width: float
    height: float
    lines: Sequence[tuple[str, str]] = ()
    """(kind, path data), drawn in this order."""
    dots: Sequence[Dot] = ()
    x_ticks: Sequence[Tick] = ()
    y_ticks: Sequence[Tick] = ()


def loss_plot(task: TaskNight) -> Plot | None:
    """Training loss over steps: the best trial's mean with its range, other trials as thin lines behind it."""
    shown, others = _shown(task)
    buckets = thin(shown.losses, _POINTS)
    behind = [thin(curve.losses, _POINTS_OF_OTHERS) for curve in others]
    means = [b.mean for part in (buckets, *behind) for b in part if b.mean is not None]
    if not means:
        return None
    ranges = [edge for b in buckets if b.mean is not None for edge in (b.low, b.high)]
    y = axis_of([*means, *ranges], _BOTTOM, _TOP, may_be_log=True)
    x = _steps([buckets, *behind])
    lines = [("other", _path(part, x, y)) for part in behind]
    lines += [("range", _band(buckets, x, y)), ("loss", _path(buckets, x, y))]
    scale = ", logarithmic scale" if y.log else ""
    title = f"Training loss of {task.name}{scale}: {_ends(shown.losses)}"
    return _framed(title, lines, (), x, y)


def metric_plot(task: TaskNight) -> Plot | None:
    """Dev metric of every evaluation, and a dashed line for the prompt that was in the bank."""
    shown, others = _shown(task)
    drawn = [thin(curve.evaluations, _POINTS) for curve in (shown, *others)]
    means = [bucket.mean for part in drawn for bucket in part if bucket.mean is not None]
    if not means:
        return None
    y = axis_of([*means, *([task.incumbent] if task.incumbent is not None else [])], _BOTTOM, _TOP)
    x = _steps(drawn)
    lines = [("other", _path(part, x, y)) for part in drawn[1:]]
    if task.incumbent is not None:
        level = coordinate(y.place(task.incumbent))
        lines.append(("incumbent", f"M{_LEFT},{level}H{_RIGHT}"))
    lines.append(("metric", _path(drawn[0], x, y)))
    dots = [
        Dot(x.place(b.step), y.place(b.mean), "metric", f"step {b.step:.0f}: {figure(b.mean)}")
        for b in drawn[0]
        if b.mean is not None
    ]
    against = "" if task.incumbent is None else f"; dashed, the prompt that was in the bank: {figure(task.incumbent)}"
    title = f"Dev {task.metric} of {task.name}: {_ends(shown.evaluations)}{against}"
    return _framed(title, lines, dots, x, y)


def history_plot(task: TaskNight) -> Plot | None:
    """The metric in the last versions of the bank."""
    known = [(place, past, past.value) for place, past in enumerate(task.history) if past.value is not None]
    if not known:
        return None
    y = axis_of([value for *_, value in known], _BOTTOM, _TOP)
    x = Axis(-0.4, max(len(task.history) - 0.6, 0.4), _LEFT, _RIGHT)
    line = "M" + "L".join(f"{coordinate(x.place(place))},{coordinate(y.place(value))}" for place, _, value in known)
    dots = [
        Dot(x.place(place), y.place(value), "tuned" if past.status == "tuned" else "carried", _told(past))
        for place, past, value in known
    ]
    ticks = [Tick(x.place(place), str(past.version)) for place, past in enumerate(task.history)]
    told = ", ".join(_told(past) for past in task.history)
    title = f"Dev {task.metric} of {task.name} in the last versions: {told}"
    return Plot(title, WIDTH, HEIGHT, [("history", line)], dots, ticks, _y_ticks(y))


def history_spark(task: TaskNight) -> Plot | None:
    """The metric in the last versions, small enough for a row of a table."""
    values = [past.value for past in task.history]
    known = [(place, value) for place, value in enumerate(values) if value is not None]
    if len(known) < 2:
        return None
    x, y = Axis(0, len(values) - 1, 4, 76), axis_of([value for _, value in known], 18, 4)
    line = "M" + "L".join(f"{coordinate(x.place(place))},{coordinate(y.place(value))}" for place, value in known)
    place, value = known[-1]
    title = f"Last versions: {', '.join(map(figure, values))}"
    return Plot(title, 80, 22, [("history", line)], [Dot(x.place(place), y.place(value), "tuned", title)])


def loss_spark(task: TaskNight) -> Plot | None:
    shown, _ = _shown(task)
    buckets = [bucket for bucket in thin(shown.losses, _POINTS_OF_SPARK) if bucket.mean is not None]
    if len(buckets) < 2:
        return None
    y = axis_of([bucket.mean for bucket in buckets if bucket.mean is not None], 26, 3, may_be_log=True)
    x = Axis(buckets[0].step, buckets[-1].step, 2, 118)
    first, last = buckets[0].mean, buckets[-1].mean
    return Plot(f"Training loss: {figure(first)} to {figure(last)}", 120, 30, [("loss", _path(buckets, x, y))])


def undrawn(task: TaskNight) -> int:
    """Trials of a sweep that the plots leave out."""
    return max(0, len(task.curves) - 1 - MOST_OTHERS)


def _shown(task: TaskNight) -> tuple[Curve, list[Curve]]:
    """The task's best curve, and other trials' curves to draw behind it."""
    if not task.curves:
        return Curve(task.name), []
    shown = next((curve for curve in task.curves if curve.best), task.curves[0])
    return shown, [curve for curve in task.curves if curve is not shown][:MOST_OTHERS]


def _steps(drawn: Sequence[Sequence[Bucket]]) -> Axis:
    last = max((part[-1].step for part in drawn if part), default=1.0)
    return Axis(0, max(last, 1.0), _LEFT, _RIGHT)


def _framed(title: str, lines: Sequence[tuple[str, str]], dots: Sequence[Dot], x: Axis, y: Axis) -> Plot:
    x_ticks = [Tick(x.place(tick), f"{tick:,.0f}") for tick in x.ticks if tick == round(tick)]
    return Plot(title, WIDTH, HEIGHT, [(kind, path) for kind, path in lines if path], dots, x_ticks, _y_ticks(y))


def _y_ticks(y: Axis) -> list[Tick]:
    if y.log:
        return [Tick(y.place(tick), f"{tick:g}") for tick in y.ticks]
    digits = max(0, min(6, -math.floor(math.log10(y.step) + 1e-9)))
    return [Tick(y.place(tick), f"{tick:,.{digits}f}".replace("-", "−")) for tick in y.ticks]


def _path(buckets: Sequence[Bucket], x: Axis, y: Axis) -> str:
    """A line through the means, with a gap wherever there is none; a lone point is a short dash."""
    parts, pen = [], "M"
    for bucket in buckets:
        if bucket.mean is None:
            pen = "M"
            continue
        parts.append(f"{pen}{coordinate(x.place(bucket.step))},{coordinate(y.place(bucket.mean))}")
        pen = "L"
    return "".join(parts) + ("h1" if len(parts) == 1 else "")


def _band(buckets: Sequence[Bucket], x: Axis, y: Axis) -> str:
    """The area between the least and the greatest value of each bucket; empty when every bucket is one value."""
    known = [bucket for bucket in buckets if bucket.mean is not None]
    if all(bucket.low == bucket.high for bucket in known):
        return ""
    above = [f"{coordinate(x.place(b.step))},{coordinate(y.place(b.high))}" for b in known]
    below = [f"{coordinate(x.place(b.step))},{coordinate(y.place(b.low))}" for b in reversed(known)]
    return "M" + "L".join([*above, *below]) + "Z"


def _ends(series: Series) -> str:
    """Where a series starts and ends, in words."""
    told = [f"{figure(value)} at step {step}" for step, value in (*series[:1], *series[-1:])]
    return ", ".join(dict.fromkeys(told))


def _told(past: PastVersion) -> str:
    return f"version {past.version}: {figure(past.value)} ({past.status.replace('_', ' ')})"
