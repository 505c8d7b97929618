"""Numbers of the host on their way to a device, without a wait.

A plain copy to a GPU returns when it is done, and so after all that was launched before it: the GPU then has nothing to
do until Python has launched more. From pinned memory a copy is one more thing that the GPU does in its turn.
"""

import numpy as np
import torch
from torch import Tensor


def to_device(values: np.ndarray, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The same numbers as a tensor there; on a CPU it may share its memory with `values`."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cpu":
        return host
    if torch.cuda.is_available():
        host = host.pin_memory()  # PyTorch keeps it until the copy is done
    return host.to(device, non_blocking=True)
