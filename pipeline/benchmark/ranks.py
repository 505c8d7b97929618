"""Run a function in several processes joined as ranks, as Ray Train would, but without Ray."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """`function(*args)` in `world_size` fresh processes, of one thread at first; their results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    calls = [(rank, world_size, port, function, args) for rank in range(world_size)]
    with get_context("spawn").Pool(world_size) as pool:
        return pool.starmap(_run, calls, chunksize=1)


def _run(rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(rank)
        backend = "nccl"
    dist.init_process_group(backend, rank=rank, world_size=world_size)
    try:
        return function(*args)
    finally:
        dist.destroy_process_group()
