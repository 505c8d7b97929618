"""A corpus that grew by one file: what the night costs, against the first one and against building all of it anew."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.backbone.files import architecture_of, find_model, read_config, read_tokenizer, save_config_and_tokenizer
from pipeline.corpus.encoding import TokenizerSpec
from pipeline.corpus.reader import SplitRef, open_split
from pipeline.corpus.task_corpus import TaskCorpus, prepare_task
from pipeline.lab.benchmark.corpus_files import read_sentences, write_corpus
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.settings import ClusterSettings, TaskSettings
from pipeline.tuning.connection import connected_ray
from pipeline.tuning.machine import device_name

_COMPARED_ROWS = 2000


@dataclass(frozen=True)
class GrownCorpus:
    """Seconds of `prepare_task`, on a Ray that runs already; a night that needs none starts none."""

    device: str
    files: int
    megabytes: float
    rows: int
    new_rows: int
    first_seconds: float
    grown_seconds: float
    """The night with one file more."""
    unchanged_seconds: float
    anew_seconds: float
    """The grown corpus from nothing."""
    shrunk_seconds: float
    """A night with one file less, which needs no Ray."""

    @property
    def share(self) -> float:
        """What the night with new rows costs of the first one."""
        return self.grown_seconds / self.first_seconds


def measure_grown(data: Path, model: str, megabytes: float, files: int, scratch: Path | None) -> GrownCorpus:
    """Generate a corpus of so many files and one more, and delete it. Raises: CorpusError, BackboneError."""
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = Path(folder)
        model_files = find_model(model)
        config = read_config(model_files)
        save_config_and_tokenizer(config, read_tokenizer(model_files), place / "model")
        spec = TokenizerSpec(str(place / "model"), "of the benchmark", architecture_of(config))
        rows = _write_parts(place, data, megabytes, files)
        corpus, more = place / "corpus", place / f"{files:04d}.parquet"
        with connected_ray(ClusterSettings()):
            _prepare(place / "one.parquet", spec, place / "warm_up")  # Ray's workers start here
            first, _ = _prepare(corpus, spec, place / "storage")
            unchanged, _ = _prepare(corpus, spec, place / "storage")
            more.rename(corpus / more.name)
            grown, made = _prepare(corpus, spec, place / "storage")
            anew, other = _prepare(corpus, spec, place / "anew")
            _assert_same(made, other)
            (corpus / more.name).rename(more)
            (corpus / "0000.parquet").unlink()
            shrunk, _ = _prepare(corpus, spec, place / "storage")
    size = round(megabytes, 1)
    return GrownCorpus(device_name(), files, size, sum(rows[:-1]), rows[-1], first, grown, unchanged, anew, shrunk)


def save_grown(path: Path, figures: GrownCorpus) -> None:
    write_figures(path, {**asdict(figures), "share": figures.share})


def _write_parts(place: Path, data: Path, megabytes: float, files: int) -> list[int]:
    """`files` equal files in `corpus`, one more beside it, and a small one; -> the rows of each of the first."""
    write_corpus(place / "one.parquet", 1.0, read_sentences(data))
    write_corpus(place / "all.parquet", megabytes * (files + 1) / files, read_sentences(data))
    whole = pq.ParquetFile(place / "all.parquet")
    (place / "corpus").mkdir()
    each = whole.metadata.num_rows // (files + 1)
    waiting: list[pa.RecordBatch] = []
    rows, number = [], 0
    for batch in whole.iter_batches(each):
        waiting.append(batch)
        if number <= files:
            folder = place / "corpus" if number < files else place
            pq.write_table(pa.Table.from_batches(waiting), folder / f"{number:04d}.parquet", compression="none")
            rows.append(sum(part.num_rows for part in waiting))
            waiting, number = [], number + 1
    (place / "all.parquet").unlink()
    return rows


def _prepare(corpus: Path, spec: TokenizerSpec, storage: Path) -> tuple[float, TaskCorpus]:
    task = TaskSettings.model_validate({"train": str(corpus), "dev_fraction": 0.1, "max_bad_rows": 0.0})
    start = time.perf_counter()
    made = prepare_task("benchmark", task, spec, storage)
    return round(time.perf_counter() - start, 2), made


def _assert_same(one: TaskCorpus, other: TaskCorpus) -> None:
    assert (one.digest, one.counts, one.labels) == (other.digest, other.counts, other.labels)
    for split in one.splits:
        assert _rows(one.splits[split]) == _rows(other.splits[split]), "the same corpus has other rows"


def _rows(ref: SplitRef) -> Sequence[tuple[int, list[int], list[int], str]]:
    few = open_split(ref, _COMPARED_ROWS)
    return [
        (int(few.row_ids[row]), few.input_ids(row).tolist(), few.target_ids(row).tolist(), few.target(row))
        for row in range(len(few))
    ]
