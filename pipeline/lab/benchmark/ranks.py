"""Run a function in several processes joined as ranks, as Ray Train would, but without Ray."""

import os
import tempfile
from collections.abc import Callable
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import torch
import torch.distributed as dist


class _Call(NamedTuple):
    rank: int
    world_size: int
    meeting: Path
    """A file: a port that is free now may be another's when rank 0 comes to take it."""
    function: Callable[..., Any]
    args: tuple[Any, ...]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, start: str = "spawn") -> list[Any]:
    """`function(*args)` in `world_size` fresh processes, of one thread at first; their results by rank.

    `start`: how multiprocessing starts them; a forked one's peak memory has its parent's in it.

    Raises: what the first rank that fails raised; the others are ended, for they would wait for it.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        get_context(start).Pool(world_size, initializer=end_with_parent) as pool,
    ):
        calls = [_Call(rank, world_size, Path(folder, "meeting"), function, args) for rank in range(world_size)]
        by_rank = dict(pool.imap_unordered(_run, calls))
    return [by_rank[rank] for rank in range(world_size)]


def end_with_parent() -> None:
    """In a process of multiprocessing's: end it when the process that started it ends, however that does.

    Those of a pool would compute on, and then wait for ever, where their parent was killed or got SIGTERM.
    """
    parent = parent_process()
    assert parent is not None, "no process of multiprocessing's"

    def watch() -> None:
        parent.join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def _run(call: _Call) -> tuple[int, Any]:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(call.rank), LOCAL_RANK=str(call.rank), WORLD_SIZE=str(call.world_size))
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(call.rank)
        backend = "nccl"
    dist.init_process_group(
        backend, init_method=f"file://{call.meeting}", rank=call.rank, world_size=call.world_size
    )  # fmt: skip
    try:
        return call.rank, call.function(*call.args)
    finally:
        dist.destroy_process_group()
