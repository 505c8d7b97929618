"""Snapshots with delete files, which pyiceberg 0.12 reads but does not write: Spark, Flink and Trino do."""

import json
import struct
import uuid
import zlib
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestWriterV2,
    write_manifest_list,
)
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation, Snapshot, Summary
from pyiceberg.table.update import AddSnapshotUpdate, SetSnapshotRefUpdate
from pyiceberg.typedef import Record
from pyroaring import BitMap


class _Deletes(ManifestWriterV2):
    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


def delete_positions(table: Table, data_file: DataFile, rows: Sequence[int], as_vector: bool = False) -> None:
    """Commit that these rows of a data file are deleted."""
    path = data_file.file_path
    if as_vector:
        _commit(table, data_file, _write(table, "puffin", _puffin(path, rows)), len(rows), FileFormat.PUFFIN)
        return
    deletes = pa.table({"file_path": [path] * len(rows), "pos": pa.array(sorted(rows), pa.int64())})
    _commit(table, data_file, _write(table, "parquet", _parquet(deletes)), len(rows), FileFormat.PARQUET)


def delete_equal(table: Table, data_file: DataFile, values: pa.Table, field_id: int) -> None:
    """Commit that rows with these values are deleted, as Flink writes it."""
    place = _write(table, "parquet", _parquet(values))
    _commit(table, data_file, place, len(values), FileFormat.PARQUET, [field_id])


def _commit(
    table: Table, data_file: DataFile, place: tuple[str, int], rows: int, kind: FileFormat, equality: Any = None
) -> None:
    metadata, parent = table.metadata, table.current_snapshot()
    assert parent is not None
    content = DataFileContent.EQUALITY_DELETES if equality else DataFileContent.POSITION_DELETES
    deletes = DataFile.from_args(
        content=content, file_path=place[0], file_format=kind, record_count=rows, file_size_in_bytes=place[1],
        partition=Record(*(data_file.partition[at] for at in range(len(table.specs()[data_file.spec_id].fields)))),
        column_sizes={}, value_counts={}, null_value_counts={}, nan_value_counts={},
        lower_bounds={}, upper_bounds={}, equality_ids=equality,
    )  # fmt: skip
    deletes.spec_id = data_file.spec_id
    number, sequence = table.metadata.new_snapshot_id(), metadata.last_sequence_number + 1
    output = table.io.new_output(f"{table.location()}/metadata/{uuid.uuid4()}-m0.avro")
    with _Deletes(table.specs()[data_file.spec_id], table.schema(), output, number, "deflate") as writer:
        writer.add_entry(
            ManifestEntry.from_args(status=ManifestEntryStatus.ADDED, snapshot_id=number, data_file=deletes)
        )
    listed = f"{table.location()}/metadata/snap-{number}-0-{uuid.uuid4()}.avro"
    parent_id = parent.snapshot_id
    with write_manifest_list(2, table.io.new_output(listed), number, parent_id, sequence, "deflate") as writer_list:
        writer_list.add_manifests([*parent.manifests(table.io), writer.to_manifest_file()])
    snapshot = Snapshot(
        snapshot_id=number, parent_snapshot_id=parent_id, sequence_number=sequence, manifest_list=listed,
        summary=Summary(Operation.DELETE), schema_id=table.schema().schema_id,
    )  # fmt: skip
    with table.transaction() as transaction:
        moved = SetSnapshotRefUpdate(ref_name="main", type="branch", snapshot_id=number)
        transaction._apply((AddSnapshotUpdate(snapshot=snapshot), moved))


def _write(table: Table, ending: str, data: bytes) -> tuple[str, int]:
    path = f"{table.location()}/data/{uuid.uuid4()}-deletes.{ending}"
    with table.io.new_output(path).create() as file:
        file.write(data)
    return path, len(data)


def _parquet(rows: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    return bytes(sink.getvalue())


def _puffin(path: str, rows: Sequence[int]) -> bytes:
    vector = struct.pack("<I", 0x6439D3D1) + struct.pack("<QI", 1, 0) + BitMap(rows).serialize()
    blob = struct.pack(">I", len(vector)) + vector + struct.pack(">I", zlib.crc32(vector))
    about = {
        "type": "deletion-vector-v1", "fields": [2147483546], "snapshot-id": -1, "sequence-number": -1, "offset": 4,
        "length": len(blob), "properties": {"referenced-data-file": path, "cardinality": str(len(rows))},
    }  # fmt: skip
    footer = json.dumps({"blobs": [about], "properties": {}}).encode()
    return b"PFA1" + blob + b"PFA1" + footer + struct.pack("<I", len(footer)) + b"\0\0\0\0" + b"PFA1"
