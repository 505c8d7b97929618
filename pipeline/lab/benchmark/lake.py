"""The rate at which a table's rows are read, against the very same files as plain Parquet."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pyarrow as pa
from rich.table import Table

from pipeline.corpus.reading import read_texts, read_units
from pipeline.corpus.source_files import ParquetSource
from pipeline.corpus.sources import open_split_source
from pipeline.lab.benchmark.corpus_files import read_sentences, write_corpus
from pipeline.settings import Split, SplitSettings

_FILE_MEGABYTES = 250.0
_HERE = "benchmark"


@dataclass(frozen=True)
class Rate:
    """How one kind of corpus was read, in one process."""

    kind: str
    rows: int
    megabytes: float
    """Of texts."""
    open_seconds: float
    """To look up files and read their footers."""
    by_cpu: tuple[float, ...]
    """Megabytes a second of CPU time, round by round."""
    by_wall: tuple[float, ...]
    """Megabytes a second."""


def measure_tables(data: Path, gigabytes: float, rounds: int, scratch: Path | None) -> list[Rate]:
    """Read plain Parquet, a Delta table of the same files, and both with a filter that a third of the rows pass.

    The sides run in turn. Raises: CorpusError.
    """
    import deltalake

    with tempfile.TemporaryDirectory(dir=scratch) as place:
        table, plain = Path(place, "delta"), Path(place, "plain")
        table.mkdir()
        plain.mkdir()
        sentences = read_sentences(data)
        for number in range(max(1, round(gigabytes * 1000 / _FILE_MEGABYTES))):
            file = table / f"part-{number}.parquet"
            write_corpus(file, min(_FILE_MEGABYTES, gigabytes * 1000), sentences, pieces=12)
            os.link(file, plain / file.name)
        deltalake.convert_to_deltalake(str(table))
        where = "label = 'neutral'"
        sides: dict[str, Split] = {
            "Parquet": str(plain),
            "Delta": f"delta://{table}",
            "Parquet, filtered": SplitSettings(path=str(plain), where=where),
            "Delta, filtered": SplitSettings(path=f"delta://{table}", where=where),
        }
        return _in_turn(sides, rounds)


def _in_turn(sides: Mapping[str, Split], rounds: int) -> list[Rate]:
    read = [{kind: _read(split) for kind, split in sides.items()} for _ in range(rounds)]
    return [
        Rate(
            kind,
            read[0][kind][0],
            read[0][kind][1],
            median(one[kind][2] for one in read),
            tuple(one[kind][1] / one[kind][3] for one in read),
            tuple(one[kind][1] / one[kind][4] for one in read),
        )
        for kind in sides
    ]


def _read(split: Split) -> tuple[int, float, float, float, float]:
    """-> rows, megabytes of texts, seconds to open, and CPU and wall seconds to read."""
    source, opened = _timed(lambda: open_split_source(split, _HERE))
    wall, cpu = time.perf_counter(), time.process_time()
    rows, size = 0, 0
    for unit in read_units(source):
        for count, texts in read_texts(source.filesystem, unit, ["text", "label"], _HERE):
            rows += count
            size += sum(len(text or "") for text in texts["text"])
    return rows, size / 1e6, opened, time.process_time() - cpu, time.perf_counter() - wall


def _timed(action: Callable[[], ParquetSource]) -> tuple[ParquetSource, float]:
    begin = time.perf_counter()
    return action(), time.perf_counter() - begin


def rate_table(rates: Sequence[Rate]) -> Table:
    """One row for each kind of corpus."""
    table = Table(title=f"reading in one process, pyarrow {pa.__version__}", title_justify="left")
    for column in ("corpus", "rows", "texts, MB", "open, s", "MB a CPU second", "MB/s"):
        table.add_column(column)
    for rate in rates:
        figures = (", ".join(f"{value:.0f}" for value in values) for values in (rate.by_cpu, rate.by_wall))
        table.add_row(rate.kind, f"{rate.rows:,}", f"{rate.megabytes:,.0f}", f"{rate.open_seconds:.2f}", *figures)
    return table
