"""Paths as a user writes them -> the Parquet files behind them, known by their footers alone."""

import fnmatch
import os
import re
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.errors import CorpusError, PromptBankError, UnreachableError

_FOOTER_READERS = 16
# How Arrow words that a store is overloaded, or that nothing is heard of it.
_AWAY = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|THROTTLING)"
    r"|AWS Error UNKNOWN \(HTTP status 5\d\d\)|curlCode: (6|7|28|35|52|55|56)\b|[Tt]imed out|[Cc]ould ?n.t connect"
)
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class SourceFile:
    """One Parquet file as its listing and its footer describe it."""

    path: str
    size: int
    mtime_ns: int | None
    partitions: tuple[tuple[str, str | None], ...]
    """Hive columns, from the folders below the path that the user gave."""
    columns: tuple[tuple[str, pa.DataType], ...]
    row_groups: tuple[tuple[int, int], ...]
    """(rows, uncompressed bytes) of each row group."""

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.row_groups)

    @property
    def column_names(self) -> tuple[str, ...]:
        own = [name for name, _ in self.columns]
        return (*own, *(name for name, _ in self.partitions if name not in own))


@dataclass(frozen=True)
class Source:
    """All the files of one setting such as `train`, in the order of their paths."""

    where: str
    """Names task and setting at the head of every message: "task 'sst2', train"."""
    filesystem: fs.FileSystem
    files: tuple[SourceFile, ...]

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)


@dataclass(frozen=True)
class _Listed:
    path: str
    size: int
    mtime_ns: int | None
    root: str


def inspect_files(paths: str | Sequence[str], where: str) -> Source:
    """Find the files behind `paths` and read their footers; no data page is touched.

    paths: file, folder, glob or URI of a pyarrow file system, or a list of them.
    Raises: CorpusError when nothing is there, or a footer cannot be read.
    """
    wanted = [paths] if isinstance(paths, str) else list(paths)
    if not wanted:
        raise CorpusError(f"{where}: the list of files is empty; name at least one Parquet file")
    filesystem: fs.FileSystem | None = None
    listed: dict[str, _Listed] = {}
    for path in wanted:
        here, files = _find(path, where)
        if filesystem is not None and here != filesystem:
            raise CorpusError(f"{where}: {path} lies on another file system than {wanted[0]}; copy them to one")
        filesystem = here
        for file in files:
            listed.setdefault(file.path, file)
    assert filesystem is not None
    footers_of = [listed[path] for path in sorted(listed)]
    with ThreadPoolExecutor(_FOOTER_READERS) as readers:
        files_read = tuple(readers.map(lambda file: _read_footer(filesystem, file, where), footers_of))
    return Source(where, filesystem, files_read)


def unreadable(error: BaseException, what: str, mend: str) -> PromptBankError:
    """The error to raise for `error`: one of the corpus, or of a store that may answer later."""
    if _AWAY.search(str(error)):
        return UnreachableError(f"{what} ({one_line(error)}); its store is away, so try again later")
    return CorpusError(f"{what} ({one_line(error)}); {mend}")


def one_line(error: BaseException) -> str:
    """An error's message fit to stand in brackets inside a sentence."""
    return re.sub(r"\s+", " ", str(error)).strip().rstrip(".")


def _find(path: str, where: str) -> tuple[fs.FileSystem, list[_Listed]]:
    try:
        filesystem, fixed, pattern = _locate(path)
        files = list(_list(filesystem, fixed, pattern))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise unreadable(error, f"{where}: cannot look up {path}", "mend the path or its access") from error
    if files:
        return filesystem, files
    kind = filesystem.get_file_info(fixed).type
    if pattern is not None and kind != fs.FileType.NotFound:
        raise CorpusError(f"{where}: no Parquet file matches {path}; mend the pattern")
    if kind == fs.FileType.Directory:
        raise CorpusError(f"{where}: the folder {path} holds no .parquet file; put the corpus there or mend the path")
    raise CorpusError(f"{where}: there is no file or folder {path}; mend the path")


def _locate(path: str) -> tuple[fs.FileSystem, str, str | None]:
    """-> file system, the path's fixed part in it, and the glob pattern below that (None without wildcards)."""
    if "://" in path:
        address, question, query = path.partition("?")
        fixed, pattern = _split_glob(address, "*[")
        filesystem, inside = fs.FileSystem.from_uri(fixed + question + query)
        return filesystem, inside, pattern
    local = os.path.abspath(os.path.expanduser(path))
    if os.path.exists(local):  # a name may hold brackets without being a pattern
        return fs.LocalFileSystem(), local, None
    return fs.LocalFileSystem(), *_split_glob(local, "*[?")


def _split_glob(path: str, wildcards: str) -> tuple[str, str | None]:
    first = min((path.index(mark) for mark in wildcards if mark in path), default=None)
    if first is None:
        return path, None
    cut = path.rindex("/", 0, first)
    return path[:cut] or "/", path[cut + 1 :]


def _list(filesystem: fs.FileSystem, fixed: str, pattern: str | None) -> Iterator[_Listed]:
    info = filesystem.get_file_info(fixed)
    if pattern is None:
        yield from _expand(filesystem, [info], fixed)
    elif info.type == fs.FileType.Directory:
        parts = pattern.split("/")
        below = filesystem.get_file_info(fs.FileSelector(fixed, recursive=len(parts) > 1))
        matches = [entry for entry in below if _matches(_parts_below(entry.path, fixed), parts)]
        yield from _expand(filesystem, matches, fixed)


def _expand(filesystem: fs.FileSystem, entries: Iterable[fs.FileInfo], root: str) -> Iterator[_Listed]:
    for entry in entries:
        if entry.type == fs.FileType.File:
            yield _Listed(entry.path, entry.size or 0, entry.mtime_ns, root)
        elif entry.type == fs.FileType.Directory:
            for below in filesystem.get_file_info(fs.FileSelector(entry.path, recursive=True)):
                # Spark and others leave _SUCCESS, _temporary/ and .crc files beside the data.
                hidden = any(part[:1] in "._" for part in _parts_below(below.path, entry.path))
                if below.type == fs.FileType.File and below.extension == "parquet" and not hidden:
                    yield _Listed(below.path, below.size or 0, below.mtime_ns, root)


def _parts_below(path: str, root: str) -> list[str]:
    return path[len(root) :].strip("/").split("/")


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Glob match part by part; `**` stands for any number of folders, none included."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _read_footer(filesystem: fs.FileSystem, file: _Listed, where: str) -> SourceFile:
    try:
        footer = pq.read_metadata(file.path, filesystem=filesystem)
        schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError, ValueError) as error:
        what = f"{where}: {file.path} is not a readable Parquet file"
        raise unreadable(error, what, "write it again or leave it out") from error
    groups = (footer.row_group(index) for index in range(footer.num_row_groups))
    return SourceFile(
        path=file.path,
        size=file.size,
        mtime_ns=file.mtime_ns,
        partitions=_hive_columns(_parts_below(file.path, file.root)[:-1]),
        columns=tuple((field.name, field.type) for field in schema),
        row_groups=tuple((group.num_rows, group.total_byte_size) for group in groups),
    )


def _hive_columns(folders: Sequence[str]) -> tuple[tuple[str, str | None], ...]:
    pairs = [folder.split("=", 1) for folder in folders if "=" in folder]
    values = [(name, urllib.parse.unquote(value)) for name, value in pairs]
    return tuple((name, None if value == _HIVE_NULL else value) for name, value in values)
