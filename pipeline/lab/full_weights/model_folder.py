"""Trained weights -> an ordinary model folder: config, tokenizer and safetensors, as transformers saves them."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from pipeline.backbone.loading import stored_buffers
from pipeline.lab.full_weights.pieces import TrainedModel
from pipeline.tuning.ranks import rank, sum_over_ranks
from pipeline.whole_files import put_in_place

_FILE_BYTES = 2 * 2**30
"""Largest weight file; rank 0 holds the weights of one file at a time."""


def save_model_folder(model: TrainedModel, tokenizer: Any, folder: Path) -> None:
    """Write the present weights, unless the folder is there already. Every rank must call this.

    Raises: StorageError when the disk is full or not writable; then there is no folder.
    """
    there = torch.tensor([float(rank() == 0 and folder.exists())], device=model.backbone.device)
    if float(sum_over_ranks(there)):
        return
    parts = _parts(model)

    def write(path: Path) -> None:
        path.mkdir()
        config = copy.deepcopy(model.backbone.config)
        config.dtype = model.backbone.dtype
        config.save_pretrained(path)
        if config.is_encoder_decoder:
            _first_tokens(_hosted(model).generation_config).save_pretrained(path)
        tokenizer.save_pretrained(path)
        _write_weights(parts, len(_files(model)), path)

    if rank() == 0:
        put_in_place(folder, write)
    for _ in parts:  # other ranks take part in gathering what rank 0 writes
        pass
    sum_over_ranks(there)  # a barrier: no rank goes on before the folder is there


def stored_bytes(folder: Path) -> int:
    """Bytes of a model folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _write_weights(parts: Iterator[dict[str, Tensor]], files: int, path: Path) -> None:
    place: dict[str, str] = {}
    size = 0
    for number, part in enumerate(parts, start=1):
        name = "model.safetensors" if files == 1 else f"model-{number:05d}-of-{files:05d}.safetensors"
        save_file(part, path / name, {"format": "pt"})
        place |= dict.fromkeys(part, name)
        size += sum(tensor.nbytes for tensor in part.values())
    if files > 1:
        index = {"metadata": {"total_size": size}, "weight_map": place}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _parts(model: TrainedModel) -> Iterator[dict[str, Tensor]]:
    """The weights of one file after the other; only rank 0 keeps them."""
    groups = iter(_files(model))
    wanted, part = next(groups), _buffers(model)
    left = set(wanted)
    for name, weight in model.weights():
        part[name] = weight.cpu().contiguous().clone() if rank() == 0 else torch.empty(0)
        left.discard(name)
        if not left:
            yield part
            part = {}
            left = set(next(groups, ()))


def _buffers(model: TrainedModel) -> dict[str, Tensor]:
    """Buffers that are stored but not trained; each rank has all of them."""
    return {
        name: tensor.cpu().contiguous().clone()
        for name, (module, key) in stored_buffers(_hosted(model)).items()
        if (tensor := module._buffers[key]) is not None
    }


def _first_tokens(known: GenerationConfig) -> GenerationConfig:
    """What a decoder begins behind and with. Settings of beams and lengths, which are not used here, may not be saved:
    transformers refuses some that it has read."""
    keys = ("decoder_start_token_id", "forced_bos_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
    return GenerationConfig(**{key: getattr(known, key) for key in keys})


def _hosted(model: TrainedModel) -> PreTrainedModel:
    return next(module for module in model.backbone.hosted.modules() if isinstance(module, PreTrainedModel))


def _files(model: TrainedModel) -> list[list[str]]:
    """The names of the weights in each file, in their order."""
    files: list[list[str]] = [[]]
    size = 0
    for piece in model.pieces:
        own = piece.shape.numel() * model.backbone.dtype.itemsize
        if files[-1] and size + own > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(piece.name)
        size += own
    return files
