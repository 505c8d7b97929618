"""A watchdog on every rank: one that shows no sign of life for too long ends, and writes down where it hung.

A sign of life is a layer of the model that begins to run. A rank that waits for a hung one shows none either, and ends
too; Ray Train then starts all of them again from the last checkpoint. A stopped process cannot end itself: Ray Train's
health check, set to the same time (`launch`), finds that one and kills it.
"""

import faulthandler
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from pipeline.tuning.ranks import rank

LOADING = 4
"""How many times as long a rank may be silent before it has run its first layer: it loads the model."""

_MOST_OFTEN_S = 1.0  # to set the timer anew starts a thread


@contextmanager
def rank_process(
    run_folder: str | Path, hang_timeout: float, threads: int, device: torch.device
) -> Iterator[Callable[[], None]]:
    """This process as a rank of a run: its threads and device set, and ended where the function given is not called.

    hang_timeout: seconds that a rank may be silent (`watched`).
    """
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with watched(hang_timeout, hangs_of(run_folder) / f"rank-{rank()}.{os.getpid()}.txt") as alive:
        yield alive


@contextmanager
def watched(timeout: float, report: Path) -> Iterator[Callable[[], None]]:
    """End this process unless the function given is called every `timeout` seconds, leaving its stacks in `report`.

    The timer needs neither Python's lock nor the thread that hangs.
    """
    report.parent.mkdir(parents=True, exist_ok=True)
    every, last = min(_MOST_OFTEN_S, timeout / 20), 0.0

    with open(report, "w") as file:

        def alive() -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= every:
                last = now
                faulthandler.dump_traceback_later(timeout, exit=True, file=file)

        faulthandler.dump_traceback_later(LOADING * timeout, exit=True, file=file)
        try:
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()
            report.unlink(missing_ok=True)


def call_at_every_layer(model: nn.Module, alive: Callable[[], None]) -> None:
    """Have `alive` called whenever the model, or a layer of one of its stacks, begins to run."""
    layers = [layer for stack in model.modules() if isinstance(stack, nn.ModuleList) for layer in stack]
    for module in (model, *layers):
        module.register_forward_pre_hook(lambda *_: alive())


def hangs_of(run_folder: str | Path) -> Path:
    """Where the ranks that the watchdog ends leave their stacks."""
    return Path(run_folder) / "hangs"


def hang_reports(folder: Path) -> list[Path]:
    """The reports of ranks that the watchdog ended. A rank that was killed leaves an empty file, which is none."""
    return sorted(path for path in folder.glob("*.txt") if path.stat().st_size)


def hang_sentence(reports: Sequence[Path], timeout: float) -> str:
    return (
        f"{len(reports)} rank(s) showed no sign of life for {timeout:g} s (run.hang_timeout); where they hung is in "
        f"{reports[0].parent}"
    )
