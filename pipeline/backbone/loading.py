"""Build the frozen model module by module: read this rank's rows of a tensor, quantise them, hand them to their host.

No rank ever holds the whole model, so `from_pretrained` cannot be used: it loads first and partitions afterwards.
"""

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.backbone.files import architecture_of
from pipeline.backbone.fused import fuse
from pipeline.backbone.int8 import Int8Embedding, Int8Linear, empty_int8, quantize_matrix
from pipeline.backbone.output import let_layers_be_passed_over
from pipeline.backbone.weights import WeightSource, require_stored_name, same_bytes, stored_name
from pipeline.errors import BackboneError

_CHUNK = 2**18
"""Weights that are read at a time: so few stay in the processor's cache until they are quantised."""


@dataclass(frozen=True)
class Partition:
    """What a rank holds of every tensor: one of `ranks` equal pieces of the flattened tensor, as ZeRO-3 cuts it."""

    rank: int = 0
    ranks: int = 1

    def size(self, numel: int) -> int:
        """Entries of a piece; the last one is padded."""
        return -(-numel // self.ranks)

    def span(self, numel: int) -> tuple[int, int]:
        """First entry of this rank's piece, and first entry behind it."""
        size = self.size(numel)
        return min(self.rank * size, numel), min((self.rank + 1) * size, numel)


@dataclass(frozen=True)
class Placement:
    """Where weights go as they are read: the choice between one process and ZeRO-3."""

    partition: Partition
    parameter: Callable[[Tensor, torch.Size], nn.Parameter]
    """This rank's piece of a tensor, and the tensor's shape -> what stands for the tensor in its module."""
    sum_over_ranks: Callable[[Tensor], Tensor]
    finish: Callable[[nn.Module], None]
    """Called with every module once its tensors are there."""


def build_skeleton(config: PretrainedConfig, int8: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model on the meta device (no memory), its matrices replaced by int8 ones if asked for.

    Only buffers hold data already, as transformers makes them for a model in `dtype`.
    """
    # int8 layers replace modules before there is any data, so that float matrices never exist.
    auto = AutoModelForCausalLM if architecture_of(config) == "decoder-only" else AutoModelForSeq2SeqLM
    # A copy: transformers notes `dtype` in the config that it is given.
    own = copy.deepcopy(config)
    make = partial(auto.from_config, own, dtype=dtype, trust_remote_code=False)
    model: PreTrainedModel
    with torch.device("meta"):
        try:
            model = make(attn_implementation="sdpa")
        except ValueError:  # some families have no such attention
            model = make(attn_implementation="eager")
    model.eval().requires_grad_(False)  # eval: dropout would make ranks disagree, and a frozen model has no use for it
    _make_buffers(model, model)
    let_layers_be_passed_over(model)
    fuse(model)
    if int8:
        _replace_matrices(model, dtype)
    return model


def input_width(model: Any) -> int:
    """H: the width of a skeleton's input embeddings, which some families widen before their first layer."""
    return int(model.get_input_embeddings().weight.shape[1])


def untie_separate_weights(model: nn.Module, source: WeightSource) -> None:
    """Untie a tied parameter that the source stores under two names with different values.

    transformers ties T5's output layer to its embedding whatever the checkpoint says, and `from_pretrained` unties them
    by the same rule. T5 1.1 and the LM-adapted checkpoints need it.
    """
    prefix = str(model.base_model_prefix)
    for names in _names_by_parameter(model).values():
        there = {name: stored for name in names if (stored := stored_name(source, name, prefix)) is not None}
        first, *others = there or [""]
        for name in others:
            if not same_bytes(source, there[name], there[first]):
                module_name, _, key = name.rpartition(".")
                module = model.get_submodule(module_name)
                module._parameters[key] = nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False)


def load_weights(model: nn.Module, source: WeightSource, dtype: torch.dtype, placement: Placement) -> None:
    """Give every parameter of a skeleton its data, in `dtype` or int8, and load the buffers that are stored.

    A rank reads and quantises only the rows that it holds a piece of; every rank has the scales of all int8 rows.
    Beyond its own piece a rank holds at most some rows, as stored and once converted, or one whole tensor where the
    source cannot read rows.
    Raises: BackboneError when a tensor is missing or has another shape.
    """
    names = _names_by_parameter(model)
    prefix = str(model.base_model_prefix)
    _load_buffers(model, source)
    loaded: dict[int, _Loaded] = {}
    # Children before parents: `finish` then sees a module whose whole subtree is loaded.
    for module in _leaves_first(model):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in loaded:
                rows = _rows_of(module, parameter, source, require_stored_name(source, names[id(parameter)], prefix))
                piece, scale = _read_partition(rows, parameter, dtype, placement)
                loaded[id(parameter)] = _Loaded(placement.parameter(piece, parameter.shape), scale, parameter)
            # A tied parameter stays one object; each of its layers has the scale.
            entry = loaded[id(parameter)]
            module._parameters[key] = entry.parameter
            if entry.scale is not None:
                module.scale = entry.scale
        placement.finish(module)


@dataclass(frozen=True)
class _Loaded:
    parameter: nn.Parameter
    scale: Tensor | None
    skeleton: nn.Parameter
    """Kept, so that no other object gets its id."""


@dataclass(frozen=True)
class _Rows:
    """A stored tensor that is read by rows."""

    read: Callable[[int, int], Tensor]
    at_a_time: int


def _rows_of(module: nn.Module, parameter: nn.Parameter, source: WeightSource, name: str) -> _Rows:
    # GPT-2's `Conv1D` stores `[I, O]`: a row of the layer is a column of the file, so the tensor is read as a whole.
    turned = getattr(module, "stored_transposed", False) and parameter.dim() == 2
    stored = source.shape(name)
    shape = stored[::-1] if turned else stored
    if tuple(parameter.shape) != shape:
        raise _other_shape(source, name, shape, parameter.shape)
    if source.reads_rows and not turned:
        width = parameter.numel() // max(1, len(parameter))
        return _Rows(lambda first, last: source.read(name, first, last), max(1, _CHUNK // max(1, width)))
    return _Rows(
        lambda first, last: (source.read(name).t() if turned else source.read(name))[first:last], len(parameter)
    )


def _other_shape(source: WeightSource, name: str, stored: Sequence[int], wanted: Sequence[int]) -> BackboneError:
    return BackboneError(
        f"{source.origin}: the weight {name} has the shape {list(stored)} where config.json says {list(wanted)}"
    )


def _read_partition(
    rows: _Rows, parameter: nn.Parameter, dtype: torch.dtype, placement: Placement
) -> tuple[Tensor, Tensor | None]:
    """This rank's piece, flat and padded with zeros, and the scales of all rows if the parameter is int8."""
    # A piece may begin and end within a row; a row is quantised as a whole by each rank that holds some of it.
    int8 = parameter.dtype == torch.int8
    partition, numel, width = placement.partition, parameter.numel(), parameter.numel() // len(parameter)
    start, stop = partition.span(numel)
    size = partition.size(numel)
    piece = torch.empty(size, dtype=torch.int8 if int8 else dtype)
    piece[stop - start :] = 0
    scale = torch.zeros(len(parameter))
    first_row, last_row = start // width, -(-stop // width)
    for first in range(first_row, last_row, rows.at_a_time):
        last = min(first + rows.at_a_time, last_row)
        part = rows.read(first, last)
        if int8:
            part, scale[first:last] = quantize_matrix(part)
        into, out_of = max(start, first * width), min(stop, last * width)
        piece[into - start : out_of - start] = part.reshape(-1)[into - first * width : out_of - first * width]
    if not int8:
        return piece, None
    # Scales are summed over ranks, so one rank alone may count a row that two share: the one with its beginning.
    scale[: -(-start // width)] = 0
    return piece, placement.sum_over_ranks(scale)


def _replace_matrices(model: nn.Module, dtype: torch.dtype) -> None:
    """Put int8 layers in place of every linear layer and of the input embedding; tied weights stay tied."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    replaced: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def int8_of(weight: Tensor, transposed: bool = False) -> nn.Parameter:
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        # The old parameter is kept beside the new one, so that no other object gets its id.
        return replaced.setdefault(id(weight), (weight, empty_int8(rows, columns)))[1]

    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, key, Int8Linear(int8_of(child.weight), child.bias))
            elif isinstance(child, Conv1D):
                setattr(parent, key, Int8Linear(int8_of(child.weight, True), child.bias, stored_transposed=True))
            elif isinstance(child, nn.Embedding) and child.weight is table:
                setattr(parent, key, Int8Embedding(int8_of(child.weight), dtype, child))


def stored_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The buffers that a checkpoint stores: checkpoint name -> (module, key in the module)."""
    return {
        _name_in_checkpoint(f"{path}.{key}" if path else key): (module, key)
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


def _load_buffers(model: Any, source: WeightSource) -> None:
    """Raises: BackboneError when one is missing or has another shape."""
    optional = list(model._keys_to_ignore_on_load_missing or ())
    for name, (module, key) in stored_buffers(model).items():
        if any(re.search(pattern, name) for pattern in optional) and (
            stored_name(source, name, model.base_model_prefix) is None
        ):
            continue
        stored, buffer = source.read(require_stored_name(source, [name], model.base_model_prefix)), module._buffers[key]
        assert buffer is not None
        if stored.shape != buffer.shape:
            raise _other_shape(source, name, stored.shape, buffer.shape)
        module._buffers[key] = stored.to(buffer.dtype)


def _names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    """The names that a checkpoint may have for each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(_name_in_checkpoint(name))
    return names


def _name_in_checkpoint(name: str) -> str:
    # `Int8Embedding` holds the embedding that it replaced, so names in memory have one part more than in the file.
    return name.replace(f".{Int8Embedding.USUAL}.", ".")


def _leaves_first(module: nn.Module) -> list[nn.Module]:
    below = [leaf for child in module.children() for leaf in _leaves_first(child)]
    return [*below, module]


@torch.no_grad()
def _make_buffers(module: nn.Module, model: PreTrainedModel) -> None:
    """Compute buffers as `from_pretrained` does: by the `_init_weights` of the nearest model above each of them.

    Parameters are on the meta device meanwhile, so it changes nothing in them.
    """
    model = module if isinstance(module, PreTrainedModel) else model
    for child in module.children():
        _make_buffers(child, model)
    missing = {key: buffer for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
    for key, buffer in missing.items():
        module._buffers[key] = torch.empty_like(buffer, device="cpu")
    if missing:
        model._init_weights(module)
