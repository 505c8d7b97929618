"""What a rank leaves of a trained adapter: its weights, and how it was trained."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from pipeline.comparison.adapter import Trained
from pipeline.tuning.peak_memory import peak_bytes
from pipeline.tuning.state import Evaluation
from pipeline.whole_files import write_atomically


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
    told = {
        "history": [asdict(evaluation) for evaluation in trained.history],
        "best_at": trained.best_at,
        "seconds": trained.seconds,
        "peak_bytes": peak_bytes(),
        "failed": trained.failed,
    }
    write_atomically(path, save(trained.weights, {"told": json.dumps(told)}))


def load_adapter(path: Path) -> KeptAdapter | None:
    """None where it is not there, or damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            told = json.loads(file.metadata()["told"])
            weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    history = tuple(Evaluation(**evaluation) for evaluation in told.pop("history"))
    return KeptAdapter(weights, history, **told)
