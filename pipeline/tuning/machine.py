"""The machine that a process computes on: its name, and its memory."""

import os
import platform
import resource
from pathlib import Path

import psutil
import torch

from pipeline.tuning.ranks import world_size


def device_name() -> str:
    """The GPU, or the processor with its number of cores: figures of speed are published beside it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.machine()}, {os.cpu_count()} cores"


def peak_bytes() -> int:
    """Most memory that this process had at once: allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_bytes(device: torch.device) -> int:
    """Free memory of this rank: its GPU's, or its part of the machine's (of the container's, where that has less)."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size()))
    return min(psutil.virtual_memory().available, container_bytes()) // ranks_here


def container_bytes(folder: Path = Path("/sys/fs/cgroup")) -> int:
    """What a container (cgroup v2) may still take; files that the system caches for it give way."""
    try:
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        used = int((folder / "memory.current").read_text()) - int(statistics["inactive_file"])
        return int((folder / "memory.max").read_text()) - used
    except (OSError, ValueError, KeyError):  # no container, or one without a limit ("max")
        return 2**62
