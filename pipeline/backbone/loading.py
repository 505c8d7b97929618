"""Build the frozen model leaf by leaf: read a tensor, quantise it, hand it to its host, forget it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from pipeline.backbone.files import FAMILIES
from pipeline.backbone.fused import fuse
from pipeline.backbone.int8 import Int8Embedding, Int8Linear, empty_int8, quantize_rows
from pipeline.backbone.weights import WeightSource, first_name
from pipeline.errors import BackboneError

Place = Callable[[nn.Module], None]
"""Told of every leaf module once its tensors are there: partitions it, moves it, or leaves it."""


def build_skeleton(config: PretrainedConfig, int8: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model on the meta device (no memory), its matrices replaced by int8 ones if asked for."""
    auto = AutoModelForCausalLM if FAMILIES[config.model_type] == "decoder-only" else AutoModelForSeq2SeqLM
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, attn_implementation="sdpa")
    model.eval().requires_grad_(False)  # eval: dropout would make ranks disagree
    fuse(model)
    if int8:
        _replace_matrices(model, dtype)
    return model


def untie_what_is_stored_apart(model: nn.Module, source: WeightSource) -> None:
    """Give a tied parameter that the source stores under two names, with different values, one for each.

    transformers ties T5's output layer to its embedding whatever the checkpoint says, and unties them in
    `from_pretrained` by the same rule; T5 1.1 and the LM-adapted checkpoints need it.
    """
    for names in _names_by_parameter(model).values():
        stored = [name for name in names if name in source.names]
        for name in stored[1:]:
            if not torch.equal(source.read(name), source.read(stored[0])):
                module_name, _, key = name.rpartition(".")
                module = model.get_submodule(module_name)
                module._parameters[key] = nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False)


def load_weights(model: nn.Module, source: WeightSource, dtype: torch.dtype, place: Place) -> None:
    """Give every parameter of a skeleton its data, in `dtype` or int8; call `place` leaf by leaf.

    The most that is held beyond what `place` keeps is one tensor as stored and once converted.
    Raises: BackboneError when a tensor is missing or has another shape.
    """
    names = _names_by_parameter(model)
    loaded: dict[int, _Loaded] = {}
    for module in _leaves_first(model):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in loaded:
                tensor = source.read(first_name(source, names[id(parameter)]))
                loaded[id(parameter)] = _converted(module, parameter, tensor, dtype, source.origin)
                del tensor
            # A tied parameter stays one object; each of its layers has the scale.
            entry = loaded[id(parameter)]
            module._parameters[key] = entry.parameter
            if entry.scale is not None:
                module.scale = entry.scale
        _make_buffers(model, module)
        place(module)


@dataclass(frozen=True)
class _Loaded:
    parameter: nn.Parameter
    scale: Tensor | None
    skeleton: nn.Parameter
    """Kept, so that its id stays unique."""


def _replace_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Put int8 layers in place of every linear layer and of the input embedding; tied weights stay tied."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    replaced: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def int8_of(weight: Tensor, transposed: bool = False) -> nn.Parameter:
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        # The old parameter is kept beside the new one, so that its id stays unique.
        return replaced.setdefault(id(weight), (weight, empty_int8(rows, columns)))[1]

    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, key, Int8Linear(int8_of(child.weight), child.bias))
            elif isinstance(child, Conv1D):
                setattr(parent, key, Int8Linear(int8_of(child.weight, True), child.bias, stored_transposed=True))
            elif isinstance(child, nn.Embedding) and child.weight is table:
                setattr(parent, key, Int8Embedding(int8_of(child.weight), dtype))


def _names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _leaves_first(module: nn.Module) -> list[nn.Module]:
    below = [leaf for child in module.children() for leaf in _leaves_first(child)]
    return [*below, module]


def _converted(module: nn.Module, parameter: nn.Parameter, tensor: Tensor, dtype: torch.dtype, origin: str) -> _Loaded:
    if getattr(module, "stored_transposed", False) and tensor.dim() == 2:
        tensor = tensor.t()
    if parameter.shape != tensor.shape:
        raise BackboneError(
            f"{origin}: a weight has the shape {list(tensor.shape)} where config.json says {list(parameter.shape)}"
        )
    if parameter.dtype == torch.int8:
        rows, scale = quantize_rows(tensor)
        return _Loaded(nn.Parameter(rows, requires_grad=False), scale, parameter)
    # A copy: a view would keep the file's memory map, and with it the whole shard, alive.
    return _Loaded(nn.Parameter(tensor.to(dtype, copy=True), requires_grad=False), None, parameter)


def _make_buffers(model: nn.Module, module: nn.Module) -> None:
    # Buffers that no checkpoint stores (rotary frequencies): transformers knows how to compute them.
    missing = {key: buffer for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
    for key, buffer in missing.items():
        module._buffers[key] = torch.empty_like(buffer, device="cpu")
    if missing:
        model._init_weights(module)  # type: ignore[operator]
