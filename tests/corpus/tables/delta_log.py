"""Commits that deltalake 1.6 reads but does not write, after Delta's protocol: deletion vectors and renamed columns."""

import json
import struct
import uuid
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltalake import DeltaTable
from pyroaring import BitMap64

_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"


def delete_by_vector(table: Path, path: str, rows: Iterable[int], inline: bool) -> None:
    """Commit that the rows of the file, named as in the log, are deleted, besides those that are."""
    add = _live_adds(table)[path]
    old = add.get("deletionVector")
    positions = BitMap64([*rows, *(_positions(table, old) if old else ())])
    data = struct.pack("<I", 1681511377) + positions.serialize()
    vector: dict[str, Any] = {"sizeInBytes": len(data), "cardinality": len(positions)}
    if inline:
        vector |= {"storageType": "i", "pathOrInlineDv": _z85(data + b"\0" * (-len(data) % 4))}
    else:
        name = uuid.uuid4()
        stored = struct.pack(">I", len(data)) + data + struct.pack(">I", zlib.crc32(data))
        (table / f"deletion_vector_{name}.bin").write_bytes(b"\x01" + stored)
        vector |= {"storageType": "u", "pathOrInlineDv": _z85(name.bytes), "offset": 1}
    remove = {key: add[key] for key in ("path", "partitionValues", "size")}
    remove |= {"deletionTimestamp": 1, "dataChange": True, "extendedFileMetadata": True}
    remove |= {"deletionVector": old} if old else {}
    _commit(table, [{"remove": remove}, {"add": {**add, "deletionVector": vector}}])


def rename_column(table: Path, before: str, after: str) -> None:
    """Commit a new name of a column, in a table with column mapping: its files stay."""
    metadata = next(action["metaData"] for log in _logs(table)[::-1] for action in log if "metaData" in action)
    schema = json.loads(metadata["schemaString"])
    for field in schema["fields"]:
        field["name"] = after if field["name"] == before else field["name"]
    partitions = [after if name == before else name for name in metadata["partitionColumns"]]
    _commit(table, [{"metaData": {**metadata, "schemaString": json.dumps(schema), "partitionColumns": partitions}}])


def _live_adds(table: Path) -> dict[str, dict[str, Any]]:
    live: dict[str, dict[str, Any]] = {}
    for log in _logs(table):
        for action in log:
            if "remove" in action:
                live.pop(action["remove"]["path"], None)
        for action in log:
            if "add" in action:
                live[action["add"]["path"]] = action["add"]
    return live


def _positions(table: Path, vector: Mapping[str, Any]) -> list[int]:
    if vector["storageType"] == "i":
        data = _from_z85(vector["pathOrInlineDv"])[: vector["sizeInBytes"]]
    else:
        name = uuid.UUID(bytes=_from_z85(vector["pathOrInlineDv"]))
        stored = (table / f"deletion_vector_{name}.bin").read_bytes()
        data = stored[vector["offset"] + 4 :][: vector["sizeInBytes"]]
    return list(BitMap64.deserialize(data[4:]))


def _logs(table: Path) -> list[list[dict[str, Any]]]:
    files = sorted((table / "_delta_log").glob("*[0-9].json"))
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def _commit(table: Path, actions: list[dict[str, Any]]) -> None:
    number = DeltaTable(table).version() + 1
    lines = "".join(json.dumps(action) + "\n" for action in actions)
    (table / "_delta_log" / f"{number:020}.json").write_text(lines)


def _z85(data: bytes) -> str:
    words = [int.from_bytes(data[at : at + 4], "big") for at in range(0, len(data), 4)]
    return "".join(_Z85[word // 85**power % 85] for word in words for power in range(4, -1, -1))


def _from_z85(text: str) -> bytes:
    digits = [_Z85.index(sign) for sign in text]
    words = [sum(d * 85 ** (4 - i) for i, d in enumerate(digits[at : at + 5])) for at in range(0, len(digits), 5)]
    return b"".join(word.to_bytes(4, "big") for word in words)
