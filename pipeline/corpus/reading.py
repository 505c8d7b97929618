"""One read unit (some rows of one file) -> batches of column texts, in bounded memory for any file."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.corpus.class_names import UnnamedClassError, named_texts
from pipeline.corpus.pages import PageHeaderError
from pipeline.corpus.read_steps import STREAM_BUFFER, OversizedPageError, rows_per_step
from pipeline.corpus.row_view import FilterError, Mask, unpack_deleted, viewed
from pipeline.corpus.source_files import ParquetSource, SourceFile, of_its_store, one_line, unreadable
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
        return size / max(rows, 1)

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
    return tuple(unit for file in source.files if file.chosen_groups for unit in _cut(file, unit_bytes))


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
    if file.reader is not None or (file.view is not None and file.view.take is not None):
        yield ReadUnit(file, file.chosen_groups, 0, sum(rows for rows, _ in file.row_groups))  # from beginning to end
        return
    for group in file.chosen_groups:
        rows, nbytes = file.row_groups[group]
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
    with _in_one_sentence(filesystem, unit.file, where):
        batches = _batches(filesystem, unit, own, where)
        for rows, texts in _gathered_texts(batches, unit, where, own, integer_columns):
            yield rows, texts | {name: [value] * rows for name, value in fixed.items()}


def count_rows(filesystem: fs.FileSystem, file: SourceFile, where: str, enough: int) -> int:
    """The rows that are left of a file, counted until there are `enough`. Raises: as `read_texts`."""
    unit = ReadUnit(file, file.chosen_groups, 0, sum(file.row_groups[group][0] for group in file.chosen_groups))
    rows = 0
    with _in_one_sentence(filesystem, file, where):
        for batch in _batches(filesystem, unit, (), where):
            rows += batch.num_rows
            if rows >= enough:
                break
    return rows


def _batches(filesystem: fs.FileSystem, unit: ReadUnit, names: Sequence[str], where: str) -> Iterator[pa.RecordBatch]:
    """The unit's rows, with the columns that templates call `names`."""
    view = unit.file.view
    if view is None:
        yield from _stored_batches(filesystem, unit, names, where)
        return
    stored = dict(view.stored)
    needed = [stored[name] for name in view.needed(names) if name in stored]
    batches = _stored_batches(filesystem, unit, needed, where)
    yield from viewed(batches, view, unit.file.columns, names, _deleted(unit))


@contextmanager
def _in_one_sentence(filesystem: fs.FileSystem, file: SourceFile, where: str) -> Iterator[None]:
    """Turns what reading a file raises into our own errors."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: {file.path} holds text that is not UTF-8; write it again as UTF-8") from error
    except CorpusError:
        raise
    except FilterError as error:
        raise CorpusError(f"{where}: {file.path} holds values to which {error}; fix 'where'") from error
    except MemoryError as error:  # Arrow's own memory error is one, too
        raise CorpusError(
            f"{where}: the memory did not suffice to read {file.path} ({one_line(error) or 'no more was given'}); "
            "give the job more, or write the file with smaller pages and row groups"
        ) from error
    except Exception as error:
        if not of_its_store(error, filesystem):
            raise
        if isinstance(error, FileNotFoundError):
            raise CorpusError(
                f"{where}: {file.path} is gone, so it was removed, or its table vacuumed or replaced, since the job "
                "looked at it; run the job again"
            ) from error
        advice = "write it again or leave it out" if file.reader is None else file.reader.advice
        raise unreadable(error, f"{where}: {file.path} is damaged", advice) from error


def _stored_batches(
    filesystem: fs.FileSystem, unit: ReadUnit, columns: Sequence[str], where: str
) -> Iterator[pa.RecordBatch]:
    """Batches of the file's own columns, as they are stored."""
    if unit.file.reader is not None:
        yield from unit.file.reader.batches(filesystem, unit.file.path, columns, unit.batch_rows)
        return
    # Not `pre_buffer`: it holds a whole row group's columns at once (see `shards`).
    with pq.ParquetFile(
        unit.file.path,
        filesystem=filesystem,
        pre_buffer=False,
        buffer_size=STREAM_BUFFER,
        page_checksum_verification=True,
    ) as file:
        # One thread, so that the memory is that of one batch; Ray runs a task on every core.
        step = _safe_step(filesystem, unit, file.metadata, columns, where)
        batches = file.iter_batches(step, list(unit.row_groups), list(columns), use_threads=False)
        yield from _between(batches, unit.first, unit.end)


def _deleted(unit: ReadUnit) -> Mask | None:
    """[rows of the unit] whether a row is deleted; None where none of the file is."""
    view, sizes = unit.file.view, [rows for rows, _ in unit.file.row_groups]
    if view is None or view.deleted is None:
        return None
    starts = [0, *accumulate(sizes)]
    of_file = unpack_deleted(view.deleted, starts[-1])
    of_groups = [of_file[starts[group] : starts[group + 1]] for group in unit.row_groups]
    return np.concatenate(of_groups)[unit.first : unit.end]


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
