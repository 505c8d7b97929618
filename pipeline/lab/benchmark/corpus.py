"""Tokenising through Ray Data: rate against the bare fast tokenizer, memory by corpus size, the second night."""

import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from pipeline.backbone.files import architecture_of, find_model, read_config, read_tokenizer, save_description
from pipeline.corpus.encoding import KEPT_WORDS, TokenizerSpec, load_tokenizer, tokenizer_content
from pipeline.corpus.files import inspect_files
from pipeline.corpus.reader import SplitRef, open_split
from pipeline.corpus.rows import Recipe, row_identities
from pipeline.corpus.task_corpus import prepare_task
from pipeline.corpus.template import parse_template
from pipeline.lab.benchmark.bare_tokenizer import BareWay, Run, bare_ways, run_bare
from pipeline.lab.benchmark.corpus_files import read_sentences, write_corpus
from pipeline.lab.benchmark.ranks import end_with_parent
from pipeline.lab.benchmark.side_by_side import write_json
from pipeline.settings import ClusterSettings, TaskSettings
from pipeline.tuning.connection import connected_ray
from pipeline.tuning.machine import device_name, peak_bytes

_CHECKED_ROWS = 2000
_SAMPLE_SECONDS = 0.5
_WARM_UP_MEGABYTES = 4.0
# Name -> halves of sentences a text (see write_corpus): a sentence's length, and a document's.
_TEXTS = {"rows": 3, "documents": 60}


@dataclass(frozen=True)
class Bare:
    """The bare tokenizer in one way, round by round."""

    rates: Sequence[float]
    """Input tokens a second."""
    ratio: tuple[float, float, float]
    """Of our rate to its: least, median and greatest over the rounds."""
    cpu_ratio: tuple[float, float, float]
    """The same of tokens a second of one core, all of Ray's processes included: steadier on a busy machine."""


@dataclass(frozen=True)
class Speed:
    """Of one kind of text in one size."""

    texts: str
    tokens_a_text: float
    megabytes: float
    way: BareWay
    """The fastest one of the bare tokenizer."""
    bare: Bare
    """As it comes."""
    keeping: Bare
    """Keeping the tokens of as many words as ours does."""
    ours: Sequence[float]
    """Input tokens a second from Parquet files to a published shard folder; Ray's workers run already."""


@dataclass(frozen=True)
class Night:
    """One corpus size: its first night in a fresh process on a fresh Ray, and the next one with nothing changed.

    Only making the shards: a rank that tunes holds a whole split's tokens in memory (`TokenSet`).
    """

    megabytes: float
    rows: int
    first_seconds: float
    second_seconds: float
    driver_mib: int
    """Most resident memory of the process that calls: nearly all of it libraries, torch among them."""
    worker_mib: int
    """Of the greatest worker of Ray."""
    workers_mib: int
    """Of all workers, each at its greatest."""


@dataclass(frozen=True)
class CorpusFigures:
    device: str
    cores: int
    speed: Sequence[Speed]
    nights: Sequence[Night]


def measure_corpus(
    data: Path,
    model: str,
    megabytes: Sequence[float],
    rounds: int,
    speed_megabytes: Sequence[float],
    scratch: Path | None,
) -> CorpusFigures:
    """Generate corpora below `scratch` (deleted after), and measure. Raises: CorpusError, BackboneError.

    megabytes: of Parquet, one size a night. speed_megabytes: the same of the rounds against the bare tokenizer.
    """
    sentences, cores = read_sentences(data), psutil.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = Path(folder)
        spec = _save_tokenizer(model, place / "model")
        nights = [_measure_nights(place, size, sentences, spec) for size in megabytes]
        with connected_ray(ClusterSettings()):
            speed = [
                _measure_speed(place, size, sentences, texts, spec, rounds, cores)
                for size in speed_megabytes
                for texts in _TEXTS
            ]
    return CorpusFigures(device_name(), cores, speed, nights)


def save_figures(path: Path, figures: CorpusFigures) -> None:
    write_json(path, asdict(figures))


def _save_tokenizer(model: str, folder: Path) -> TokenizerSpec:
    files = find_model(model)
    config = read_config(files)
    save_description(config, read_tokenizer(files), folder)
    return TokenizerSpec(str(folder), "of the benchmark", architecture_of(config))


def _measure_speed(
    place: Path,
    megabytes: float,
    sentences: Sequence[str],
    texts: str,
    spec: TokenizerSpec,
    rounds: int,
    cores: int,
) -> Speed:
    small, file = place / "small.parquet", place / "speed.parquet"
    write_corpus(small, min(megabytes, _WARM_UP_MEGABYTES), sentences, _TEXTS[texts])
    rows = write_corpus(file, megabytes, sentences, _TEXTS[texts])
    content = tokenizer_content(load_tokenizer(spec.dir))
    # Before the rounds: start Ray's workers, and find the bare tokenizer's fastest way.
    _build(small, spec, place)
    rates = {way: run_bare(content, small, way).rate for way in bare_ways(cores)}
    way = max(rates, key=rates.__getitem__)
    keeping_way = replace(way, kept_words=KEPT_WORDS)
    bare, keeping, ours = [], [], []
    for round_ in range(rounds):
        bare.append(run_bare(content, file, way))
        keeping.append(run_bare(content, file, keeping_way))
        ours.append(_build(file, spec, place, check=round_ == 0))
        tokens = bare[-1].tokens
        assert ours[-1].tokens == tokens, f"{ours[-1].tokens} input tokens where the bare tokenizer has {tokens}"
    return Speed(
        texts=texts,
        tokens_a_text=bare[0].tokens / rows,
        megabytes=round(file.stat().st_size / 1e6, 1),
        way=way,
        bare=_compared(bare, ours),
        keeping=_compared(keeping, ours),
        ours=[round(run.rate) for run in ours],
    )


def _compared(bare: Sequence[Run], ours: Sequence[Run]) -> Bare:
    return Bare(
        rates=[round(run.rate) for run in bare],
        ratio=_spread([mine.rate / theirs.rate for mine, theirs in zip(ours, bare, strict=True)]),
        cpu_ratio=_spread([mine.cpu_rate / theirs.cpu_rate for mine, theirs in zip(ours, bare, strict=True)]),
    )


def _spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    return min(ratios), statistics.median(ratios), max(ratios)


def _build(file: Path, spec: TokenizerSpec, place: Path, check: bool = False) -> Run:
    """Build the shards, look at them, and delete them."""
    from pipeline.corpus.shards import build_shards  # imports ray

    source, storage = inspect_files(str(file), "benchmark"), place / "storage"
    templates = parse_template("{text}", "benchmark"), parse_template("{label}", "benchmark")
    recipe = Recipe(*templates, " ", 10**6, 10**6, spec.architecture)
    begin, cpu_begin = time.perf_counter(), _cpu_seconds()
    folder = build_shards(source, recipe, spec, storage, connect=lambda: None)
    seconds, cpu_seconds = time.perf_counter() - begin, _cpu_seconds() - cpu_begin
    if check:
        _check_ids(file, folder, spec)
    tokens = json.loads((folder / "manifest.json").read_text())["input_tokens"]
    shutil.rmtree(storage)
    return Run(tokens, seconds, cpu_seconds)


def _cpu_seconds() -> float:
    """Of this process and all that it started, Ray's servers and workers among them."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(time_.user + time_.system for time_ in times)


def _check_ids(file: Path, folder: Path, spec: TokenizerSpec) -> None:
    """The shards hold what transformers' own call gives for the file's first rows."""
    first = next(pq.ParquetFile(file).iter_batches(_CHECKED_ROWS)).to_pydict()
    tokens, tokenizer = open_split(SplitRef(str(folder))), load_tokenizer(spec.dir)
    places = np.searchsorted(tokens.row_ids, row_identities(first["text"], first["label"]))
    for place, expected in zip(places, tokenizer(first["text"])["input_ids"], strict=True):
        assert tokens.input_ids(place).tolist() == expected, "other ids than the tokenizer's own"


def _measure_nights(place: Path, megabytes: float, sentences: Sequence[str], spec: TokenizerSpec) -> Night:
    file, storage = place / "nights.parquet", place / "storage"
    rows = write_corpus(file, megabytes, sentences)
    first = _in_fresh_process(_prepare, file, spec, storage)
    second = _in_fresh_process(_prepare, file, spec, storage)
    assert first["digest"] == second["digest"]
    size = round(file.stat().st_size / 1e6, 1)
    file.unlink()
    shutil.rmtree(storage)
    memory = {name: first[name] for name in ("driver_mib", "worker_mib", "workers_mib")}
    return Night(size, rows, first["seconds"], second["seconds"], **memory)


def _in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent) as process:
        return process.submit(function, *args).result()


def _prepare(file: Path, spec: TokenizerSpec, storage: Path) -> dict[str, Any]:
    task = TaskSettings.model_validate({"train": str(file), "dev_fraction": 0.1, "max_bad_rows": 0.0})
    with connected_ray(ClusterSettings()), _worker_peaks() as peaks:
        begin = time.perf_counter()
        corpus = prepare_task("benchmark", task, spec, storage)
        seconds = time.perf_counter() - begin
    return {
        "seconds": round(seconds, 2),
        "digest": corpus.digest,
        "driver_mib": peak_bytes() // 2**20,
        "worker_mib": max(peaks.values(), default=0),
        "workers_mib": sum(peaks.values()),
    }


@contextmanager
def _worker_peaks() -> Iterator[dict[int, int]]:
    """Most resident MiB of each of this process' Ray workers, by process id; complete after the block."""
    peaks: dict[int, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(_SAMPLE_SECONDS):
            for process in psutil.Process().children(recursive=True):
                peak = _worker_peak(process.pid)
                if peak is not None:
                    peaks[process.pid] = peak

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
        time.sleep(2 * _SAMPLE_SECONDS)
    finally:
        ended.set()
        watcher.join()


def _worker_peak(pid: int) -> int | None:
    """MiB; None for a process that is gone, is no worker of Ray, or has not had a task yet."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    # The kernel keeps the peak itself, so that nothing between two looks is missed.
    peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(peak) // 1024 if peak is not None and name.startswith("ray::") else None
