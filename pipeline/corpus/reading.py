"""One read unit (some rows of one file) -> batches of column texts, in bounded memory for any file."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.corpus.class_names import UnnamedClassError, named_texts
from pipeline.corpus.files import ParquetSource, SourceFile, of_its_store, one_line, unreadable
from pipeline.corpus.pages import PageHeaderError
from pipeline.corpus.read_steps import STREAM_BUFFER, OversizedPageError, rows_per_step
from pipeline.corpus.values import column_texts, fraction_error
from pipeline.errors import CorpusError

_UNITS = 64
_LEAST_UNIT_BYTES, _MOST_UNIT_BYTES = 2 * 2**20, 16 * 2**20
# A task costs Ray some 20 ms of several processes' time, which is what half a mebibyte of text takes.
_LEAST_TASK_BYTES = 2**20
# A slice reads and drops the rows before it. That costs about a hundredth of tokenising them.
_MOST_SLICES = 16
_BATCH_BYTES = 2**20
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class ReadUnit:
    """Rows `first` to `end` (not included) of some row groups of one file."""

    file: SourceFile
    row_groups: tuple[int, ...]
    first: int
    end: int

    @property
    def row_bytes(self) -> float:
        """Mean uncompressed bytes of a row in these row groups."""
        rows, size = map(sum, zip(*(self.file.row_groups[group] for group in self.row_groups), strict=True))
        return size / rows

    @property
    def batch_rows(self) -> int:
        """Rows of about a mebibyte together; a tokenizer needs many times the memory of its text."""
        return max(1, int(min(_BATCH_ROWS, _BATCH_BYTES / max(self.row_bytes, 1))))


def read_units(source: ParquetSource) -> tuple[ReadUnit, ...]:
    """Cut the files into units of similar size, enough of them to keep many cores busy to the end.

    A unit is some neighbouring row groups, or a slice of a large one.
    """
    size = sum(nbytes for file in source.files for _, nbytes in file.row_groups)
    unit_bytes = min(max(size // _UNITS, _LEAST_UNIT_BYTES), _MOST_UNIT_BYTES)
    return tuple(unit for file in source.files for unit in _cut(file, unit_bytes))


def group_units(units: Iterable[tuple[int, ReadUnit]]) -> tuple[tuple[tuple[int, ReadUnit], ...], ...]:
    """Group neighbouring units, each with a number of the caller's, until they are worth a Ray task.

    A corpus may be thousands of small files, and a job thousands of small corpora.
    """
    tasks: list[tuple[tuple[int, ReadUnit], ...]] = []
    waiting: list[tuple[int, ReadUnit]] = []
    size = 0.0
    for number, unit in units:
        waiting.append((number, unit))
        size += unit.row_bytes * (unit.end - unit.first)
        if size >= _LEAST_TASK_BYTES:
            tasks.append(tuple(waiting))
            waiting, size = [], 0.0
    return (*tasks, tuple(waiting)) if waiting else tuple(tasks)


def _cut(file: SourceFile, unit_bytes: int) -> Iterator[ReadUnit]:
    group_ids: list[int] = []
    gathered_rows, size = 0, 0
    for group, (rows, nbytes) in enumerate(file.row_groups):
        if group_ids and size + nbytes > unit_bytes:
            yield ReadUnit(file, tuple(group_ids), 0, gathered_rows)
            group_ids, gathered_rows, size = [], 0, 0
        if nbytes > unit_bytes:
            yield from _slices(file, group, rows, nbytes, unit_bytes)
        elif rows:
            group_ids.append(group)
            gathered_rows, size = gathered_rows + rows, size + nbytes
    if group_ids:
        yield ReadUnit(file, tuple(group_ids), 0, gathered_rows)


def _slices(file: SourceFile, group: int, rows: int, nbytes: int, unit_bytes: int) -> Iterator[ReadUnit]:
    count = min(-(-nbytes // unit_bytes), _MOST_SLICES, rows)
    bounds = [rows * slice_ // count for slice_ in range(count + 1)]
    for first, end in pairwise(bounds):
        yield ReadUnit(file, (group,), first, end)


def read_texts(
    filesystem: fs.FileSystem,
    unit: ReadUnit,
    columns: Sequence[str],
    where: str,
    integer_columns: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[tuple[int, dict[str, list[str | None]]]]:
    """Yield (B, column -> [B] texts) until the unit is read; `OverLong` stands for a cell that is too long.

    integer_columns: columns whose floats are to be written as integers, each with a file that holds integers there.
    Raises: CorpusError naming the file when its pages are damaged or too large, its text is not UTF-8, a column of
    `integer_columns` holds a fraction, or the memory does not suffice.
    """
    own = [name for name in columns if name in dict(unit.file.columns)]
    fixed = {name: value for name, value in unit.file.partitions if name in columns and name not in own}
    try:
        # Not `pre_buffer`: it holds a whole row group's columns at once (see `shards`).
        with pq.ParquetFile(
            unit.file.path,
            filesystem=filesystem,
            pre_buffer=False,
            buffer_size=STREAM_BUFFER,
            page_checksum_verification=True,
        ) as file:
            # One thread, so that the memory is that of one batch; Ray runs a task on every core.
            step = _safe_step(filesystem, unit, file.metadata, own, where)
            batches = file.iter_batches(step, list(unit.row_groups), own, use_threads=False)
            for rows, texts in _gathered_texts(
                _between(batches, unit.first, unit.end), unit, where, own, integer_columns
            ):
                yield rows, texts | {name: [value] * rows for name, value in fixed.items()}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: {unit.file.path} holds text that is not UTF-8; write it again as UTF-8") from error
    except CorpusError:
        raise
    except MemoryError as error:  # Arrow's own memory error is one, too
        raise CorpusError(
            f"{where}: the memory did not suffice to read {unit.file.path} ({one_line(error) or 'no more was given'}); "
            "give the job more, or write the file with smaller pages and row groups"
        ) from error
    except Exception as error:
        if not of_its_store(error, filesystem):
            raise
        raise unreadable(error, f"{where}: {unit.file.path} is damaged", "write it again or leave it out") from error


def _safe_step(
    filesystem: fs.FileSystem, unit: ReadUnit, footer: pq.FileMetaData, columns: Sequence[str], where: str
) -> int:
    """Rows to read at a time. Raises: CorpusError naming the row group with a page that is damaged or too large."""
    step = unit.batch_rows
    with filesystem.open_input_file(unit.file.path) as file:
        for group in unit.row_groups:
            of_group = footer.row_group(group)
            for chunk in map(of_group.column, range(of_group.num_columns)):
                if chunk.path_in_schema not in columns:
                    continue
                try:
                    step = rows_per_step(file, footer, chunk, group, step, unit.end)
                except (OversizedPageError, PageHeaderError) as error:
                    place = f"{unit.file.path}, row group {group}, column {chunk.path_in_schema!r}"
                    raise CorpusError(f"{where}: {place} {error}") from error
    return step


def _gathered_texts(
    batches: Iterable[pa.RecordBatch],
    unit: ReadUnit,
    where: str,
    columns: Sequence[str],
    integer_columns: Mapping[str, str],
) -> Iterator[tuple[int, dict[str, list[str | None]]]]:
    """Join the texts of small steps until they are a full batch or a mebibyte."""
    rows, size = 0, 0
    waiting: dict[str, list[str | None]] = {name: [] for name in columns}
    for batch in batches:
        for name in columns:
            waiting[name].extend(_texts(batch[name], unit.file, name, integer_columns.get(name), where))
            size += batch[name].nbytes
        rows += batch.num_rows
        if rows >= unit.batch_rows or size >= _BATCH_BYTES:
            yield rows, waiting
            rows, size, waiting = 0, 0, {name: [] for name in columns}
    if rows:
        yield rows, waiting


def _texts(column: pa.Array, file: SourceFile, name: str, of_integers: str | None, where: str) -> list[str | None]:
    names = dict(file.class_names).get(name)
    try:
        return (
            column_texts(column, as_integers=of_integers is not None) if names is None else named_texts(column, names)
        )
    except UnicodeDecodeError:
        raise
    except UnnamedClassError as error:
        raise CorpusError(f"{where}: {file.path} holds {error}; fix the rows or the names") from error
    except ValueError as error:
        raise fraction_error(where, file.path, name, error, of_integers or "") from error


def _between(batches: Iterable[pa.RecordBatch], first: int, end: int) -> Iterator[pa.RecordBatch]:
    """The rows `first` to `end` (not included) of the concatenated `batches`."""
    start = 0
    for batch in batches:
        low, high = max(first - start, 0), min(end - start, batch.num_rows)
        if low < high:
            yield batch.slice(low, high - low)
        start += batch.num_rows
        if start >= end:
            return
