"""Benchmark of tokenising with Ray Data: its rate against the bare tokenizer, its memory, and a second night."""

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

from pipeline.backbone.files import architecture_of, find_model, read_config, read_tokenizer, save_config_and_tokenizer
from pipeline.corpus.encoding import WORD_CACHE_SIZE, TokenizerSpec, load_tokenizer, tokenizer_content
from pipeline.corpus.files import inspect_files
from pipeline.corpus.reader import SplitRef, open_split
from pipeline.corpus.rows import Recipe, row_identities
from pipeline.corpus.task_corpus import prepare_task
from pipeline.corpus.template import parse_template
from pipeline.lab.benchmark.bare_tokenizer import BareWay, TokenizingRun, bare_ways, run_bare
from pipeline.lab.benchmark.corpus_files import read_sentences, write_corpus
from pipeline.lab.benchmark.ranks import end_with_parent
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.settings import ClusterSettings, TaskSettings
from pipeline.tuning.connection import connected_ray
from pipeline.tuning.machine import device_name, peak_bytes

_CHECKED_ROWS = 2000
_SAMPLE_SECONDS = 0.5
_WARM_UP_MEGABYTES = 4.0
# Kind of texts -> half sentences in a text (see write_corpus): as long as a sentence, and as long as a document.
_TEXTS = {"rows": 3, "documents": 60}


@dataclass(frozen=True)
class BareRates:
    """Rates of the bare tokenizer used in one way, round by round."""

    rates: Sequence[float]
    """Input tokens a second."""
    ratio: tuple[float, float, float]
    """Our rate divided by its rate: least, median and greatest over the rounds."""
    cpu_ratio: tuple[float, float, float]
    """The same for tokens a CPU second, with all of Ray's processes counted; steadier on a busy machine."""


@dataclass(frozen=True)
class Speed:
    """Rates for one kind of text in one size."""

    texts: str
    tokens_a_text: float
    megabytes: float
    way: BareWay
    """The fastest way to use the bare tokenizer."""
    bare: BareRates
    """With the bare tokenizer's default cache."""
    keeping: BareRates
    """With a cache for as many words as ours has."""
    ours: Sequence[float]
    """Input tokens a second from Parquet files to a published shard folder; Ray's workers are running already."""


@dataclass(frozen=True)
class NightFigures:
    """One corpus size: its first night in a fresh process on a fresh Ray, and the next one with nothing changed.

    It measures only the making of shards; `split_memory` measures what a rank holds of them.
    """

    megabytes: float
    rows: int
    first_seconds: float
    second_seconds: float
    driver_mib: int
    """Peak resident memory of the calling process, nearly all of which is libraries such as torch."""
    worker_mib: int
    """Peak of Ray's largest worker."""
    workers_mib: int
    """Sum of the peaks of all workers."""


@dataclass(frozen=True)
class CorpusFigures:
    device: str
    cores: int
    speed: Sequence[Speed]
    nights: Sequence[NightFigures]


def measure_corpus(
    data: Path,
    model: str,
    megabytes: Sequence[float],
    rounds: int,
    speed_megabytes: Sequence[float],
    scratch: Path | None,
) -> CorpusFigures:
    """Generate corpora below `scratch`, measure, and delete them. Raises: CorpusError, BackboneError.

    megabytes: sizes of the Parquet files of the nights. speed_megabytes: those of the rounds against the tokenizer.
    """
    sentences, cores = read_sentences(data), psutil.cpu_count() or 1
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        place = Path(folder)
        files = find_model(model)
        config = read_config(files)
        save_config_and_tokenizer(config, read_tokenizer(files), place / "model")
        spec = TokenizerSpec(str(place / "model"), "of the benchmark", architecture_of(config))
        nights = [_measure_nights(place, size, sentences, spec) for size in megabytes]
        with connected_ray(ClusterSettings()):
            speed = [
                _measure_speed(place, size, sentences, texts, spec, rounds, cores)
                for size in speed_megabytes
                for texts in _TEXTS
            ]
    return CorpusFigures(device_name(), cores, speed, nights)


def save_figures(path: Path, figures: CorpusFigures) -> None:
    write_figures(path, asdict(figures))


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
    keeping_way = replace(way, kept_words=WORD_CACHE_SIZE)
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


def _compared(bare: Sequence[TokenizingRun], ours: Sequence[TokenizingRun]) -> BareRates:
    return BareRates(
        rates=[round(run.rate) for run in bare],
        ratio=_spread([mine.rate / theirs.rate for mine, theirs in zip(ours, bare, strict=True)]),
        cpu_ratio=_spread([mine.cpu_rate / theirs.cpu_rate for mine, theirs in zip(ours, bare, strict=True)]),
    )


def _spread(ratios: Sequence[float]) -> tuple[float, float, float]:
    return min(ratios), statistics.median(ratios), max(ratios)


def _build(file: Path, spec: TokenizerSpec, place: Path, check: bool = False) -> TokenizingRun:
    """Build the shards, check them if asked to, and delete them."""
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
    return TokenizingRun(tokens, seconds, cpu_seconds)


def _cpu_seconds() -> float:
    """CPU time of this process and all that it started, which includes Ray's servers and workers."""
    here = psutil.Process()
    times = [process.cpu_times() for process in (here, *here.children(recursive=True))]
    return sum(time_.user + time_.system for time_ in times)


def _check_ids(file: Path, folder: Path, spec: TokenizerSpec) -> None:
    """Check that the shards hold what transformers' own call gives for the file's first rows."""
    first = next(pq.ParquetFile(file).iter_batches(_CHECKED_ROWS)).to_pydict()
    tokens, tokenizer = open_split(SplitRef(str(folder))), load_tokenizer(spec.dir)
    places = np.searchsorted(tokens.row_ids, row_identities(first["text"], first["label"]))
    for place, expected in zip(places, tokenizer(first["text"])["input_ids"], strict=True):
        assert tokens.input_ids(place).tolist() == expected, "other ids than the tokenizer's own"


def _measure_nights(place: Path, megabytes: float, sentences: Sequence[str], spec: TokenizerSpec) -> NightFigures:
    file, storage = place / "nights.parquet", place / "storage"
    rows = write_corpus(file, megabytes, sentences)
    first = _in_fresh_process(_prepare, file, spec, storage)
    second = _in_fresh_process(_prepare, file, spec, storage)
    assert first["digest"] == second["digest"]
    size = round(file.stat().st_size / 1e6, 1)
    file.unlink()
    shutil.rmtree(storage)
    memory = {name: first[name] for name in ("driver_mib", "worker_mib", "workers_mib")}
    return NightFigures(size, rows, first["seconds"], second["seconds"], **memory)


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
    """Peak resident MiB of each of this process's Ray workers, by process id; complete after the block."""
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
    """Peak MiB of a worker; None for a process that is gone, is no worker of Ray, or has had no task yet."""
    try:
        name = Path(f"/proc/{pid}/cmdline").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    # The kernel keeps the peak, so nothing between two samples is missed.
    peak = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return int(peak) // 1024 if peak is not None and name.startswith("ray::") else None
