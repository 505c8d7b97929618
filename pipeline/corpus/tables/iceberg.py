"""An Iceberg table of a catalog -> its data files at one snapshot, as pyiceberg plans them."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.addresses import hide_credentials
from pipeline.corpus.row_view import Mask
from pipeline.corpus.source_files import ParquetSource, TableVersion, one_line, unreadable
from pipeline.corpus.tables.data_files import DataFile, TableColumn, read_data_files
from pipeline.corpus.tables.libraries import Lake, TableAddress, lake_library
from pipeline.errors import CorpusError, UnreachableError
from pipeline.settings import CatalogSettings

Positions = npt.NDArray[np.int64]


def open_iceberg(address: TableAddress, lake: Lake, where: str, wanted: str | None = None) -> ParquetSource:
    """The rows of an Iceberg table at the asked snapshot, or the newest.

    wanted: a filter; files that hold no such row by the table's statistics are left out.
    Raises: CorpusError when there is no such table or snapshot, or it has deletes that pyiceberg cannot tell;
    UnreachableError when its catalog does not answer.
    """
    lake_library("pyiceberg.io.pyarrow", address.written, where)
    table, ref = lake.once(address, lambda: _load(address, lake.catalogs, where))
    snapshot = _snapshot(table, address, ref, where)
    written = address.written.removesuffix(f"@{ref}") if ref else address.written
    if snapshot is None:
        version = TableVersion(written, "none", str(table.metadata.table_uuid))
        return ParquetSource(where, fs.LocalFileSystem(), (), tables=(version,))
    time = datetime.fromtimestamp(snapshot.timestamp_ms / 1000, UTC).isoformat(timespec="milliseconds")
    version = TableVersion(written, str(snapshot.snapshot_id), str(table.metadata.table_uuid), time)
    # The newest rows have today's columns; an older snapshot has those that it was written with.
    asked = address.version is not None or ref is not None
    schema = table.scan(snapshot_id=snapshot.snapshot_id if asked else None).projection()
    tasks = _planned(table, snapshot.snapshot_id, schema.schema_id, address, where, wanted)
    filesystem, path_of = _placed(table, [task.file.file_path for task in tasks], address, where)
    deleted = _deleted_rows(table, tasks, address, where)
    files = [
        DataFile(
            path_of[task.file.file_path],
            task.file.file_size_in_bytes,
            None,
            _partition_values(table, schema, task.file),
            deleted.get(task.file.file_path),
        )
        for task in tasks
    ]
    read = read_data_files(filesystem, files, _columns(table, schema), version, where)
    return ParquetSource(where, filesystem, read, tables=(version,))


def _load(address: TableAddress, catalogs: Mapping[str, CatalogSettings], where: str) -> tuple[Any, str | None]:
    """-> the table, and the name of a branch or a tag behind its `@`."""
    from pyiceberg import exceptions
    from pyiceberg.catalog import load_catalog
    from requests import exceptions as http

    catalog, slash, name = address.place.partition("/")
    name, _, ref = name.partition("@")
    if not slash or "." not in name:
        raise CorpusError(f"{where}: {address.written} is not of the form iceberg://catalog/namespace.table; fix it")
    what = f"{where}: {address.written} cannot be opened, since its catalog {catalog!r}"
    known = catalogs[catalog].properties if catalog in catalogs else {}
    try:
        return load_catalog(catalog, **known).load_table(name), ref or None
    except (exceptions.NoSuchTableError, exceptions.NoSuchNamespaceError) as error:
        raise CorpusError(f"{where}: the catalog {catalog!r} has no table {name}; fix {address.written}") from error
    except (http.ConnectionError, http.Timeout, exceptions.ServerError, exceptions.ServiceUnavailableError) as error:
        raise UnreachableError(f"{what} does not answer ({one_line(error)}); try again later") from error
    except FileNotFoundError as error:
        raise CorpusError(
            f"{where}: the metadata of {address.written} is gone ({one_line(error)}); register the table again"
        ) from error
    except Exception as error:  # of the catalog's own client: SQLAlchemy, boto, thrift
        detail = hide_credentials(re.sub(r"\(Background on this error at: \S+\)", "", str(error)))
        missing = "" if catalog in catalogs else f"; 'catalogs' of the settings has no {catalog!r}"
        raise unreadable(Exception(detail), f"{what} cannot be used{missing}", "fix 'catalogs'") from error


def _snapshot(table: Any, address: TableAddress, ref: str | None, where: str) -> Any:
    if ref is not None:
        found = table.snapshot_by_name(ref)
    elif address.version is None:
        return table.current_snapshot()
    elif address.number is not None:
        found = table.snapshot_by_id(address.number)
    else:
        found = table.snapshot_as_of_timestamp(round(address.moment.timestamp() * 1000))
    if found is None:
        known = ", ".join(str(one.snapshot_id) for one in table.snapshots()[-3:]) or "none"
        raise CorpusError(
            f"{where}: {address.written} has no snapshot {ref or address.version}, or it has expired; its newest are "
            f"{known}"
        )
    return found


def _planned(
    table: Any, snapshot: int, schema_id: int, address: TableAddress, where: str, wanted: str | None
) -> list[Any]:
    # A filter is planned with today's names, which are not those of an older schema.
    if wanted is not None and schema_id == table.schema().schema_id:
        try:
            return _tasks(table.scan(snapshot_id=snapshot, row_filter=wanted), address, where)
        except Exception:  # a filter that is wrong is told where it is parsed; other errors come once more
            pass
    return _tasks(table.scan(snapshot_id=snapshot), address, where)


def _tasks(scan: Any, address: TableAddress, where: str) -> list[Any]:
    try:
        tasks = list(scan.plan_files())
    except (ValueError, NotImplementedError) as error:
        if "equality delete" not in str(error):
            raise
        raise CorpusError(
            f"{where}: {address.written} has equality deletes, which pyiceberg cannot apply; rewrite its data files "
            "(rewrite_data_files in Spark) and try again"
        ) from error
    except (OSError, pa.ArrowException) as error:
        raise unreadable(
            error,
            f"{where}: the snapshot of {address.written} cannot be read, since a file of its metadata is gone or away",
            "name a later snapshot or none",
        ) from error
    other = next((task.file for task in tasks if task.file.file_format.value.lower() != "parquet"), None)
    if other is not None:
        raise CorpusError(
            f"{where}: {address.written} holds files of {other.file_format.value}, and only Parquet is read; rewrite "
            "the table's data files as Parquet"
        )
    return tasks


def _placed(
    table: Any, locations: Iterable[str], address: TableAddress, where: str
) -> tuple[fs.FileSystem, dict[str, str]]:
    """-> the file system of the data files, and the path in it of each location."""
    from pyiceberg.io.pyarrow import PyArrowFileIO

    io = table.io if isinstance(table.io, PyArrowFileIO) else PyArrowFileIO(table.io.properties)
    parsed = {location: PyArrowFileIO.parse_location(location, io.properties) for location in locations}
    stores = {(scheme, netloc) for scheme, netloc, _ in parsed.values()} or {("file", "")}
    if len(stores) > 1:
        raise CorpusError(f"{where}: the data files of {address.written} lie in several stores; rewrite them into one")
    scheme, netloc = stores.pop()
    filesystem = fs.LocalFileSystem() if scheme == "file" else io.fs_by_scheme(scheme, netloc)
    return filesystem, {location: path for location, (_, _, path) in parsed.items()}


def _columns(table: Any, schema: Any) -> list[TableColumn]:
    from pyiceberg.io.pyarrow import schema_to_pyarrow

    mapping = table.name_mapping()
    names = {} if mapping is None else {own.field_id: tuple(own.names) for own in mapping}
    kinds = schema_to_pyarrow(schema, include_field_ids=False)
    return [
        TableColumn(
            own.name, kind.type, own.field_id, names.get(own.field_id, ()), _scalar(own.initial_default, kind.type)
        )
        for own, kind in zip(schema.fields, kinds, strict=True)
    ]


def _partition_values(table: Any, schema: Any, file: Any) -> dict[str, Any]:
    """Column -> value, for columns that a file need not hold since its partition tells them."""
    from pyiceberg.transforms import IdentityTransform

    kinds = {column.field_id: (column.name, column.kind) for column in _columns(table, schema)}
    return {
        kinds[own.source_id][0]: _scalar(file.partition[place], kinds[own.source_id][1])
        for place, own in enumerate(table.specs()[file.spec_id].fields)
        if isinstance(own.transform, IdentityTransform) and own.source_id in kinds
    }


def _scalar(value: Any, kind: pa.DataType) -> Any:
    return None if value is None else pa.scalar(value, kind)


def _deleted_rows(table: Any, tasks: list[Any], address: TableAddress, where: str) -> dict[str, Mask]:
    """Location -> [rows] whether a row is deleted, of the files that have deletes."""
    found: dict[str, list[Positions]] = defaultdict(list)
    known = {task.file.file_path for task in tasks}
    applied = {(delete.file_path, task.file.file_path) for task in tasks for delete in task.delete_files}
    for delete in {one.file_path: one for task in tasks for one in task.delete_files}.values():
        try:
            for location, positions in _positions(table.io, delete):
                if location in known and (delete.file_path, location) in applied:
                    found[location].append(positions)
        except (OSError, pa.ArrowException, ValueError) as error:
            raise unreadable(
                error,
                f"{where}: the deletes of {address.written} in {delete.file_path} cannot be read",
                "name a later snapshot or none",
            ) from error
    masks = {}
    for task in tasks:
        if task.file.file_path in found:
            mask = np.zeros(task.file.record_count, bool)
            mask[np.concatenate(found[task.file.file_path])] = True
            masks[task.file.file_path] = mask
    return masks


def _positions(io: Any, delete: Any) -> Iterable[tuple[str, Positions]]:
    """(location of a data file, positions of its deleted rows) in a file of position deletes, or of vectors."""
    from pyiceberg.manifest import FileFormat
    from pyiceberg.table.deletion_vector import deletion_vectors_from_puffin_file
    from pyiceberg.table.puffin import PuffinFile

    with io.new_input(delete.file_path).open() as file:
        if delete.file_format == FileFormat.PUFFIN:
            for vector in deletion_vectors_from_puffin_file(PuffinFile(file.read())):
                yield vector.referenced_data_file, np.asarray(vector.to_vector(), np.int64)
            return
        if delete.file_format != FileFormat.PARQUET:
            raise ValueError(f"it is {delete.file_format.value}, and only Parquet is read")
        for batch in pq.ParquetFile(file).iter_batches(columns=["file_path", "pos"]):
            for location in pc.unique(batch["file_path"]).to_pylist():
                mine = batch.filter(pc.equal(batch["file_path"], location))
                yield location, mine["pos"].to_numpy(zero_copy_only=False).astype(np.int64)
