"""Drawings as geometry, which `drawing.svg.jinja` only writes down. Coordinates are in units of the viewBox."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.reporting.html.scale import coordinate

SHAPES = ("circle", "square", "diamond", "up", "down")
"""Shapes of marks, which tell methods apart beside their colours."""


@dataclass(frozen=True)
class Line:
    kind: str
    path: str


@dataclass(frozen=True)
class Mark:
    """A point of the plot, as a path around it."""

    kind: str
    path: str
    text: str
    """Its tooltip."""


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    kind: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell of a heat map."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    strength: float
    """0 to 1"""
    text: str
    """Its tooltip."""


@dataclass(frozen=True)
class Drawing:
    title: str
    """A text alternative, for readers who cannot see the drawing."""
    width: float
    height: float
    lines: Sequence[Line] = ()
    """Earlier ones are drawn below later ones."""
    marks: Sequence[Mark] = ()
    labels: Sequence[Label] = ()
    cells: Sequence[Cell] = ()


def mark(kind: str, shape: str, x: float, y: float, size: float, text: str) -> Mark:
    """A mark around a point; size: half of its width."""
    s, w = coordinate(size), coordinate(2 * size)
    paths = {
        "circle": f"M{coordinate(x - size)},{coordinate(y)}a{s},{s} 0 1,0 {w},0a{s},{s} 0 1,0 -{w},0z",
        "square": f"M{coordinate(x - size)},{coordinate(y - size)}h{w}v{w}h-{w}z",
        "diamond": f"M{coordinate(x)},{coordinate(y - 1.3 * size)}l{coordinate(1.3 * size)},{coordinate(1.3 * size)}"
        f"l-{coordinate(1.3 * size)},{coordinate(1.3 * size)}l-{coordinate(1.3 * size)},-{coordinate(1.3 * size)}z",
        "up": f"M{coordinate(x)},{coordinate(y - 1.2 * size)}l{coordinate(1.2 * size)},{coordinate(2.2 * size)}"
        f"h-{coordinate(2.4 * size)}z",
        "down": f"M{coordinate(x)},{coordinate(y + 1.2 * size)}l{coordinate(1.2 * size)},-{coordinate(2.2 * size)}"
        f"h-{coordinate(2.4 * size)}z",
    }
    return Mark(kind, paths[shape], text)
