"""The data files of a table and their footers -> files as the page reader takes them."""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipeline.corpus.files import FOOTER_READERS, read_footer
from pipeline.corpus.row_view import Mask, RowView, pack_deleted
from pipeline.corpus.source_files import SourceFile, TableVersion
from pipeline.errors import CorpusError

_FIELD_ID = b"PARQUET:field_id"


@dataclass(frozen=True)
class TableColumn:
    """A column as the table declares it."""

    name: str
    kind: pa.DataType
    field_id: int | None = None
    """What finds the column in files that have field ids."""
    stored: tuple[str, ...] = ()
    """The names that find it in files without field ids, or where it has none."""
    default: Any = None
    """The value of rows in files without the column, as an Arrow scalar; None for null."""


@dataclass(frozen=True)
class DataFile:
    """A file as the table's log lists it."""

    path: str
    size: int
    mtime_ns: int | None
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Column -> Arrow scalar, for columns that the file does not hold since all its rows have this value."""
    deleted: Mask | None = None
    """[rows, or the first of them] whether a row is deleted."""


def read_data_files(
    filesystem: fs.FileSystem,
    files: Sequence[DataFile],
    columns: Sequence[TableColumn],
    table: TableVersion,
    where: str,
) -> tuple[SourceFile, ...]:
    """The files of a table, in the order of their paths.

    Raises: CorpusError when one is gone, is no Parquet, or lacks the field ids that tell its columns.
    """
    describe = partial(_describe, filesystem, columns, table, where)
    with ThreadPoolExecutor(FOOTER_READERS) as readers:
        return tuple(readers.map(describe, sorted(files, key=lambda file: file.path)))


def _describe(
    filesystem: fs.FileSystem, columns: Sequence[TableColumn], table: TableVersion, where: str, file: DataFile
) -> SourceFile:
    try:
        schema, row_groups = read_footer(filesystem, file.path, where)
    except FileNotFoundError as error:
        raise CorpusError(
            f"{where}: version {table.version} of {table.address} is not whole any more, since its file {file.path} "
            "was removed (as a vacuum does, or expiring snapshots); name a later version or none"
        ) from error
    stored, constants = _placed(schema, columns, file, where)
    rows = sum(count for count, _ in row_groups)
    deleted = None
    if file.deleted is not None:
        deleted = file.deleted[:rows]
        deleted = pa.concat_arrays([pa.array(deleted), pa.repeat(False, rows - len(deleted))]).to_numpy(False)
    view = RowView(
        rows=rows - (int(deleted.sum()) if deleted is not None else 0),
        stored=tuple(stored.items()),
        constants=tuple(constants.items()),
        deleted=pack_deleted(deleted) if deleted is not None and deleted.any() else None,
    )
    kinds = tuple((column.name, column.kind) for column in columns)
    return SourceFile(file.path, file.size, file.mtime_ns, (), kinds, row_groups, view=view)


def _placed(
    schema: pa.Schema, columns: Sequence[TableColumn], file: DataFile, where: str
) -> tuple[dict[str, str], dict[str, pa.Scalar]]:
    """-> column -> its name in the file, and column -> its value in all rows, for those that the file lacks."""
    ids = {int(own.metadata[_FIELD_ID]): own.name for own in schema if _FIELD_ID in (own.metadata or {})}
    stored, constants = {}, {}
    for column in columns:
        by_id = ids.get(column.field_id) if column.field_id is not None else None
        by_name = next((name for name in column.stored if name in schema.names), None)
        found = by_id if ids and column.field_id is not None else by_name
        if found is not None:
            stored[column.name] = found
        else:
            value = file.constants.get(column.name, column.default)
            constants[column.name] = pa.scalar(None, column.kind) if value is None else value.cast(column.kind)
    if not ids and not stored and any(column.field_id is not None for column in columns):
        raise CorpusError(
            f"{where}: {file.path} has no field ids and its table maps no names, so nothing says which column is "
            "which; give the table a name mapping (schema.name-mapping.default)"
        )
    return stored, constants
