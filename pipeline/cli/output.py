"""What the commands print: tables for people, aligned columns for pipes, one JSON document for programs."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import TextIOWrapper
from typing import Any, Literal

import typer

from pipeline.errors import StorageError

Cell = str | int | float | None | tuple[str, str]
"""A text with a style is a tuple; None is what was not measured or does not apply."""
_MOST_FRAMED = 500  # rich takes seconds for thousands of rows, which nobody reads in a frame
_LONGEST_PLACE = 32
_READER_GONE = 141  # what a shell reports of a program that a closed pipe has ended


@dataclass(frozen=True)
class Column:
    name: str
    right: bool = False
    free: bool = False
    """May be folded on a terminal that is too narrow."""
    optional: bool = False
    """Left out on a terminal when it is empty; a pipe always gets it."""


def escape_unencodable() -> None:
    """A sign that the locale lacks is written as an escape, and ends no command."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def on_terminal() -> bool:
    return sys.stdout.isatty()


def write(text: str) -> None:
    """Raises: typer.Exit when nobody reads on, StorageError when it cannot be written."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        # What is left in the buffer would be written once more when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(_READER_GONE) from error
        raise StorageError(f"cannot write the output: {error.strerror or error}") from error


def write_line(text: str) -> None:
    write(printable(text) + "\n")


def write_json(document: Any) -> None:
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")  # what JSON is, whatever the locale
    write(json.dumps(document, ensure_ascii=False, indent=2) + "\n")


def write_error(sentence: str) -> None:
    """One line on stderr."""
    print(printable(" ".join(sentence.split())), file=sys.stderr)


def note(text: str = "") -> None:
    """A line for people alone: neither a pipe nor a JSON document has it."""
    if on_terminal():
        write_line(text)


def printable(text: str) -> str:
    """With control characters written as escapes, so that no text of a bank can steer a terminal."""
    return text if text.isprintable() else "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)


def quoted(text: str) -> str:
    """A text whose spaces and line breaks matter."""
    return json.dumps(text, ensure_ascii=False)


def moment(time: str) -> str:
    """A time as the bank writes it; on a terminal, which is narrow, to the minute."""
    return time[:16].replace("T", " ") if on_terminal() else time


def write_table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    if on_terminal():
        kept = [i for i, column in enumerate(columns) if not column.optional or any(row[i] is not None for row in rows)]
        columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    if on_terminal() and len(rows) <= _MOST_FRAMED:
        _write_framed(columns, rows)
    else:
        texts = [[column.name for column in columns], *([_text(cell, "-") for cell in row] for row in rows)]
        write(_aligned(texts, [column.right for column in columns]))


def write_fields(fields: Sequence[tuple[str, Cell]]) -> None:
    """One `name  value` a line, where there is a value."""
    write(_aligned([[name, _text(cell, "-")] for name, cell in fields if cell is not None], [False, False]))


@contextmanager
def progress(doing: str) -> Iterator[Callable[[str], None]]:
    """Tell on stderr how far a long work has come, if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda place: None
        return
    from rich.console import Console
    from rich.text import Text

    with Console(stderr=True, highlight=False).status(Text(doing)) as status:
        yield lambda place: status.update(Text(f"{doing}: {printable(place)[:_LONGEST_PLACE]}"))


def _write_framed(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.right else "left"
        table.add_column(column.name, justify=justify, overflow="fold", no_wrap=not column.free)
    for row in rows:
        table.add_row(*(Text(_text(cell, "–"), style=cell[1] if isinstance(cell, tuple) else "") for cell in row))
    Console(highlight=False).print(table)


def _aligned(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "".join(f"{line}\n" for line in lines)


def _text(cell: Cell, absent: str) -> str:
    match cell:
        case None:
            return absent
        case float():
            return f"{cell:.3f}"
        case (text, _):
            return printable(text)
        case _:
            return printable(str(cell))
