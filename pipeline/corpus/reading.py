"""One read unit (some row groups of one file) -> batches of column texts, in a memory that no file can raise."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from pipeline.corpus.files import Source, SourceFile, one_line
from pipeline.corpus.template import column_texts
from pipeline.errors import CorpusError

_UNIT_BYTES = 64 * 2**20
_BATCH_BYTES = 2**20
_BATCH_ROWS = 1024
_STREAM_BUFFER = 2**20


@dataclass(frozen=True)
class ReadUnit:
    """What one Ray task reads at a time."""

    file: SourceFile
    row_groups: tuple[int, ...]

    @property
    def batch_rows(self) -> int:
        """Rows that come to about a mebibyte: a tokenizer needs many times its text."""
        rows, size = map(sum, zip(*(self.file.row_groups[group] for group in self.row_groups), strict=True))
        return max(1, min(_BATCH_ROWS, _BATCH_BYTES * rows // max(size, 1)))


def read_units(source: Source) -> tuple[ReadUnit, ...]:
    """Cut the files into units of neighbouring row groups, none over 64 MiB unless a single row group is."""
    units: list[ReadUnit] = []
    for file in source.files:
        group_ids: list[int] = []
        size = 0
        for group, (rows, nbytes) in enumerate(file.row_groups):
            if group_ids and size + nbytes > _UNIT_BYTES:
                units.append(ReadUnit(file, tuple(group_ids)))
                group_ids, size = [], 0
            if rows:
                group_ids.append(group)
                size += nbytes
        if group_ids:
            units.append(ReadUnit(file, tuple(group_ids)))
    return tuple(units)


def read_texts(
    filesystem: fs.FileSystem, unit: ReadUnit, columns: Sequence[str], where: str
) -> Iterator[tuple[int, dict[str, list[str | None]]]]:
    """Yield (rows B, column -> [B] texts) until the unit is read.

    Raises: CorpusError naming the file when its pages are damaged or its text is not UTF-8.
    """
    own = [name for name in columns if name in dict(unit.file.columns)]
    fixed = {name: value for name, value in unit.file.partitions if name in columns and name not in own}
    try:
        # Not `pre_buffer`: it holds a whole row group's columns at once (see `shards`).
        with pq.ParquetFile(
            unit.file.path,
            filesystem=filesystem,
            pre_buffer=False,
            buffer_size=_STREAM_BUFFER,
            page_checksum_verification=True,
        ) as file:
            for batch in file.iter_batches(unit.batch_rows, list(unit.row_groups), own, use_threads=False):
                texts = {name: column_texts(batch[name]) for name in own}
                yield batch.num_rows, texts | {name: [value] * batch.num_rows for name, value in fixed.items()}
    except UnicodeDecodeError as error:
        raise CorpusError(f"{where}: {unit.file.path} holds text that is not UTF-8; write it again as UTF-8") from error
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(
            f"{where}: {unit.file.path} is damaged ({one_line(error)}); write it again or leave it out"
        ) from error
