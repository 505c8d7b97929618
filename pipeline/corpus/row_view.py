"""How a file's rows become those of a corpus: renamed, cast and constant columns, deleted rows, a filter, a limit."""

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.corpus.source_files import one_line
from pipeline.corpus.values import is_text, plain_type

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RowFilter:
    """A `where` of the settings."""

    text: str
    """As the user wrote it."""
    columns: tuple[str, ...]
    """The columns that it reads; none where the file's own library filters."""
    expression: pc.Expression | None = field(default=None, compare=False)
    """None where the file's own library filters."""
    takes_nan: bool = False
    """Whether it is true of NaN, which statistics leave out."""


class FilterError(ValueError):
    """A filter cannot be applied to values that a file holds."""


@dataclass(frozen=True)
class RowView:
    """Of one file. All columns are named as in the table that the file belongs to."""

    rows: int
    """Rows that are left of the file, where `exact`; else the most that can be left, or a guess."""
    stored: tuple[tuple[str, str], ...]
    """(column, its name in the file) of the columns that the file has."""
    constants: tuple[tuple[str, Any], ...] = ()
    """(column, Arrow scalar) of the columns with one value in all rows: of a partition, or added later and null."""
    deleted: bytes | None = None
    """`pack_deleted` of the file's rows; None where none is deleted."""
    where: RowFilter | None = None
    row_groups: tuple[int, ...] | None = None
    """The row groups that can hold rows of `where`; None for all."""
    take: int | None = None
    """The first so many rows that are left, and no more; None for all."""
    renamed: tuple[tuple[str, str], ...] = ()
    """(what templates call it, column)."""
    types: tuple[tuple[str, pa.DataType], ...] = ()
    """(column, its type) of the table, where templates call columns otherwise; else they are the corpus' own."""
    exact: bool = True

    def types_of(self, columns: Sequence[tuple[str, pa.DataType]]) -> Sequence[tuple[str, pa.DataType]]:
        """(column, its type) of the table, given those of the corpus, whose names may hide the table's."""
        return self.types or columns

    def column(self, name: str) -> str:
        """The table's column that templates call `name`."""
        return dict(self.renamed).get(name, name)

    def needed(self, names: Iterable[str]) -> tuple[str, ...]:
        """The table's columns that are read for these names of templates."""
        filtered = self.where.columns if self.where else ()
        return tuple(dict.fromkeys([*map(self.column, names), *filtered]))

    def key(self) -> list[Any]:
        """What enters a shard folder's name, as JSON values."""
        deleted = hashlib.sha256(zlib.decompress(self.deleted)).hexdigest() if self.deleted else None
        constants = [[name, None if value.as_py() is None else str(value)] for name, value in self.constants]
        where = self.where.text if self.where else None
        return [list(map(list, self.stored)), constants, deleted, where, self.take, list(map(list, self.renamed))]


def pack_deleted(deleted: Mask) -> bytes:
    """[rows of the file] whether a row is deleted -> a bit a row, compressed."""
    return zlib.compress(np.packbits(deleted).tobytes(), 1)


def unpack_deleted(packed: bytes, rows: int) -> Mask:
    """The mask `[rows]` of `pack_deleted`."""
    return np.unpackbits(np.frombuffer(zlib.decompress(packed), np.uint8), count=rows).astype(bool)


def viewed(
    batches: Iterable[pa.RecordBatch],
    view: RowView,
    types: Sequence[tuple[str, pa.DataType]],
    names: Sequence[str],
    deleted: Mask | None,
) -> Iterator[pa.RecordBatch]:
    """Batches of stored columns -> batches of the columns that templates call `names`, without the rows that are gone.

    types: the corpus' columns. deleted: [rows of all batches].
    Raises: ArrowInvalid when a value does not fit the table's type; FilterError when the filter does not fit a value.
    """
    type_of, left, seen = dict(view.types_of(types)), view.take, 0
    for batch in batches:
        columns = _columns(batch, view, view.needed(names), type_of)
        seen += batch.num_rows
        if deleted is not None:
            columns = columns.filter(pa.array(~deleted[seen - batch.num_rows : seen]))
        if view.where is not None and view.where.expression is not None:
            columns = _filtered(columns, view.where)
        if left is not None:
            columns = columns.slice(0, left)
            left -= columns.num_rows
        if columns.num_rows:
            found = [columns[view.column(name)] for name in names] if names else columns.columns
            yield pa.RecordBatch.from_arrays(found, list(names) if names else columns.schema.names)
        if left == 0:
            return


def _filtered(columns: pa.RecordBatch, where: RowFilter) -> pa.RecordBatch:
    try:
        return columns.filter(where.expression)
    except (pa.ArrowException, ValueError) as error:
        raise FilterError(f"the filter {where.text!r} cannot be applied ({one_line(error)})") from error


def _columns(
    batch: pa.RecordBatch, view: RowView, needed: Sequence[str], types: dict[str, pa.DataType]
) -> pa.RecordBatch:
    stored, constants = dict(view.stored), dict(view.constants)
    arrays = [
        _as_type(batch[stored[name]], types[name]) if name in stored else pa.repeat(constants[name], batch.num_rows)
        for name in needed
    ]
    if not arrays:  # only rows are counted
        arrays, needed = [pa.nulls(batch.num_rows)], ["rows"]
    return pa.RecordBatch.from_arrays(arrays, list(needed))


def _as_type(array: pa.Array, kind: pa.DataType) -> pa.Array:
    """The array as its table declares it; texts stay as they are stored, but for views, which Arrow cannot filter."""
    if is_text(plain_type(array.type)) and is_text(plain_type(kind)):
        return array.cast(pa.large_string()) if pa.types.is_string_view(array.type) else array
    return array if array.type == kind else array.cast(kind)
