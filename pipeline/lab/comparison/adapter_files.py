"""What a rank leaves of a trained adapter: its weights, and how it was trained."""

from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load, save
from torch import Tensor

from pipeline.lab.comparison.adapter import Trained
from pipeline.lab.comparison.told_tensors import load_told, save_told
from pipeline.tuning.machine import peak_bytes
from pipeline.tuning.state import Evaluation


@dataclass(frozen=True)
class KeptAdapter:
    """What a rank has left of a job."""

    weights: dict[str, Tensor]
    history: tuple[Evaluation, ...]
    best_at: int
    seconds: float
    peak_bytes: int
    failed: str | None


def save_adapter(path: Path, trained: Trained) -> None:
    """Raises: StorageError."""
    values = {
        "history": [asdict(evaluation) for evaluation in trained.history],
        "best_at": trained.best_at,
        "seconds": trained.seconds,
        "peak_bytes": peak_bytes(),
        "failed": trained.failed,
    }
    save_told(path, trained.weights, values, save)


def load_adapter(path: Path) -> KeptAdapter | None:
    """None where it is not there, or damaged."""
    found = load_told(path, load)
    if found is None:
        return None
    values, weights = found
    history = tuple(Evaluation(**evaluation) for evaluation in values.pop("history"))
    return KeptAdapter(weights, history, **values)
