"""Where a rank keeps its share of the weights between uses: on its device, in main memory, or in files.

DeepSpeed's own swapping to NVMe has buffers of the activations' type only, so it cannot take int8 weights. Here a
file is mapped into memory instead: the system reads pages when they are gathered, and drops them when it needs memory.
"""

import errno
import os
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from pipeline.errors import StorageError

Keep = Callable[[Tensor], Tensor]
"""A flat piece of a matrix on the CPU -> the same piece where it stays between uses."""


def on_device(device: torch.device) -> Keep:
    return lambda piece: piece.to(device)


def in_main_memory(piece: Tensor) -> Tensor:
    """Pinned, so that a GPU reads it at the bus' speed."""
    return piece.pin_memory() if torch.cuda.is_available() else piece


def in_files(folder: Path) -> Keep:
    """A file for every piece. Once mapped, it has no name: it goes when the process ends, however that happens.

    Raises: StorageError when the folder cannot be written or its disk is full.
    """

    def keep(piece: Tensor) -> Tensor:
        path = folder / f".weights-{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                file.write(piece.view(torch.uint8).numpy().data)
            mapped = torch.from_file(str(path), shared=False, size=piece.numel(), dtype=piece.dtype)
        except (OSError, RuntimeError) as error:
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            advice = "make room there, or name a folder on a larger disk" if full else str(error)
            raise StorageError(f"model.offload_folder {folder}: cannot keep weights there: {advice}") from error
        finally:
            with suppress(OSError):
                path.unlink()
        return mapped

    return keep


def offload_of_settings(offload: str, folder: str | os.PathLike[str] | None) -> Keep | None:
    """What the settings `model.offload` and `model.offload_folder` ask for; None where weights stay on their device."""
    if offload == "nvme":
        assert folder is not None
        return in_files(Path(folder).expanduser())
    return in_main_memory if offload == "cpu" else None
