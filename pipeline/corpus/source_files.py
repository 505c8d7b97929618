"""A split's files as the readers take them, and the errors of the stores that they lie in."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import CorpusError, PromptBankError, UnreachableError

if TYPE_CHECKING:
    from pipeline.corpus.row_view import RowView

# How Arrow words that a store is overloaded or does not answer. Arrow has no error classes for these.
_AWAY = re.compile(
    r"AWS Error (NETWORK_CONNECTION|SLOW_DOWN|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|THROTTLING)"
    r"|AWS Error UNKNOWN \(HTTP status 5\d\d\)|curlCode: (6|7|28|35|52|55|56)\b|[Tt]imed out|[Cc]ould ?n.t connect"
    r"|Name or service not known|[Tt]emporary failure in name resolution|Connection (refused|reset)"
    r"|Network is unreachable"
)


class BatchReader(Protocol):
    """Reads a file that is not Parquet, or whose rows only its own library can tell."""

    def batches(
        self, filesystem: fs.FileSystem, path: str, columns: Sequence[str], rows: int
    ) -> Iterator[pa.RecordBatch]:
        """All its rows, at most `rows` at a time, with the columns of these names in the file.

        Raises: ArrowException, OSError, ValueError.
        """

    @property
    def advice(self) -> str:
        """What to do about such an error."""

    def key(self) -> Any:
        """What enters a shard folder's name, as JSON values."""


@dataclass(frozen=True)
class SourceFile:
    """One file as its listing and its footer, or its table, describe it."""

    path: str
    size: int
    mtime_ns: int | None
    partitions: tuple[tuple[str, str | None], ...]
    """Hive columns, from the folders below the path that the user gave."""
    columns: tuple[tuple[str, pa.DataType], ...]
    row_groups: tuple[tuple[int, int], ...]
    """(rows, uncompressed bytes) of each row group."""
    class_names: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """(column, names of its numbers) for each ClassLabel column."""
    view: "RowView | None" = None
    """How its rows become those of the corpus; None where they are these as they stand."""
    reader: BatchReader | None = None
    """None for Parquet. Such a file has one row group, whose sizes may be a guess."""

    @property
    def rows(self) -> int:
        return sum(rows for rows, _ in self.row_groups) if self.view is None else self.view.rows

    @property
    def chosen_groups(self) -> tuple[int, ...]:
        """The row groups that are read."""
        chosen = self.view.row_groups if self.view is not None else None
        return tuple(range(len(self.row_groups))) if chosen is None else chosen

    @property
    def column_names(self) -> tuple[str, ...]:
        own = [name for name, _ in self.columns]
        return (*own, *(name for name, _ in self.partitions if name not in own))


@dataclass(frozen=True)
class TableVersion:
    """The state of a table, or of a repository of the hub, that a split was read from."""

    address: str
    """As the settings name it, without a version."""
    version: str
    """A version, a snapshot's id or a commit."""
    table: str | None = None
    """The table's own id, where it has one."""
    time: str | None = None
    """When the version was written, in UTC, where the table tells."""


@dataclass(frozen=True)
class ParquetSource:
    """All the files of one setting such as `train`, in the order of their paths."""

    where: str
    """Task and setting, which begin every message: "task 'sst2', train"."""
    filesystem: fs.FileSystem
    files: tuple[SourceFile, ...]
    left_out: tuple[str, ...] = ()
    """Data files in the folders that are not read: not Parquet, set aside by their names, or broken links."""
    tables: tuple[TableVersion, ...] = ()
    remarks: tuple[str, ...] = ()
    """What the plan tells of it: types that were inferred, rows that were only estimated."""

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    @property
    def exact(self) -> bool:
        """Whether `rows` is what will be read; with a filter it is the most."""
        return all(file.view is None or file.view.exact for file in self.files)


def unreadable(error: BaseException, what: str, fix: str) -> PromptBankError:
    """The error to raise for `error`: of the corpus, or of a store that may answer later."""
    if _AWAY.search(str(error)):
        return UnreachableError(f"{what} ({one_line(error)}); its store does not answer, so try again later")
    return CorpusError(f"{what} ({one_line(error)}); {fix}")


def one_line(error: BaseException) -> str:
    """An error's message in a form that can stand in brackets inside a sentence."""
    return re.sub(r"\s+", " ", str(error)).strip().rstrip(".")


def of_its_store(error: Exception, filesystem: fs.FileSystem) -> bool:
    """Whether reading failed, and not our code. Stores behind fsspec raise errors of their own libraries."""
    return isinstance(error, pa.ArrowException | OSError | ValueError) or filesystem.type_name.startswith("py::")
