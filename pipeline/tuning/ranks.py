"""What ranks say to each other; in one plain process, nothing."""

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


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
