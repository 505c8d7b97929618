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
    """A file for the rendezvous: a port that is free now may be taken before rank 0 opens it."""
    function: Callable[..., Any]
    args: tuple[Any, ...]


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, start: str = "spawn") -> list[Any]:
    """Run `function(*args)` in `world_size` fresh processes, of one thread at first; returns their results by rank.

    `start`: how multiprocessing starts them. The peak memory of a forked process includes its parent's.

    Raises: the error of the first rank that fails. The other ranks are ended, since they would wait for it.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        get_context(start).Pool(world_size, initializer=end_with_parent) as pool,
    ):
        calls = [_Call(rank, world_size, Path(folder, "meeting"), function, args) for rank in range(world_size)]
        by_rank = dict(pool.imap_unordered(_run, calls))
    return [by_rank[rank] for rank in range(world_size)]


def end_with_parent() -> None:
    """End this process of multiprocessing when the process that started it ends, however that happens.

    If their parent is killed or gets SIGTERM, processes of a pool would otherwise compute on and then wait for ever.
    """
    parent = parent_process()
    assert parent is not None, "not a process of multiprocessing"

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
        dist.barrier()  # or a rank that is done at once closes connections that another is still making
        return call.rank, call.function(*call.args)
    finally:
        dist.destroy_process_group()
