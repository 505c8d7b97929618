"""Drawings as geometry: `drawing.svg.jinja` only writes them down. Places are in units of the viewBox."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

SHAPES = ("circle", "square", "diamond", "up", "down")
"""Of marks: what tells methods apart beside their colour."""


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
    """What it says under the pointer."""


@dataclass(frozen=True)
class Label:
    x: float
    y: float
    text: str
    anchor: Literal["start", "middle", "end"] = "start"
    kind: str = ""


@dataclass(frozen=True)
class Cell:
    """Of a heat map."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    strength: float
    """0 to 1"""
    text: str
    """What it says under the pointer."""


@dataclass(frozen=True)
class Drawing:
    title: str
    """All that a reader needs who does not see it."""
    width: float
    height: float
    lines: Sequence[Line] = ()
    """The first lie behind."""
    marks: Sequence[Mark] = ()
    labels: Sequence[Label] = ()
    cells: Sequence[Cell] = ()


def mark(kind: str, shape: str, x: float, y: float, size: float, text: str) -> Mark:
    """size: half its width."""
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


def coordinate(place: float) -> str:
    """With one digit, which is a fifth of a pixel on the finest screen."""
    return f"{place:.1f}".removesuffix(".0")
