"""Weights read one tensor at a time, so that no process ever holds the whole model."""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.backbone.files import ModelFiles
from pipeline.errors import BackboneError


@dataclass(frozen=True)
class WeightSource:
    """Tensors by the name that transformers gives them."""

    origin: str
    names: frozenset[str]
    read: Callable[[str], Tensor]
    """Name -> the tensor as stored (GGUF: dequantised to float32)."""
    raw: Callable[[str], Any]
    """Name -> the tensor's stored bytes, for a digest."""


def open_weights(files: ModelFiles, skeleton: nn.Module) -> WeightSource:
    """Open a model's weights; `skeleton` (on the meta device) tells GGUF's names from transformers'.

    Raises: BackboneError when a file is damaged.
    """
    return _open_gguf(files, skeleton) if files.gguf else _open_safetensors(files)


def weights_digest(source: WeightSource) -> str:
    """Digest of every tensor's name and stored bytes, whatever files they are spread over."""
    total = hashlib.sha256()
    for name in sorted(source.names):
        total.update(f"{name}\0".encode())
        total.update(hashlib.sha256(source.raw(name)).digest())
    return total.hexdigest()


def first_name(source: WeightSource, candidates: Iterable[str]) -> str:
    """The first candidate that the source has, with or without the model's own prefix.

    Raises: BackboneError naming what is missing.
    """
    candidates = list(candidates)
    for name in candidates:
        if name in source.names:
            return name
        bare = name.partition(".")[2]  # checkpoints of the bare model leave out "transformer." or "model."
        if bare in source.names:
            return bare
    raise BackboneError(f"{source.origin}: the weights lack '{candidates[0]}'; the checkpoint is incomplete")


def _open_safetensors(files: ModelFiles) -> WeightSource:
    shards: dict[str, Path] = {}
    handles: dict[Path, Any] = {}
    for path in sorted(files.folder.glob("*.safetensors")):
        try:
            handles[path] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise BackboneError(f"{path} is damaged or incomplete ({error}); fetch the model again") from error
        shards.update(dict.fromkeys(handles[path].keys(), path))

    def read(name: str) -> Tensor:
        return handles[shards[name]].get_tensor(name)

    def raw(name: str) -> Any:
        return read(name).contiguous().view(-1).view(torch.uint8).numpy()

    return WeightSource(str(files.folder), frozenset(shards), read, raw)


def _open_gguf(files: ModelFiles, skeleton: nn.Module) -> WeightSource:
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

    path = files.folder / str(files.gguf)
    try:
        reader = gguf.GGUFReader(path)
        family = reader.fields["general.architecture"].contents()
    except (ValueError, KeyError, OSError) as error:
        raise BackboneError(f"{path} is damaged or no GGUF file ({error}); fetch the model again") from error
    config: Any = skeleton.config
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family)
    to_gguf = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    tensors = {}
    for name, _ in skeleton.named_parameters(remove_duplicate=False):
        stem, _, suffix = name.rpartition(".")
        tensor = stored.get(f"{to_gguf.get_name(stem)}.{suffix}")
        if tensor is not None:
            tensors[name] = tensor
    # llama.cpp permutes some matrices; transformers knows how to undo it.
    processor = TENSOR_PROCESSORS.get(family, TensorProcessor)(config=config.to_dict())

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        floats = gguf.dequantize(tensor.data, tensor.tensor_type)
        return torch.from_numpy(processor.process(weights=floats, name=tensor.name).weights.copy())

    def raw(name: str) -> Any:
        return tensors[name].data.tobytes()

    return WeightSource(str(path), frozenset(tensors), read, raw)
