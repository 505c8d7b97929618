"""The plots of a comparison. They show every seed, the mean, and one standard deviation to each side."""

import math
from collections.abc import Sequence

from pipeline.lab.comparison.candidates import METHODS
from pipeline.lab.comparison.page.drawing import SHAPES, Drawing, Label, Line, Mark, mark
from pipeline.lab.comparison.results import EnsembleRow, Mean, Panel, Results, ShiftRow, with_spread
from pipeline.reporting.html.scale import Axis, axis_of, coordinate
from pipeline.reporting.words import figure

WIDTH = 340
_ROW = 26
_LEFT, _RIGHT = 132, 322
_PANEL_LEFT, _PANEL_BOTTOM, _PANEL_TOP = 46, 150, 12


Strip = tuple[str, str, str, Mean]
"""Label, kind, shape, mean."""


def method_class(method: str) -> str:
    """The CSS class with the method's colour."""
    return f"m{METHODS.index(method)}"


def method_shape(method: str) -> str:
    return SHAPES[METHODS.index(method) % len(SHAPES)]


def method_plot(results: Results, task: str) -> Drawing | None:
    """Every method's best choice on a task: the test metric, or dev where the task has no test split."""
    rows = [row for row in results.rows if row.task == task and row.chosen]
    split = "test" if any(row.test for row in rows) else "dev"
    shown = [(row, mean) for row in rows if (mean := row.test if split == "test" else row.dev) is not None]
    if not shown:
        return None
    strips = [_strip(row.method, mean) for row, mean in shown]
    summary = "; ".join(f"{label} {with_spread(mean)}" for label, _, _, mean in strips)
    return _strips(f"{split} {results.metric(task)} of {task} by method: {summary}", strips)


def shift_plot(rows: Sequence[ShiftRow], on: str, metric: str) -> Drawing | None:
    """Candidates that were trained on another task, on one task's test rows."""
    shown = [row for row in rows if row.on == on]
    if not shown:
        return None
    strips = [_strip(row.method, row.test) for row in shown]
    summary = "; ".join(f"{row.method} {with_spread(row.test)}" for row in shown)
    return _strips(f"test {metric} on {on}, trained on {shown[0].trained_on}: {summary}", strips)


def ensemble_plot(row: EnsembleRow, metric: str) -> Drawing:
    """Single seeds beside all of them together."""
    alone = Mean(row.best, None, ())
    strips: list[Strip] = [
        ("one seed", "m1", "circle", row.members),
        ("best on dev", "m1", "circle", alone),
    ]
    for label, value in (("average", row.average), ("majority", row.majority)):
        if value is not None:
            strips.append((label, "m3", "diamond", Mean(value, None, ())))
    summary = "; ".join(f"{label} {with_spread(mean)}" for label, _, _, mean in strips)
    return _strips(f"{row.split} {metric} of {row.task}, {len(row.seeds)} prompts: {summary}", strips)


def _strip(method: str, mean: Mean) -> Strip:
    return method, method_class(method), method_shape(method), mean


def _strips(title: str, strips: Sequence[Strip]) -> Drawing:
    """One strip for each entry, over a common axis below them."""
    values = [value for *_, mean in strips for value in (*ends(mean), *mean.values)]
    x = axis_of(values, _LEFT, _RIGHT)
    bottom = 10 + _ROW * len(strips)
    lines = [Line("grid", f"M{coordinate(x.place(tick))},6V{bottom}") for tick in x.ticks]
    labels = [Label(x.place(tick), bottom + 15, tick_text(x, tick), "middle") for tick in x.ticks]
    marks: list[Mark] = []
    for place, (label, kind, shape, mean) in enumerate(strips):
        y = 10 + _ROW * (place + 0.5)
        labels.append(Label(_LEFT - 10, y + 4, label, "end", "name"))
        if mean.deviation is not None:
            low, high = (x.place(value) for value in ends(mean))
            lines.append(Line(f"whisker {kind}", f"M{coordinate(low)},{coordinate(y)}H{coordinate(high)}"))
        marks += [mark(f"seed {kind}", "circle", x.place(v), y, 2.4, f"seed {s}: {figure(v)}") for s, v in mean.each]
        marks.append(mark(f"mean {kind}", shape, x.place(mean.mean), y, 4.6, f"{label}: {with_spread(mean)}"))
    return Drawing(title, WIDTH, bottom + 22, lines, marks, labels)


def panel_plot(panel: Panel, task: str, results: Results) -> Drawing | None:
    """The metric over one swept key's values: numbers by size, others in the order in which they were given."""
    points = [point for point in panel.points if point.task == task]
    numeric = all(is_number(point.value) for point in points)
    if numeric:
        points.sort(key=lambda point: point.value)
    means = [point.test or point.dev for point in points]
    if not points:
        return None
    split = "test" if points[0].test else "dev"
    values = [value for mean in means for value in (*ends(mean), *mean.values)]
    y = axis_of(values, _PANEL_BOTTOM, _PANEL_TOP)
    step = (WIDTH - 10 - _PANEL_LEFT) / len(points)
    places = [_PANEL_LEFT + step * (i + 0.5) for i in range(len(points))]
    lines = [Line("grid", f"M{_PANEL_LEFT},{coordinate(y.place(tick))}H{WIDTH - 10}") for tick in y.ticks]
    labels = [Label(_PANEL_LEFT - 5, y.place(tick) + 4, tick_text(y, tick), "end") for tick in y.ticks]
    if numeric and len(points) > 1:
        path = "M" + "L".join(
            f"{coordinate(at)},{coordinate(y.place(m.mean))}" for at, m in zip(places, means, strict=True)
        )
        lines.append(Line("through m1", path))
    marks: list[Mark] = []
    for at, point, mean in zip(places, points, means, strict=True):
        low, high = (y.place(value) for value in ends(mean))
        lines.append(Line("whisker m1", f"M{coordinate(at)},{coordinate(low)}V{coordinate(high)}"))
        marks += [mark("seed m1", "circle", at + 7, y.place(v), 2.4, f"seed {s}: {figure(v)}") for s, v in mean.each]
        marks.append(
            mark("mean m1", "circle", at, y.place(mean.mean), 4.2, f"{point.written_choice}: {with_spread(mean)}")
        )
        labels.append(Label(at, _PANEL_BOTTOM + 17, short(str(point.value), step), "middle"))
    summary = "; ".join(f"{point.value}: {with_spread(mean)}" for point, mean in zip(points, means, strict=True))
    title = f"{split} {results.metric(task)} of {task} over {panel.key}: {summary}"
    return Drawing(title, WIDTH, _PANEL_BOTTOM + 24, lines, marks, labels)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def short(text: str, width: float) -> str:
    """The text, cut to the width; a letter is about 6 units wide."""
    room = max(3, int(width / 6))
    text = text.replace("_", " ")
    return text if len(text) <= room else text[: room - 1] + "…"


def ends(mean: Mean) -> tuple[float, float]:
    half = mean.deviation or 0.0
    return mean.mean - half, mean.mean + half


def tick_text(axis: Axis, value: float) -> str:
    digits = max(0, min(6, -math.floor(math.log10(axis.step) + 1e-9)))
    return f"{value:,.{digits}f}".replace("-", "−")
