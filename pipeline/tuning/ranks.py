"""Communication between ranks; a process that is the only one, or works for itself, communicates with none."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

_alone = ContextVar("alone", default=False)


def rank() -> int:
    return dist.get_rank() if _among_others() else 0


def world_size() -> int:
    return dist.get_world_size() if _among_others() else 1


@contextmanager
def alone() -> Iterator[None]:
    """Within it this rank counts as the only one: it communicates with no other."""
    before = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(before)


def _among_others() -> bool:
    return dist.is_initialized() and not _alone.get()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum in place over all ranks; the result is the same, bit by bit, on each."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def true_on_all(flag: bool, device: torch.device) -> bool:
    if world_size() == 1:
        return flag
    missing = torch.tensor([0.0 if flag else 1.0], device=device)
    return float(sum_over_ranks(missing)) == 0.0
