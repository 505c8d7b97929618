"""A Delta table -> its data files, as its log lists them at one version."""

import json
import os
import urllib.parse
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.paths import locate
from pipeline.corpus.row_view import Mask
from pipeline.corpus.source_files import ParquetSource, TableVersion, unreadable
from pipeline.corpus.tables.data_files import DataFile, TableColumn, read_data_files
from pipeline.corpus.tables.libraries import Lake, TableAddress, lake_library, storage_options, utc_moment
from pipeline.corpus.where import parse_where
from pipeline.errors import CorpusError

# What a reader must know of the protocol, and we do: vectors and mapping here, and types in the page reader.
_KNOWN = {
    "columnMapping",
    "deletionVectors",
    "timestampNtz",
    "typeWidening",
    "typeWidening-preview",
    "v2Checkpoint",
    "vacuumProtocolCheck",
    "variantType",
    "variantType-preview",
}
_MAPPED_NAME, _MAPPED_ID = "delta.columnMapping.physicalName", "delta.columnMapping.id"


def open_delta(address: TableAddress, lake: Lake, where: str, wanted: str | None = None) -> ParquetSource:
    """The rows of a Delta table at the asked version, or the newest.

    wanted: a filter; files that hold no such row by the log's statistics are left out.
    Raises: CorpusError when there is no such table or version, or its protocol has what nobody here knows;
    UnreachableError.
    """
    deltalake = lake_library("deltalake", address.written, where)
    filesystem, root, _ = locate(address.place)
    table = lake.once(address, lambda: _load(deltalake, address, root, where))
    unknown = sorted(set(table.protocol().reader_features or ()) - _KNOWN)
    if unknown:
        raise CorpusError(
            f"{where}: {address.written} needs the reader feature {unknown[0]!r}, which is not known here; write its "
            "rows into a table without it"
        )
    version = TableVersion(address.written, str(table.version()), str(table.metadata().id), _written(table, address))
    physical = {own.name: str(own.metadata.get(_MAPPED_NAME, own.name)) for own in table.schema().fields}
    partitioned = {name: physical[name] for name in table.metadata().partition_columns}
    columns = _columns(table, physical, partitioned)
    hopeful = _hopeful_files(table, wanted, columns, where)
    files = [
        DataFile(_inside(root, add["path"], address, where), add["size"], add["mtime"], add["values"], add["deleted"])
        for add in _live_files(table, partitioned, address, where)
        if hopeful is None or _name(add["path"]) in hopeful
    ]
    return ParquetSource(
        where, filesystem, read_data_files(filesystem, files, columns, version, where), tables=(version,)
    )


def _load(deltalake: Any, address: TableAddress, root: str, where: str) -> Any:
    place, options = address.place.partition("?")[0], storage_options(address.place)
    try:
        if address.version is None or address.number is not None:
            return deltalake.DeltaTable(
                place if "://" in place else root, version=address.number, storage_options=options
            )
        table = deltalake.DeltaTable(place if "://" in place else root, storage_options=options)
        table.load_as_version(address.moment.isoformat())
    except deltalake.exceptions.TableNotFoundError as error:
        raise CorpusError(
            f"{where}: there is no Delta table at {address.written}; fix the address, in which a version is a number "
            "or a time such as 2026-11-01T00:00:00Z"
        ) from error
    except (deltalake.exceptions.DeltaError, OSError, ValueError) as error:
        of = f"version {address.version} of " if address.version else ""
        raise unreadable(
            error,
            f"{where}: {of}{address.written} cannot be opened",
            "name a version that its log still has, or none for the newest",
        ) from error
    # The library gives the first version for a time before it, as if the table had been there.
    first = _written(table, address)
    if first is not None and utc_moment(first) > address.moment:
        raise CorpusError(
            f"{where}: {address.written} has no version as old as {address.version} (the oldest that is known is of "
            f"{first}); name a later time"
        )
    return table


def _written(table: Any, address: TableAddress) -> str | None:
    """The time by which an address finds the version, in whole milliseconds; None where its log file is gone."""
    # Not the library's `history`: of a table at an older version, it tells the newest commits under that one's number.
    filesystem, root, _ = locate(address.place)
    log = f"{root.rstrip('/')}/_delta_log/{table.version():020d}.json"
    try:
        with filesystem.open_input_stream(log) as stream:
            actions = [json.loads(line) for line in stream.read().splitlines()]
        modified = filesystem.get_file_info(log).mtime_ns
    except (OSError, ValueError, pa.ArrowException):
        return None
    commit: dict[str, Any] = next((action["commitInfo"] for action in actions if "commitInfo" in action), {})
    # Without an in-commit time the protocol and the library go by the log file's own. The writer's `timestamp` is
    # taken before the file is written: an address with it would find the version before.
    stamp = commit.get("inCommitTimestamp", None if modified is None else modified // 10**6)
    return None if stamp is None else datetime.fromtimestamp(stamp / 1000, UTC).isoformat(timespec="milliseconds")


def _columns(table: Any, physical: Mapping[str, str], partitioned: Collection[str]) -> list[TableColumn]:
    mode = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    kinds = {own.name: own.type for own in pa.schema(table.schema().to_arrow())}
    columns = []
    for own in table.schema().fields:
        stored = physical[own.name] if mode != "none" else own.name
        # Partition columns may stand in files too, but the log alone tells their values.
        columns.append(
            TableColumn(
                own.name,
                kinds[own.name],
                field_id=own.metadata.get(_MAPPED_ID) if mode == "id" and own.name not in partitioned else None,
                stored=() if own.name in partitioned else (stored,),
            )
        )
    return columns


def _live_files(table: Any, partitioned: Mapping[str, str], address: TableAddress, where: str) -> list[dict[str, Any]]:
    """Path in the table, size, time, partition values and deleted rows of each file of the version."""
    adds = pa.table(table.get_add_actions())
    names = set(adds.column_names)
    values = adds["partition"].combine_chunks() if "partition" in names and len(adds) else None
    vectors = _deletion_vectors(table)
    found = []
    for row in range(len(adds)):
        # The log writes paths as URLs do.
        path = urllib.parse.unquote(adds["path"][row].as_py())
        of_row = {} if values is None else _partition_values(values[row], partitioned)
        mtime = adds["modification_time"][row].as_py()
        found.append(
            {
                "path": path,
                "size": adds["size_bytes"][row].as_py(),
                "mtime": None if mtime is None else mtime * 10**6,
                "values": of_row,
                "deleted": vectors.pop(path, None),
            }
        )
    if vectors:
        raise CorpusError(
            f"{where}: {address.written} has deleted rows in {next(iter(vectors))}, which is none of its files; "
            "compact the table and try again"
        )
    return found


def _hopeful_files(table: Any, wanted: str | None, columns: list[TableColumn], where: str) -> set[str] | None:
    """The names of the files that can hold such rows; None for all. Raises: CorpusError for a filter that is none."""
    # The log's statistics leave NaN out, and the library takes what they say for all of a file's rows.
    if wanted is None or parse_where(wanted, {own.name: own.kind for own in columns}, where).takes_nan:
        return None
    try:
        uris = table.file_uris(file_pruning_predicate=wanted)
    except Exception:  # written in a way that Delta's own SQL has not
        return None
    # Of a folder with a space in its name, the library's paths do not exist; names are unique.
    return {_name(uri) for uri in uris}


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _partition_values(values: Any, partitioned: Mapping[str, str]) -> Mapping[str, Any]:
    """Column -> value of one file; with column mapping, the library may name them as the files do."""
    fields = {own.name: values[own.name] for own in values.type}
    return {
        column: fields[name]
        for column, physical in partitioned.items()
        for name in (physical, column)
        if name in fields
    }


def _deletion_vectors(table: Any) -> dict[str, Mask]:
    """Path in the table -> [rows] whether a row is deleted."""
    root = _as_path(_as_url(table.table_uri)).rstrip("/") + "/"
    found = {}
    for batch in table.deletion_vectors():
        of_batch = pa.record_batch(batch)
        for row in range(of_batch.num_rows):
            file = _as_path(of_batch["filepath"][row].as_py())
            kept = of_batch["selection_vector"][row].values.to_numpy(zero_copy_only=False)
            found[file.removeprefix(root)] = ~kept.astype(np.bool_)
    return found


def _as_path(url: str) -> str:
    return urllib.parse.unquote(urllib.parse.urlparse(url).path)


def _as_url(place: str) -> str:
    return place if "://" in place else f"file://{urllib.parse.quote(os.path.abspath(place))}"


def _inside(root: str, path: str, address: TableAddress, where: str) -> str:
    if "://" in path or path.startswith("/"):
        raise CorpusError(
            f"{where}: {address.written} refers to the file {path} outside its folder, as a shallow clone does; give "
            "the table that it was cloned from, or a deep clone"
        )
    return f"{root.rstrip('/')}/{path}"
