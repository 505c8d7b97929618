"""A process as a rank of a run, whatever it is to do."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from pipeline.tuning.ranks import rank
from pipeline.tuning.watchdog import hangs_of, watched


@contextmanager
def rank_process(
    run_folder: str | Path, hang_timeout: float, threads: int, device: torch.device
) -> Iterator[Callable[[], None]]:
    """Its threads and device set, and ended unless the function given is called in time (`watched`).

    hang_timeout: in seconds.
    """
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with watched(hang_timeout, hangs_of(run_folder) / f"rank-{rank()}.{os.getpid()}.txt") as alive:
        yield alive
