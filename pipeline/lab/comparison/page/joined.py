"""The page of joined comparisons: one plot and one table for each panel."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from pipeline.lab.comparison.joined import JoinedPlot
from pipeline.lab.comparison.page.drawing import SHAPES, Drawing, Label, Line, Mark, mark
from pipeline.lab.comparison.page.markdown import table
from pipeline.lab.comparison.page.plots import ends, is_number, short, tick_text
from pipeline.lab.comparison.page.render import OWN_TEMPLATES, seeds
from pipeline.lab.comparison.results import with_spread
from pipeline.reporting.html.pages import environment, own_texts
from pipeline.reporting.html.scale import axis_of, coordinate
from pipeline.reporting.words import figure

_WIDTH, _LEFT, _BOTTOM, _TOP = 400, 46, 190, 34
_COLOURS = ("m1", "m4", "m3", "m2", "m0")


def render_joined(title: str, plots: Sequence[JoinedPlot]) -> str:
    """The page as HTML that needs no other file."""
    page = environment(OWN_TEMPLATES)
    page.filters |= {"spread": with_spread, "seeds": seeds}
    return page.get_template("joined.html.jinja").render(
        title=title,
        plots=[(plot, joined_plot(plot)) for plot in plots],
        **own_texts(OWN_TEMPLATES, ["night.css", "comparison.css"], []),
    )


def joined_markdown(title: str, plots: Sequence[JoinedPlot]) -> str:
    parts = [f"# {title}"]
    for plot in plots:
        rows = [
            [line, str(point.value), point.choice, with_spread(plot.shown(point)), seeds(point.dev)]
            for line, points in plot.lines.items()
            for point in points
        ]
        parts.append(f"## {plot.title}")
        parts.append(
            table(["", plot.axis, "best choice there", f"{plot.split} {plot.metric} of {plot.task}", "seeds"], rows)
        )
    return "\n\n".join(parts) + "\n"


def joined_plot(plot: JoinedPlot) -> Drawing:
    """One line for each size, for example. Marks at the same value stand side by side."""
    points = list(chain.from_iterable(plot.lines.values()))
    values: list[Any] = list({repr(point.value): point.value for point in points}.values())
    if all(map(is_number, values)):  # by size; other values as they are first met
        values.sort()
    rank = {repr(value): place for place, value in enumerate(values)}
    means = [plot.shown(point) for point in points]
    y = axis_of([value for mean in means for value in (*ends(mean), *mean.values)], _BOTTOM, _TOP)
    step = (_WIDTH - 12 - _LEFT) / len(values)
    middle = {repr(value): _LEFT + step * (i + 0.5) for i, value in enumerate(values)}
    lines = [Line("grid", f"M{_LEFT},{coordinate(y.place(tick))}H{_WIDTH - 12}") for tick in y.ticks]
    labels = [Label(_LEFT - 5, y.place(tick) + 4, tick_text(y, tick), "end") for tick in y.ticks]
    labels += [
        Label(at, _BOTTOM + 17, short(str(v), step), "middle") for v, at in zip(values, middle.values(), strict=True)
    ]
    marks: list[Mark] = []
    for place, (line, own) in enumerate(plot.lines.items()):
        colour, shape = _COLOURS[place % len(_COLOURS)], SHAPES[place % len(SHAPES)]
        aside = (place - (len(plot.lines) - 1) / 2) * min(10.0, step / (len(plot.lines) + 1))
        ordered = sorted(own, key=lambda point: rank[repr(point.value)])
        places = [(middle[repr(point.value)] + aside, plot.shown(point)) for point in ordered]
        if len(places) > 1 and all(map(is_number, values)):
            path = "M" + "L".join(f"{coordinate(x)},{coordinate(y.place(mean.mean))}" for x, mean in places)
            lines.append(Line(f"through {colour}", path))
        for x, mean in places:
            low, high = (coordinate(y.place(end)) for end in ends(mean))
            lines.append(Line(f"whisker {colour}", f"M{coordinate(x)},{low}V{high}"))
            marks += [mark(f"seed {colour}", "circle", x, y.place(v), 2.4, f"seed {s}: {v:.3f}") for s, v in mean.each]
            marks.append(mark(f"mean {colour}", shape, x, y.place(mean.mean), 4.2, f"{line}: {with_spread(mean)}"))
        at = _LEFT + 6 + place * (_WIDTH - _LEFT) / max(2, len(plot.lines))
        marks.append(mark(f"mean {colour}", shape, at, 14, 4.2, line))
        labels.append(Label(at + 9, 18, short(line, (_WIDTH - _LEFT) / max(2, len(plot.lines)) - 16), "start", "name"))
    summary = "; ".join(
        f"{line} {', '.join(figure(plot.shown(p).mean) for p in own)}" for line, own in plot.lines.items()
    )
    over = "" if plot.axis == plot.title else f" over {plot.axis}"
    title = f"{plot.split} {plot.metric} of {plot.task}{over}: {summary}"
    return Drawing(title, _WIDTH, _BOTTOM + 24, lines, marks, labels)
