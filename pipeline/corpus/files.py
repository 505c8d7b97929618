"""Paths as a user writes them -> the Parquet files behind them, described by their footers alone."""

import os
import re
import urllib.parse
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.corpus.class_names import footer_class_names
from pipeline.corpus.formats import conversion, looks_like_data, parquet_among
from pipeline.corpus.lakes import LakeTable, is_below, refuse_table, table_above, table_behind_links, tables_below
from pipeline.corpus.mixed_splits import check_one_split
from pipeline.corpus.paths import locate, matches, parts_below
from pipeline.corpus.source_files import ParquetSource, SourceFile, of_its_store, unreadable
from pipeline.corpus.tables.text_files import describe_text_file, is_text_file, told_types
from pipeline.errors import CorpusError

FOOTER_READERS = 16
_PLAIN_JSON = re.compile(r"\.json(\.\w+)?$", re.IGNORECASE)
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class Listed:
    """A file as a folder or a repository lists it, found below `root`."""

    path: str
    size: int
    mtime_ns: int | None
    root: str


@dataclass(frozen=True)
class _Found:
    """What is behind one path: Parquet files, other files of its folders, and lake tables, which must not be read."""

    files: list[Listed]
    others: list[str]
    tables: list[LakeTable]


def inspect_files(paths: str | Sequence[str], where: str, types: Mapping[str, str] | None = None) -> ParquetSource:
    """Find the files behind `paths` and read their footers, or of JSON lines and CSV the first block.

    paths: file, folder, glob or URI of a pyarrow file system, or a list of them.
    types: of columns of JSON lines and CSV, by name.
    Raises: CorpusError when nothing is there, or a footer cannot be read.
    """
    wanted = [paths] if isinstance(paths, str) else list(paths)
    if not wanted:
        raise CorpusError(f"{where}: the list of files is empty; name at least one Parquet file")
    filesystem: fs.FileSystem | None = None
    listed: dict[str, Listed] = {}
    left_out: set[str] = set()
    for path in wanted:
        here, files, others = _find(path, where)
        if filesystem is not None and here != filesystem:
            raise CorpusError(f"{where}: {path} lies on another file system than {wanted[0]}; copy them to one")
        filesystem = here
        for file in files:
            listed.setdefault(file.path, file)
        left_out.update(filter(looks_like_data, others))
    assert filesystem is not None
    source = describe_files(filesystem, list(listed.values()), where, types or {})
    return replace(source, left_out=tuple(sorted(left_out - listed.keys())))


def describe_files(
    filesystem: fs.FileSystem, listed: Sequence[Listed], where: str, types: Mapping[str, str]
) -> ParquetSource:
    """Read the footers of Parquet files, and the first blocks of text files, in the order of their paths.

    Raises: CorpusError; UnreachableError.
    """
    in_order = sorted(listed, key=lambda file: file.path)
    with ThreadPoolExecutor(FOOTER_READERS) as readers:
        described = tuple(readers.map(lambda file: _describe(filesystem, file, where, types), in_order))
    filled = tuple(file for file in described if file.columns)  # a text file may be empty
    if not filled:
        raise CorpusError(f"{where}: {described[0].path} holds no row; give a file that does")
    return ParquetSource(where, filesystem, filled, remarks=tuple(told_types(filled, types)))


def _find(path: str, where: str) -> tuple[fs.FileSystem, list[Listed], list[str]]:
    """-> file system, Parquet files, other files."""
    try:
        filesystem, fixed, pattern = locate(path)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise unreadable(error, f"{where}: cannot look up {path}", "fix the path or its access") from error
    try:
        found = _look(filesystem, fixed, pattern)
        kind = filesystem.get_file_info(fixed).type
    except Exception as error:
        if not of_its_store(error, filesystem):
            raise
        raise unreadable(error, f"{where}: cannot look up {path}", "fix the path or its access") from error
    if found.tables:
        raise refuse_table(found.tables[0], path, where)
    files = found.files
    if files:
        if files[0].path != fixed:
            check_one_split(path, fixed, [file.path for file in files], where)
        return filesystem, files, found.others
    if pattern is not None and kind != fs.FileType.NotFound:
        raise CorpusError(f"{where}: no Parquet file matches {path}; fix the pattern")
    if kind == fs.FileType.Directory:
        other = next(((file, how) for file in found.others if (how := conversion(file))), None)
        if other is not None:
            raise CorpusError(f"{where}: the folder {path} holds no Parquet file but {other[0]}; {other[1]}")
        raise CorpusError(f"{where}: the folder {path} holds no .parquet file; put the corpus there or fix the path")
    raise CorpusError(f"{where}: there is no file or folder {path}; fix the path")


def _look(filesystem: fs.FileSystem, fixed: str, pattern: str | None) -> _Found:
    info = filesystem.get_file_info(fixed)  # before everything else: a store that does not answer fails here
    above = table_above(filesystem, fixed)
    if above is not None:
        return _Found([], [], [above])
    tables: list[LakeTable] = []
    entries = [info]
    if pattern is not None:
        parts = pattern.split("/")
        is_folder = info.type == fs.FileType.Directory
        below = filesystem.get_file_info(fs.FileSelector(fixed, recursive=len(parts) > 1)) if is_folder else []
        entries = _outermost([entry for entry in below if matches(parts_below(entry.path, fixed), parts)])
        # A table beside what the pattern names does not matter, but one above it does. `_expand` looks below.
        roots = tables_below((entry.path for entry in below), fixed)
        tables = [t for t in roots if not entries or any(is_below(entry.path, t.root) for entry in entries)]
    expanded = [_expand(filesystem, entry, fixed) for entry in entries]
    files = [file for part in expanded for file in part.files]
    if isinstance(filesystem, fs.LocalFileSystem):
        files = _each_once(files)
        behind = table_behind_links([file.path for file in files])
        tables += [behind] if behind else []
    return _Found(
        files,
        [path for part in expanded for path in part.others],
        [*tables, *(table for part in expanded for table in part.tables)],
    )


def _each_once(files: Sequence[Listed]) -> list[Listed]:
    """Leave out files that a link leads to a second time, under the same Hive columns or from a folder below them.

    Two links to one file elsewhere count as two files: a hub's cache keeps equal files once.
    """
    places = {_place(file) for file in files}
    kept: dict[tuple[object, ...], Listed] = {}
    for file in sorted(files, key=lambda file: (len(file.path), file.path)):
        below = parts_below(file.path, file.root)[:-1]
        folders = [os.path.realpath(os.path.join(file.root, *below[:depth])) for depth in range(len(below) + 1)]
        if len(set(folders)) < len(folders):  # a link to a folder above makes a circle
            continue
        real = os.path.realpath(file.path)
        by_link = real in places or folders[-1] != os.path.dirname(_place(file))
        kept.setdefault((real if by_link else file.path, _hive_columns(below)), file)
    return list(kept.values())


def _place(file: Listed) -> str:
    """The path that a file would have if nothing below its root were a link."""
    return os.path.join(os.path.realpath(file.root), *filter(None, parts_below(file.path, file.root)))


def _outermost(entries: Sequence[fs.FileInfo]) -> list[fs.FileInfo]:
    """Entries that are in no folder among `entries`: `**` matches a folder and all that is in it."""
    folders = {entry.path for entry in entries if entry.type == fs.FileType.Directory}
    return [entry for entry in entries if not any(str(above) in folders for above in PurePosixPath(entry.path).parents)]


def _expand(filesystem: fs.FileSystem, entry: fs.FileInfo, root: str) -> _Found:
    if entry.type == fs.FileType.File:
        return _Found([Listed(entry.path, entry.size or 0, entry.mtime_ns, root)], [], [])
    if entry.type != fs.FileType.Directory:
        return _Found([], [], [])
    below = filesystem.get_file_info(fs.FileSelector(entry.path, recursive=True))
    # Spark and others leave _SUCCESS, _temporary/ and .crc files beside the data.
    shown = {
        file.path: file
        for file in below
        if file.type == fs.FileType.File and not any(part[:1] in "._" for part in parts_below(file.path, entry.path))
    }
    tables = tables_below((other.path for other in below), entry.path)
    chosen = [] if tables else parquet_among(filesystem, list(shown))
    if not chosen and not tables:
        texts = [path for path in shown if is_text_file(filesystem, path)]
        # A plain .json beside rows of another kind describes these: dataset_info.json, stats.json.
        sure = [path for path in texts if not _PLAIN_JSON.search(path)]
        chosen = sure or ([] if any(conversion(path) for path in shown.keys() - set(texts)) else texts)
    files = [Listed(path, shown[path].size or 0, shown[path].mtime_ns, root) for path in chosen]
    dangling = _dangling_links(entry.path) if isinstance(filesystem, fs.LocalFileSystem) else []
    return _Found(files, sorted(shown.keys() - set(chosen)) + dangling, tables)


def _dangling_links(root: str) -> list[str]:
    """Broken links below `root`, which Arrow does not list."""
    paths = (os.path.join(folder, name) for folder, _, names in os.walk(root) for name in names if name[:1] not in "._")
    return [path for path in paths if os.path.islink(path) and not os.path.exists(path)]


def read_footer(filesystem: fs.FileSystem, path: str, where: str) -> tuple[pa.Schema, tuple[tuple[int, int], ...]]:
    """-> a Parquet file's schema, and (rows, uncompressed bytes) of each row group.

    Raises: CorpusError; UnreachableError; FileNotFoundError.
    """
    try:
        footer = pq.read_metadata(path, filesystem=filesystem)
        schema = footer.schema.to_arrow_schema()
    except FileNotFoundError:
        raise
    except Exception as error:
        if not of_its_store(error, filesystem):
            raise
        what = f"{where}: {path} is not a readable Parquet file"
        raise unreadable(error, what, conversion(path) or "write it again or leave it out") from error
    groups = (footer.row_group(index) for index in range(footer.num_row_groups))
    return schema, tuple((group.num_rows, group.total_byte_size) for group in groups)


def _describe(filesystem: fs.FileSystem, file: Listed, where: str, types: Mapping[str, str]) -> SourceFile:
    partitions = _hive_columns(parts_below(file.path, file.root)[:-1])
    try:
        if is_text_file(filesystem, file.path):
            return describe_text_file(filesystem, file.path, file.size, file.mtime_ns, partitions, types, where)
        schema, row_groups = read_footer(filesystem, file.path, where)
    except FileNotFoundError as error:
        raise CorpusError(f"{where}: {file.path} was removed while it was looked at; run the job again") from error
    return SourceFile(
        path=file.path,
        size=file.size,
        mtime_ns=file.mtime_ns,
        partitions=partitions,
        columns=tuple((field.name, field.type) for field in schema),
        row_groups=row_groups,
        class_names=footer_class_names(schema),
    )


def _hive_columns(folders: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    pairs = [folder.split("=", 1) for folder in folders if "=" in folder]
    values = [(name, urllib.parse.unquote(value)) for name, value in pairs]
    return tuple((name, None if value == _HIVE_NULL else value) for name, value in values)
