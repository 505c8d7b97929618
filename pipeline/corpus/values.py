"""A column's values -> texts, which must be the same in every file and split of a task, whatever type stores them."""

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.source_files import ParquetSource, SourceFile
from pipeline.errors import CorpusError

MOST_CELL_BYTES = 16 * 2**20
# Above it, Python and numpy write floats with an exponent.
_PLAIN_FLOATS = 1e16
# Up to this scale Python writes every decimal without an exponent.
_PLAIN_SCALE = 6


class OverLong(str):
    """Stands for a cell that is too long to be held: its size and digest in place of its text."""


def is_text(kind: pa.DataType) -> bool:
    """Strings of any width."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_printable(kind: pa.DataType) -> bool:
    """Whether values of the type have a text: strings, numbers, booleans; not dates, bytes and nested ones."""
    kind = plain_type(kind)
    checks = pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null
    return is_text(kind) or any(check(kind) for check in checks)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """The type of a column's values; for a dictionary column, the type of the dictionary's values."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def value_text(value: Any) -> str:
    """The text of one value: decimals without an exponent, others by `str`."""
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def column_texts(column: pa.Array, as_integers: bool = False) -> list[str | None]:
    """[B] values -> [B] texts: strings as they are, floats as short as their width allows; null and NaN are None.

    as_integers: write floats as integers.
    Raises: UnicodeDecodeError when a string is not UTF-8; ValueError for a fraction where `as_integers` is asked.
    """
    # NaN is no value, as in pandas, which writes missing numbers so: it fails its own comparison below.
    kind = plain_type(column.type)
    if is_text(kind):
        return _strings(column)
    values = column.to_pylist()
    write = _whole_text if as_integers and pa.types.is_floating(kind) else _narrow_text(kind)
    return [None if value is None or value != value else write(value) for value in values]


def _strings(column: pa.Array) -> list[str | None]:
    if column.nbytes <= MOST_CELL_BYTES and not pa.types.is_dictionary(column.type):
        strings: list[str | None] = column.to_pylist()
        return strings
    cells = column.dictionary if pa.types.is_dictionary(column.type) else column
    # Arrow has no lengths of string views. A dictionary's words are checked once for all rows.
    sizes = pc.binary_length(cells.cast(pa.large_string()) if pa.types.is_string_view(cells.type) else cells)
    long = pc.fill_null(pc.greater(sizes, MOST_CELL_BYTES), False)
    if not pc.any(long).as_py():
        return column.to_pylist()
    texts = pc.if_else(long, pa.scalar(None, cells.type), cells).to_pylist()
    for place in np.flatnonzero(long.to_numpy(zero_copy_only=False)).tolist():
        cell = cells[place].as_buffer()
        texts[place] = OverLong(f"{cell.size} bytes {hashlib.sha256(cell).hexdigest()}")
    if cells is column:
        return texts
    return [None if place is None else texts[place] for place in column.indices.to_pylist()]


def find_integer_columns(sources: Mapping[str, ParquetSource], columns: Iterable[str]) -> dict[str, str]:
    """The columns whose floats are to be written as integers, each with a file of the task that holds integers there.

    Raises: CorpusError naming two files whose types of a column would give one value two texts.
    """
    found = {}
    for name in columns:
        files: dict[str, tuple[str, SourceFile]] = {}
        for source in sources.values():
            for file in source.files:
                kind = _kind(file, name)
                if kind is not None:
                    files.setdefault(kind, (source.where, file))
        if {"integer", "float"} == set(files):
            found[name] = files["integer"][1].path
        elif not _agree(set(files)):
            raise _type_clash(name, files)
    return found


def fraction_error(where: str, path: str, name: str, error: ValueError, of_integers: str) -> CorpusError:
    """The error for a fraction in a column that holds integers in another file of the task, `of_integers`."""
    return CorpusError(
        f"{where}: the column {name!r} of {path} holds {error}, while {of_integers} holds integers there; "
        "write the column with one type in all of the task's files"
    )


def changed_texts(source: ParquetSource, columns: Sequence[str], integer_columns: Container[str]) -> list[str]:
    """The columns whose texts differ from those of `str`, which earlier versions tokenised; see `shard_key`."""

    def differs(kind: pa.DataType) -> bool:
        if pa.types.is_decimal(kind):
            return kind.scale > _PLAIN_SCALE or kind.scale < 0
        return pa.types.is_float16(kind) or pa.types.is_float32(kind)

    kinds = [(name, plain_type(kind)) for file in source.files for name, kind in file.columns if name in columns]
    return sorted({name for name, kind in kinds if differs(kind) or (name in integer_columns)})


def _narrow_text(kind: pa.DataType) -> Any:
    width = np.float16 if pa.types.is_float16(kind) else np.float32 if pa.types.is_float32(kind) else None
    if width is None:
        return value_text

    def text(value: float) -> str:
        # A whole number keeps every digit: "65504.0" is not shortened to "65500.0".
        is_whole = float(value).is_integer() and abs(value) < _PLAIN_FLOATS
        return str(float(value)) if is_whole else str(width(value))

    return text


def _whole_text(value: float) -> str:
    if value in (float("inf"), -float("inf")) or value != int(value):
        raise ValueError(str(value))
    return str(int(value))


def _kind(file: SourceFile, name: str) -> str | None:
    """How a column's texts are written; None where the file has no value there. A Hive folder's name is text."""
    kind = dict(file.columns).get(name)
    if kind is None:
        return "text" if name in file.column_names else None
    if name in dict(file.class_names):
        return "class names"
    kind = plain_type(kind)
    if is_text(kind):
        return "text"
    if pa.types.is_boolean(kind):
        return "boolean"
    if pa.types.is_integer(kind):
        return "integer"
    if pa.types.is_decimal(kind):
        return f"decimal of scale {kind.scale}" if kind.scale > 0 else "integer"
    return "float" if pa.types.is_floating(kind) else None


def _agree(kinds: set[str]) -> bool:
    # An integer has the same text as a number and as a string; a float or a boolean may not.
    return len(kinds) < 2 or kinds in ({"text", "integer"}, {"text", "class names"})


def _type_clash(name: str, files: Mapping[str, tuple[str, SourceFile]]) -> CorpusError:
    pairs = list(combinations(files, 2))
    # The pair to name: integers and floats alone would agree, so any other pair explains more.
    one, other = next((pair for pair in pairs if not _agree({*pair}) and {*pair} != {"integer", "float"}), pairs[0])
    (where, first), (_, second) = files[one], files[other]
    return CorpusError(
        f"{where}: the column {name!r} is of the type {one} in {first.path} and {other} in {second.path}, which would "
        "give one value two texts; write it with one type in all of the task's files"
    )
