"""A request to stop: all ranks learn of it between the same two steps, and the run leaves with a checkpoint of them.

The driver's request is written into a file of the run, which rank 0 opens anew at each look: what was written before
an opening is seen on network file systems, too, where a new file may stay hidden for a minute.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from pipeline.errors import StorageError
from pipeline.tuning.interruption.signals import was_told_to_stop
from pipeline.tuning.ranks import rank, sum_over_ranks
from pipeline.whole_files import write_atomically

Notice = Literal["go on", "save", "stop"]
"""`save`: a node is about to leave, and what it took part in should be kept."""

_GO_ON, _STOP = b"go on", b"stop!"  # of one length: a full disk has room for it
_LOOK_S = 0.5
_NODES_S = 5.0


def allow_to_run(run_folder: Path) -> None:
    """Take back a request of an earlier start. Raises: StorageError."""
    write_atomically(_request(run_folder), _GO_ON)


def ask_to_stop(run_folder: Path) -> None:
    """Ask the run's ranks to stop after the step that they are at. Raises: StorageError."""
    try:
        with open(_request(run_folder), "r+b") as file:
            file.write(_STOP)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(
            f"cannot write {_request(run_folder)}: {error.strerror}; the run ends without a last checkpoint"
        ) from error


def forget_request(run_folder: Path) -> None:
    _request(run_folder).unlink(missing_ok=True)


def _request(run_folder: Path) -> Path:
    return run_folder / "request"


def told_to_stop(run_folder: Path) -> bool:
    """Whether the driver asks the ranks to stop or this rank got a SIGTERM; for ranks that work each for itself."""
    return was_told_to_stop() or _is_asked(run_folder)


def _is_asked(run_folder: Path) -> bool:
    try:
        return _request(run_folder).read_bytes() == _STOP
    except OSError:  # not there, or a network file system that fails for a moment
        return False


class StopSignal:
    """What a rank looks at between steps; every rank gets the same answer.

    `node_leaves` tells whether a node with a rank is about to be taken away. It is called by all ranks together.
    """

    def __init__(self, run_folder: Path, node_leaves: Callable[[], bool] = lambda: False) -> None:
        self._run_folder = run_folder
        self._node_leaves = node_leaves
        self._looked = self._asked_nodes = 0.0
        self._saved = False

    def next(self, device: torch.device) -> Notice:
        """Every rank must call this between the same two steps."""
        now = time.monotonic()
        ask_nodes = rank() == 0 and not self._saved and now - self._asked_nodes > _NODES_S
        told = was_told_to_stop() or self._is_requested(now)
        any_told, any_asks = sum_over_ranks(torch.tensor([float(told), float(ask_nodes)], device=device)).tolist()
        if any_told:
            return "stop"
        if any_asks:
            self._asked_nodes = now
            if self._node_leaves():
                self._saved = True
                return "save"
        return "go on"

    def _is_requested(self, now: float) -> bool:
        if rank() != 0 or now - self._looked < _LOOK_S:
            return False
        self._looked = now
        return _is_asked(self._run_folder)
