"""What all ranks must decide alike: whether they share one backbone, partitioned by ZeRO-3, and how it multiplies."""

import os
from pathlib import Path

import psutil
import torch
from transformers import PretrainedConfig

from pipeline.backbone.int8 import multiplies_int8_fast
from pipeline.backbone.memory import estimate_memory
from pipeline.tuning.ranks import true_on_all, world_size

_MOST = 0.25
"""The share of a rank's free memory that a whole backbone may take; the rest is for activations, and for others."""


def partitions(setting: str, config: PretrainedConfig, int8: bool, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether to partition the backbone: `always`, `never`, or `auto`, where a rank has little room for all of it.

    Every rank must call this; all get the same answer.
    """
    if world_size() == 1 or setting == "never":
        return False
    if setting == "always":
        return True
    needed = estimate_memory(config, int8, dtype, 1, 0)
    fits = needed.weights + needed.gathered <= _MOST * free_bytes(device)
    return not true_on_all(fits, device)


def agreed_products(setting: str, device: torch.device) -> str:
    """How int8 layers multiply (see `int8.set_products`): as set, or by `auto` in int8 where every rank does it fast.

    Every rank must call this; all get the same answer, for a trial's gradient must not depend on which has its rows.
    """
    if setting != "auto":
        return setting
    return "int8" if true_on_all(multiplies_int8_fast(device), device) else "exact"


def free_bytes(device: torch.device) -> int:
    """Free memory of this rank: its GPU's, or its part of the machine's (of the container's, where that has less)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return min(psutil.virtual_memory().available, _container_bytes()) // ranks_here


def _container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container (cgroup v2) may still take; files that the system caches for it give way."""
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / "memory.current").read_text()) - int(statistics["inactive_file"])
        return int((folder / "memory.max").read_text()) - used
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return 2**62
