"""What a rank holds of a split, by the split's size: mapped from disk, and read into memory for comparison."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.corpus.reader import SplitRef, open_split
from pipeline.corpus.rows import SHARD_SCHEMA
from pipeline.corpus.tally import EMPTY_TALLY
from pipeline.corpus.token_set import TokenSet, token_set
from pipeline.corpus.writing import complete_folder, read_shard, write_shard
from pipeline.lab.benchmark.ranks import end_with_parent
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.sealed_files import file_digest
from pipeline.settings import TaskSettings
from pipeline.tuning.evaluate import wanted_texts
from pipeline.tuning.machine import device_name
from pipeline.tuning.step import TrialStep, batch_of_step
from pipeline.tuning.trials import make_trial

_TOKENS_A_ROW = 250
_SHARD_BYTES = 256 * 10**6
_TABLE_ROWS = 8192
_EVAL_ROWS = 500


@dataclass(frozen=True)
class RankMemory:
    """Anonymous memory, which is all but the pages of files that the system can take back at any time; MiB."""

    megabytes: float
    """Tokens of the split."""
    rows: int
    way: str
    before: float
    """With all libraries loaded."""
    opened: float
    stepped: float
    """After some steps and an evaluation."""
    opening_seconds: float
    """Reading the files once for their digests included."""
    step_milliseconds: float
    """To take a step's rows and read all of their tokens; the files are in the system's page cache."""


def measure_split_memory(
    megabytes: Sequence[float], steps: int, in_memory: bool, scratch: Path | None
) -> list[RankMemory]:
    """Generate splits below `scratch`, measure each in a fresh process, and delete them.

    in_memory: also read each into memory whole, as ranks did before shards were mapped.
    """
    figures = []
    for size in megabytes:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            write_split(Path(folder), size)
            for way in ("mapped", *(("in memory",) if in_memory else ())):
                with ProcessPoolExecutor(
                    1, mp_context=get_context("spawn"), initializer=end_with_parent
                ) as fresh_process:
                    figures.append(fresh_process.submit(_use, Path(folder), size, way, steps).result())
    return figures


def save_split_memory(path: Path, figures: Sequence[RankMemory]) -> None:
    write_figures(path, {"device": device_name(), "splits": [asdict(split) for split in figures]})


def write_split(folder: Path, megabytes: float) -> int:
    """A shard folder of so many MB of random tokens; -> its rows."""
    digests, total, left = {}, EMPTY_TALLY, int(megabytes * 1e6 / 4 / _TOKENS_A_ROW)
    while left:
        rows = min(left, _SHARD_BYTES // 4 // _TOKENS_A_ROW)
        path = folder / f"{left:010d}.arrow"
        total += write_shard(path, _random_tables(rows, seed=left))
        digests[path.name], left = file_digest(path), left - rows
    complete_folder(folder, digests, total, {})
    return total.rows.summary.rows


def _random_tables(rows: int, seed: int) -> Iterator[pa.Table]:
    chance = np.random.default_rng(seed)
    for first in range(0, rows, _TABLE_ROWS):
        count = min(_TABLE_ROWS, rows - first)
        lengths = chance.integers(_TOKENS_A_ROW // 2, 3 * _TOKENS_A_ROW // 2, count)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = chance.integers(3, 30_000, offsets[-1]).astype(np.int32)
        labels = chance.integers(0, 2, count).astype(np.int32)
        targets = np.stack([labels + 5, np.full(count, 1)], axis=1).astype(np.int32)
        ends = np.arange(0, 2 * count + 1, 2, dtype=np.int32)
        columns = [
            chance.integers(0, 2**63, count).astype(np.uint64) * 2,
            np.zeros(count, np.int8),
            pa.ListArray.from_arrays(offsets, tokens),
            pa.ListArray.from_arrays(ends, targets.ravel()),
            pa.array(["no", "yes"]).take(pa.array(labels)),
        ]
        yield pa.table(columns, schema=SHARD_SCHEMA)


def _use(folder: Path, megabytes: float, way: str, steps: int) -> RankMemory:
    """What a rank does with a split, except for the model."""
    before, start = _anonymous_mib(), time.perf_counter()
    train = open_split(SplitRef(str(folder))) if way == "mapped" else _held(folder)
    opening, opened = time.perf_counter() - start, _anonymous_mib()
    settings = TaskSettings.model_validate({"train": "x", "dev": "x", "batch_size": 64})
    part = TrialStep(make_trial("x", settings, 0, "d", "b"), None, 0, train)  # type: ignore[arg-type]
    start, seen = time.perf_counter(), 0
    for step in range(steps):
        batch = batch_of_step([TrialStep(part.trial, part.prompt, step, train)])
        seen += sum(int(train.input_ids(row.number).sum() + train.target_ids(row.number).sum()) for row in batch)
    took = time.perf_counter() - start
    assert seen and len(wanted_texts("accuracy", train.head(_EVAL_ROWS), None)) == min(_EVAL_ROWS, len(train))
    return RankMemory(
        megabytes, len(train), way, before, opened, _anonymous_mib(), round(opening, 2), round(1e3 * took / steps, 2)
    )


def _held(folder: Path) -> TokenSet:
    table = pa.Table.from_batches([batch for path in sorted(folder.glob("*.arrow")) for batch in read_shard(path)])
    return token_set(table.take(pa.array(np.arange(len(table)))))  # a copy of all of it


def _anonymous_mib() -> float:
    pa.default_memory_pool().release_unused()
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = next(line.split()[1] for line in lines if line.startswith("RssAnon:"))
    return round(int(kib) / 1024, 1)
