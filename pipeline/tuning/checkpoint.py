"""Checkpoints of a run: one safetensors file each, complete or absent, the two newest kept.

Prompts, their optimizers and counters as whole tensors, whatever the number of ranks: the model
is frozen and needs none. Each carries a digest of all that is in it; one that is damaged is passed
over for the one before it. Those of versions that wrote no digest are taken up as they are.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pipeline.errors import StorageError
from pipeline.sealed_files import open_tensors, sealed_tensors
from pipeline.tuning.state import RECORDED, TrialState, from_record, to_record
from pipeline.tuning.trials import Trial
from pipeline.whole_files import write_atomically

KEPT = 2
_METADATA = ("step", "trials")


@dataclass(frozen=True)
class Checkpoint:
    step: int
    """The run's step: how many steps were taken, over all its attempts."""
    records: Mapping[str, dict[str, Any]]
    tensors: Mapping[str, dict[str, Tensor]]

    def state_of(self, trial: Trial, device: torch.device) -> TrialState | None:
        """The trial's state, if it was checkpointed under the same settings, corpus and backbone."""
        record = self.records.get(trial.name)
        if record is None or record["digest"] != trial.digest:
            return None
        return from_record(trial, record, self.tensors[trial.name], device)


def save_checkpoint(folder: Path, step: int, states: Iterable[TrialState]) -> None:
    """Raises: StorageError when the disk is full, or not writable; older checkpoints stay."""
    records, tensors = {}, {}
    for state in states:
        name = state.trial.name
        records[name], own = to_record(state)
        tensors.update({f"{name}/{key}": value for key, value in own.items()})
    data = sealed_tensors(save(tensors, {"step": str(step), "trials": json.dumps(records)}))
    path = folder / f"step-{step:09d}.safetensors"
    write_atomically(path, data)
    # Files beyond this step are damaged ones that were passed over.
    kept = [other for other in _newest_first(folder) if other.name <= path.name][:KEPT]
    for other in set(_newest_first(folder)) - set(kept):
        try:
            other.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(
                f"cannot remove the old checkpoint {other}: {error.strerror}; let this user write there"
            ) from error


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; None when there is none."""
    for path in _newest_first(folder):
        try:
            return _read(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # without a digest, damage may lie anywhere
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _read(path: Path) -> Checkpoint:
    data = path.read_bytes()
    metadata = open_tensors(data, _METADATA)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load(data).items():
        trial, _, name = key.partition("/")
        tensors.setdefault(trial, {})[name] = tensor
    records = json.loads(metadata["trials"])
    for name, record in records.items():
        if not record.keys() >= RECORDED or not {"prompt", "best"} <= tensors[name].keys():
            raise KeyError(name)
    return Checkpoint(int(metadata["step"]), records, tensors)
