"""The bare fast tokenizer over texts that are in memory already: nothing read, nothing kept, on the same cores."""

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pyarrow.parquet as pq

from pipeline.corpus.encoding import TokenizerContent


@dataclass(frozen=True)
class BareWay:
    """How the cores are used."""

    processes: int
    threads: int
    """Of each process."""
    call_rows: int
    """Texts a call of `encode_batch_fast`."""


def bare_ways(cores: int) -> tuple[BareWay, ...]:
    """The ways that may be the fastest."""
    return (BareWay(cores, 1, 64), BareWay(cores, 1, 1000), BareWay(1, cores, 1000))


def run_bare(tokenizer: TokenizerContent, file: Path, way: BareWay) -> tuple[int, float]:
    """-> input tokens, and seconds from the first call's start to the last one's end."""
    context = get_context("spawn")
    start = context.Barrier(way.processes)
    calls = [(tokenizer, file, way, rank) for rank in range(way.processes)]
    with context.Pool(way.processes, initializer=_keep, initargs=(start,)) as pool:
        done = pool.starmap(_tokenise, calls, chunksize=1)
    begun, ended = min(begin for _, begin, _ in done), max(end for _, _, end in done)
    return sum(tokens for tokens, _, _ in done), ended - begun


_start: Barrier


def _keep(start: Barrier) -> None:
    global _start
    _start = start


def _tokenise(content: TokenizerContent, file: Path, way: BareWay, rank: int) -> tuple[int, float, float]:
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if way.threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(way.threads)
    tokenizer = content.backend_tokenizer
    texts = _share(file, rank, way.processes)
    calls = [texts[first : first + way.call_rows] for first in range(0, len(texts), way.call_rows)]
    _start.wait()
    # One clock for all processes of a machine.
    begin = time.monotonic()
    tokens = sum(sum(map(len, tokenizer.encode_batch_fast(call))) for call in calls)
    return tokens, begin, time.monotonic()


def _share(file: Path, rank: int, processes: int) -> Sequence[str]:
    column = pq.read_table(file, columns=["text"])["text"]
    rows = len(column)
    first, end = rows * rank // processes, rows * (rank + 1) // processes
    texts: list[str] = column.slice(first, end - first).to_pylist()
    return texts
