"""Checkpoints of weights in training: one folder each, with a safetensors file for each rank; complete or absent.

Weights, best weights and the optimizer's state for each weight are stored as ranks hold them, and any number of ranks
can read them. A folder is valid once its `whole.json` is there, which is written last, and every file has the size and
digest that it names. The two newest checkpoints are kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipeline.backbone.loading import Partition
from pipeline.errors import StorageError
from pipeline.lab.full_weights.optimise import CUT_STATE
from pipeline.lab.full_weights.pieces import Piece, TrainedModel
from pipeline.sealed_files import DamagedError, file_digest, open_json, sealed_json
from pipeline.tuning.ranks import rank, sum_over_ranks, world_size
from pipeline.whole_files import put_in_place, remove, write_atomically

KEPT = 2
_WHOLE = "whole.json"
_UNSEALED = ("step", "seconds", "notes", "digest", "has_best", "files")


@dataclass
class TrainingProgress:
    """How far a training has come; the same on every rank, except for the weights."""

    step: int = 0
    """Steps taken."""
    seconds: float = 0.0
    """Time of these steps, over all starts."""
    notes: dict[str, Any] = field(default_factory=dict)
    """JSON values of the caller."""
    best: list[Tensor] | None = None
    """Best values `[stop - start]` of each piece, in the type that the model runs in."""


def save_progress(folder: Path, digest: str, model: TrainedModel, progress: TrainingProgress) -> None:
    """Write a checkpoint; every rank must call this. `digest`: of the training; only the same one may resume from it.

    Raises: StorageError when the disk is full or not writable; older checkpoints stay.
    """
    here = folder / f"step-{progress.step:09d}"
    if rank() == 0:
        remove(here / _WHOLE)  # from an earlier start, maybe with another number of ranks
    sum_over_ranks(torch.zeros(1, device=model.backbone.device))  # a barrier: no rank writes before it is removed
    tensors = _tensors_of(model, progress)
    own = here / _file(rank(), world_size())
    put_in_place(own, lambda path: save_file(tensors, path))
    digests = _from_all_ranks(file_digest(own), model)
    if rank() == 0:
        names = [_file(each, world_size()) for each in range(world_size())]
        record = {
            "step": progress.step,
            "seconds": progress.seconds,
            "notes": progress.notes,
            "digest": digest,
            "has_best": progress.best is not None,
            "files": {name: (here / name).stat().st_size for name in names},
            "digests": dict(zip(names, digests, strict=True)),
        }
        write_atomically(here / _WHOLE, sealed_json(record))
        # Folders of later steps are damaged ones that were skipped, or belong to another training.
        kept = [other for other in _newest_first(folder) if other.name <= here.name][:KEPT]
        for other in set(_newest_first(folder)) - set(kept):
            remove(other)


def load_progress(folder: Path, digest: str, model: TrainedModel) -> TrainingProgress | None:
    """Resume from the newest valid checkpoint of this digest; None when there is none. Every rank must call this.

    Raises: StorageError when ranks see different ones, or one cannot be read.
    """
    candidates = (here for here in _newest_first(folder) if (_record(here) or {}).get("digest") == digest)
    while True:
        found = next(candidates, None)
        steps = torch.zeros(world_size(), device=model.backbone.device)
        steps[rank()] = -1 if found is None else int(found.name.removeprefix("step-"))
        if len(sum_over_ranks(steps).unique()) > 1:
            raise StorageError(f"ranks see different checkpoints in {folder}; run.storage must be one shared folder")
        if found is None:
            return None
        record = _record(found)
        assert record is not None
        if _is_unharmed(found, record, model):
            break
    try:
        best = _restore(model, _CheckpointFiles(found, list(record["files"])), record["has_best"])
    except (SafetensorError, OSError, KeyError) as error:
        raise StorageError(
            f"the checkpoint {found} cannot be read ({error}); remove it to resume from an earlier one"
        ) from error
    return TrainingProgress(record["step"], record["seconds"], record["notes"], best)


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a training that has ended."""
    if rank() == 0:
        remove(folder)


def _tensors_of(model: TrainedModel, progress: TrainingProgress) -> dict[str, Tensor]:
    tensors = {}
    for index, piece in enumerate(model.pieces):
        tensors[f"weights/{piece.name}"] = piece.values.detach()[: len(piece)]
        if progress.best is not None:
            tensors[f"best/{piece.name}"] = progress.best[index]
        for key, value in model.optimizer.state.get(piece.values, {}).items():
            tensors[f"{key}/{piece.name}"] = value[: len(piece)] if key in CUT_STATE else value
    return {key: value.cpu().contiguous().clone() for key, value in tensors.items()}


def _restore(model: TrainedModel, files: "_CheckpointFiles", has_best: bool) -> list[Tensor] | None:
    device, best = model.backbone.device, []
    for piece in model.pieces:
        padding = piece.values.numel() - len(piece)
        piece.values.data[: len(piece)] = files.cut("weights", piece).to(device)
        for key in files.state_keys(piece.name):
            if key in CUT_STATE:
                value = torch.nn.functional.pad(files.cut(key, piece), (0, padding))
            else:
                value = files.whole(key, piece)
            # AdamW counts steps on the CPU.
            model.optimizer.state[piece.values][key] = value if key == "step" else value.to(device)
        if has_best:
            best.append(files.cut("best", piece).to(device))
    model.take_up()
    return best if has_best else None


class _CheckpointFiles:
    """The files of a checkpoint, one for each rank that wrote it."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self._open = [safe_open(folder / name, framework="pt") for name in names]
        self._keys: dict[str, list[str]] = {}
        for key in self._open[0].keys():  # noqa: SIM118 (no mapping)
            kind, _, name = key.partition("/")
            self._keys.setdefault(name, []).append(kind)

    def state_keys(self, name: str) -> list[str]:
        return [kind for kind in self._keys[name] if kind not in ("weights", "best")]

    def whole(self, key: str, piece: Piece) -> Tensor:
        tensor: Tensor = self._open[0].get_tensor(f"{key}/{piece.name}")
        return tensor

    def cut(self, key: str, piece: Piece) -> Tensor:
        """Entries `start` to `stop` of a piece, from the files of the ranks that held them."""
        parts = []
        for writer, file in enumerate(self._open):
            first, end = Partition(writer, len(self._open)).span(piece.shape.numel())
            low, high = max(first, piece.start), min(end, piece.stop)
            if low < high:
                parts.append(file.get_slice(f"{key}/{piece.name}")[low - first : high - first])
        return torch.cat(parts) if parts else torch.empty(0)


def _is_unharmed(here: Path, record: Mapping[str, Any], model: TrainedModel) -> bool:
    """Whether every file has its digest; each file is checked by one rank. Every rank must call this."""
    digests = list(record.get("digests", {}).items())  # earlier versions wrote none
    harmed = sum(file_digest(here / name) != digest for name, digest in digests[rank() :: world_size()])
    return not sum_over_ranks(torch.tensor([float(harmed)], device=model.backbone.device)).item()


def _from_all_ranks(digest: str, model: TrainedModel) -> list[str]:
    """The digests of all ranks, by rank. Every rank must call this."""
    bytes_of = torch.zeros(world_size(), 32, device=model.backbone.device)
    bytes_of[rank()] = torch.tensor(list(bytes.fromhex(digest)), dtype=bytes_of.dtype)
    return [bytes(map(int, row)).hex() for row in sum_over_ranks(bytes_of).tolist()]


def _record(here: Path) -> Mapping[str, Any] | None:
    """The content of `whole.json`; None when it, or a file that it names, is missing or incomplete."""
    try:
        record = open_json((here / _WHOLE).read_bytes(), _UNSEALED)
        whole = all((here / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, DamagedError, KeyError, AttributeError):
        return None
    return record if whole else None


def _file(writer: int, ranks: int) -> str:
    return f"rank-{writer}-of-{ranks}.safetensors"


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*"), reverse=True)
