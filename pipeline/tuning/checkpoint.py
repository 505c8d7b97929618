"""Checkpoints of a run: one safetensors file each, complete or absent, the two newest kept.

Prompts, their optimizers and counters as whole tensors, whatever the number of ranks: the model is frozen and needs
none. A trial that has ended does not change any more: it is written once, into a file of its own, and checkpoints name
that file by its digest. So a checkpoint costs what is live, however many trials a run has had. Each carries a digest of
all that is in it; one that is damaged is passed over for the one before it, and of an ended trial whose file is damaged
the trial alone is tuned again. Those of versions that wrote no digest, or all trials into each, are taken up as well.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, MutableMapping
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
_ENDED = "ended"


@dataclass(frozen=True)
class Checkpoint:
    step: int
    """The run's step: how many steps were taken, over all its attempts."""
    records: Mapping[str, dict[str, Any]]
    tensors: Mapping[str, dict[str, Tensor]]
    ended: Mapping[str, str]
    """Digests of the files of ended trials, by trial."""

    def state_of(self, trial: Trial, device: torch.device) -> TrialState | None:
        """The trial's state, if it was checkpointed under the same settings, corpus and backbone."""
        record = self.records.get(trial.name)
        if record is None or record["digest"] != trial.digest:
            return None
        return from_record(trial, record, self.tensors[trial.name], device)


def save_checkpoint(
    folder: Path, step: int, states: Iterable[TrialState], ended: MutableMapping[str, str] | None = None
) -> None:
    """Write a checkpoint of these states.

    ended: digests of the files of ended trials that are there already, by trial; those that are written now are added.
    Raises: StorageError when the disk is full, or not writable; older checkpoints stay.
    """
    records, tensors, ended = {}, {}, {} if ended is None else ended
    for state in states:
        name = state.trial.name
        if state.ended:
            if name not in ended:
                ended[name] = _write_ended(folder, state)
            test = None if state.test is None else {"value": state.test.value, "loss": state.test.loss}
            records[name] = {"digest": state.trial.digest, _ENDED: ended[name], "test": test}
            continue
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


def _write_ended(folder: Path, state: TrialState) -> str:
    """Write a trial that has ended; the file's digest. Its test metric may come later, and is not in it."""
    record, tensors = to_record(state)
    data = save(tensors, {"record": json.dumps(record)})
    write_atomically(_ended_file(folder, state.trial.name), data)
    return hashlib.sha256(data).hexdigest()


def _read_ended(folder: Path, name: str, entry: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """Record and tensors of a trial that has ended; None where its file is gone or is not the one that was written."""
    try:
        data = _ended_file(folder, name).read_bytes()
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != entry[_ENDED]:
        return None
    record = json.loads(open_tensors(data, ("record",))["record"])
    return {**record, "test": entry["test"]}, load(data)


def _ended_file(folder: Path, trial: str) -> Path:
    return folder / _ENDED / f"{trial}.safetensors"


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
    records, ended = json.loads(metadata["trials"]), {}
    for name, entry in list(records.items()):
        if _ENDED not in entry:
            continue
        found = _read_ended(path.parent, name, entry)
        if found is None:
            del records[name]  # it starts again, and ends with the same prompt
        else:
            ended[name] = entry[_ENDED]
            records[name], tensors[name] = found
    for name, record in records.items():
        if not record.keys() >= RECORDED or not {"prompt", "best"} <= tensors[name].keys():
            raise KeyError(name)
    return Checkpoint(int(metadata["step"]), records, tensors, ended)
