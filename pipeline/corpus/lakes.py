"""Lake tables: folders of Parquet files of which only a log or a catalogue says which rows are still valid.

An overwritten, deleted or compacted row stays in its file until the table is vacuumed, and a deletion vector changes no
data file at all. So reading all files gives two or three times the rows.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from pipeline.corpus.paths import parts_below
from pipeline.errors import CorpusError


@dataclass(frozen=True)
class _Kind:
    name: str
    folder: str
    """A folder at the table's root."""
    inside: re.Pattern[str] | None
    """A file that must be in that folder, since other folders have such a name, too; None if the name is enough."""
    reader: str | None
    """What writes its rows as Parquet; None where the table can be read at an address of its own."""
    scheme: str | None = None
    """Of that address."""


_KINDS = (
    _Kind("a Delta Lake table", "_delta_log", None, None, "delta"),
    _Kind("an Apache Iceberg table", "metadata", re.compile(r".+\.metadata\.json(\.gz)?"), None, "iceberg"),
    _Kind("an Apache Hudi table", ".hoodie", None, "Spark"),
    _Kind("a Lance dataset", "_versions", re.compile(r".+\.manifest"), None, "lance"),
    _Kind("an Apache Paimon table", "schema", re.compile(r"schema-\d+"), "Spark or pypaimon"),
)
_BY_FOLDER = {kind.folder: kind for kind in _KINDS}
_LOOKERS = 16


@dataclass(frozen=True)
class LakeTable:
    root: str
    kind: _Kind


def refuse_table(table: LakeTable, path: str, where: str) -> CorpusError:
    """The error for a path, as the user wrote it, that leads to a table, into one or above one."""
    kind = table.kind
    mark = f"{table.root.rstrip('/')}/{kind.folder}"
    fix = f"write its present rows as plain Parquet into another folder, with {kind.reader}, and give that"
    if kind.scheme == "iceberg":
        fix = "give its address in a catalog, iceberg://catalog/namespace.table, with the catalog under 'catalogs'"
    elif kind.scheme is not None:
        store = f"+{path.partition('://')[0]}" if "://" in path and not path.startswith("file://") else ""
        fix = f"give the table's own address, {kind.scheme}{store}://{table.root}"
    return CorpusError(
        f"{where}: {path} touches {kind.name} ({mark} is there), whose files hold deleted and replaced rows too; {fix}"
    )


def tables_below(entries: Iterable[str], root: str) -> list[LakeTable]:
    """The tables below `root`, outermost first, found in `entries`, the paths of all that is there. Asks no store."""
    found: dict[str, LakeTable] = {}
    for path in entries:
        parts = parts_below(path, root)
        for depth, part in enumerate(parts):
            kind = _BY_FOLDER.get(part)
            rest = parts[depth + 1 :]
            if kind is not None and (kind.inside is None or (len(rest) == 1 and kind.inside.fullmatch(rest[0]))):
                table = "/".join((root.rstrip("/"), *parts[:depth]))
                found.setdefault(table, LakeTable(table, kind))
    return sorted(found.values(), key=lambda table: (len(table.root), table.root))


def table_above(filesystem: fs.FileSystem, path: str) -> LakeTable | None:
    """The table whose root is `path` or the nearest folder above it, however far.

    Partitions of a table may have any names and depth, so all levels are checked, up to the bucket or the disk's root.
    That takes one request for each kind and level, many at a time, whatever the folders hold.
    """
    folders = list(_chain(path))
    if isinstance(filesystem, fs.LocalFileSystem) and (real := os.path.realpath(path)) != path:
        folders += [folder for folder in _chain(real) if folder not in folders]
    looks = [(folder, kind) for folder in folders for kind in _KINDS]
    if isinstance(filesystem, fs.LocalFileSystem):  # which answers faster than threads start
        return next((LakeTable(*look) for look in looks if _is_table(filesystem, *look)), None)
    with ThreadPoolExecutor(_LOOKERS) as lookers:
        seen = lookers.map(lambda look: _is_table(filesystem, *look), looks)
        return next((LakeTable(*look) for look, there in zip(looks, seen, strict=True) if there), None)


def table_behind_links(files: Sequence[str]) -> LakeTable | None:
    """The table that some link among the local `files` leads into."""
    real = {file: os.path.realpath(file) for file in files}
    folders = {os.path.dirname(path) for file, path in real.items() if path != file}
    return next(filter(None, (table_above(fs.LocalFileSystem(), folder) for folder in sorted(folders))), None)


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or lies somewhere in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _chain(path: str) -> Iterator[str]:
    """`path` and all folders above it, the nearest first. A relative path is a store's and ends at its bucket."""
    while path.strip("/"):
        yield path
        path = path.rpartition("/")[0]


def _is_table(filesystem: fs.FileSystem, folder: str, kind: _Kind) -> bool:
    mark = f"{folder.rstrip('/')}/{kind.folder}"
    try:
        if kind.inside is None:
            return filesystem.get_file_info(mark).type == fs.FileType.Directory
        below = filesystem.get_file_info(fs.FileSelector(mark, allow_not_found=True))
        return any(kind.inside.fullmatch(entry.base_name) for entry in below)
    except (pa.ArrowException, OSError):
        return False  # often a path is readable and folders above it are not; reading the path will say what is wrong
