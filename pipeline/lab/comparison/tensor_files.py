"""Files of tensors with plain values beside them: one safetensors file each, with a digest of its content."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.lab.comparison.adapter import TrainedAdapter
from pipeline.sealed_files import open_tensors, sealed_tensors
from pipeline.tuning.machine import peak_bytes
from pipeline.tuning.state import Evaluation
from pipeline.whole_files import write_atomically

T = TypeVar("T")


def save_tensors(path: Path, tensors: T, values: dict[str, Any], save: Callable[[T, dict[str, str]], bytes]) -> None:
    """`save`: safetensors' function for this kind of tensors. Raises: StorageError."""
    write_atomically(path, sealed_tensors(save(tensors, {"told": json.dumps(values)})))


def load_tensors(path: Path, load: Callable[[bytes], T]) -> tuple[dict[str, Any], T] | None:
    """The plain values and the tensors by name; None where the file is missing or damaged.

    `load`: safetensors' function for this kind of tensors.
    """
    try:
        data = path.read_bytes()
        return json.loads(open_tensors(data, ("told",))["told"]), load(data)
    except (SafetensorError, OSError, ValueError, KeyError):
        return None


@dataclass(frozen=True)
class KeptAdapter:
    """An adapter as a rank stored it, with the course of its training."""

    weights: dict[str, Tensor]
    history: tuple[Evaluation, ...]
    best_at: int
    seconds: float
    peak_bytes: int
    failed: str | None


def save_adapter(path: Path, trained: TrainedAdapter) -> None:
    """Raises: StorageError."""
    values = {
        "history": [asdict(evaluation) for evaluation in trained.history],
        "best_at": trained.best_at,
        "seconds": trained.seconds,
        "peak_bytes": peak_bytes(),
        "failed": trained.failed,
    }
    save_tensors(path, trained.weights, values, save)


def load_adapter(path: Path) -> KeptAdapter | None:
    """The stored adapter; None where the file is missing or damaged."""
    found = load_tensors(path, load)
    if found is None:
        return None
    values, weights = found
    history = tuple(Evaluation(**evaluation) for evaluation in values.pop("history"))
    return KeptAdapter(weights, history, **values)
