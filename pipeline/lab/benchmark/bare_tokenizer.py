"""The bare fast tokenizer on the same cores, over texts that are in memory; it reads and writes no files."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer

from pipeline.corpus.encoding import TokenizerContent, resize_word_cache
from pipeline.lab.benchmark.ranks import end_with_parent


@dataclass(frozen=True)
class BareWay:
    """How the cores are used."""

    processes: int
    threads: int
    """Threads of each process."""
    call_rows: int
    """Texts a call of `encode_batch_fast`."""
    kept_words: int | None = None
    """Words whose tokens the tokenizer caches; None for its default, which is what a user gets."""


def bare_ways(cores: int) -> tuple[BareWay, ...]:
    """The ways that may be the fastest."""
    return (BareWay(cores, 1, 64), BareWay(cores, 1, 1000), BareWay(1, cores, 1000))


@dataclass(frozen=True)
class TokenizingRun:
    """One tokenisation of a file's texts, by either side."""

    tokens: int
    """Tokens of the inputs."""
    seconds: float
    cpu_seconds: float
    """CPU time of all processes and threads together, so that other work on the machine does not count."""

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    @property
    def cpu_rate(self) -> float:
        """Tokens a CPU second."""
        return self.tokens / self.cpu_seconds


def run_bare(tokenizer: TokenizerContent, file: Path, way: BareWay) -> TokenizingRun:
    """Tokenise a file's texts; timed from the first call's start to the last call's end."""
    context = get_context("spawn")
    start = context.Barrier(way.processes)
    calls = [(tokenizer, file, way, rank) for rank in range(way.processes)]
    with context.Pool(way.processes, initializer=_join_barrier, initargs=(start,)) as pool:
        done = pool.starmap(_tokenise, calls, chunksize=1)
    tokens, begun, ended, cpu_seconds = zip(*done, strict=True)
    return TokenizingRun(sum(tokens), max(ended) - min(begun), sum(cpu_seconds))


_start: Barrier


def _join_barrier(start: Barrier) -> None:
    global _start
    _start = start
    end_with_parent()


def _tokenise(content: TokenizerContent, file: Path, way: BareWay, rank: int) -> tuple[int, float, float, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if way.threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(way.threads)
    tokenizer = Tokenizer.from_str(content.json)
    if way.kept_words is not None:
        resize_word_cache(tokenizer, way.kept_words)
    texts = _texts_of_rank(file, rank, way.processes)
    calls = [texts[first : first + way.call_rows] for first in range(0, len(texts), way.call_rows)]
    _start.wait()
    # The monotonic clock is the same for all processes of a machine.
    begin, cpu_begin = time.monotonic(), time.process_time()
    tokens = sum(sum(map(len, tokenizer.encode_batch_fast(call))) for call in calls)
    return tokens, begin, time.monotonic(), time.process_time() - cpu_begin


def _texts_of_rank(file: Path, rank: int, processes: int) -> Sequence[str]:
    column = pq.read_table(file, columns=["text"])["text"]
    rows = len(column)
    first, end = rows * rank // processes, rows * (rank + 1) // processes
    texts: list[str] = column.slice(first, end - first).to_pylist()
    return texts
