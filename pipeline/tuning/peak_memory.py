"""Most memory that this process had at once."""

import resource

import torch


def peak_bytes() -> int:
    """Allocated on the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
