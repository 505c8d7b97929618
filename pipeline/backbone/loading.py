"""Build the frozen model module by module: read this rank's rows of a tensor, quantise them, hand them to their host.

No rank ever holds the whole model, so `from_pretrained` cannot be used: it loads first and partitions afterwards.
"""

import copy
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig, PreTrainedModel

from pipeline.backbone import conversion
from pipeline.backbone.conversion import StoredTensor, require_stored
from pipeline.backbone.files import architecture_of
from pipeline.backbone.fused import fuse
from pipeline.backbone.int8 import Int8Embedding, quantize_matrix, scale_of
from pipeline.backbone.int8_layers import make_int8, weights_in_float
from pipeline.backbone.output import let_layers_be_passed_over
from pipeline.backbone.weights import WeightSource, same_bytes
from pipeline.errors import BackboneError

_CHUNK = 2**18
"""Weights that are read at a time: so few stay in the processor's cache until they are quantised."""
_MUCH = 0.05
"""Part of the weights' bytes from which it is told what stays in float."""
_NAMED = 4
_log = logging.getLogger(__name__)


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
        make_int8(model, dtype)
    return model


def input_width(model: Any) -> int:
    """H: the width of a skeleton's input embeddings, which some families widen before their first layer."""
    return int(model.get_input_embeddings().weight.shape[1])


def stored_tensors(model: nn.Module, source: WeightSource) -> dict[str, StoredTensor]:
    """What a source has of a skeleton: name in transformers' model -> how stored tensors make it.

    Raises: BackboneError when one tensor is stored under two names, or cannot be put together.
    """
    # The skeleton may have turned a tensor; names and shapes here are those of transformers' model.
    shapes = {
        _name_in_checkpoint(name): _turned(parameter.shape) if _is_turned(module, parameter) else tuple(parameter.shape)
        for name, module, parameter in _named_parameters(model)
    }
    buffers = {name: tuple(module._buffers[key].shape) for name, (module, key) in stored_buffers(model).items()}  # type: ignore[union-attr]
    return conversion.stored_tensors(model, shapes | buffers, source)


def untie_separate_weights(model: nn.Module, source: WeightSource) -> None:
    """Untie a tied parameter that the source stores under two names with different values.

    transformers ties T5's output layer to its embedding whatever the checkpoint says, and `from_pretrained` unties them
    by the same rule. T5 1.1 and the LM-adapted checkpoints need it.
    """
    tied = [names for names in _names_by_parameter(model).values() if len(names) > 1]
    stored = stored_tensors(model, source) if tied else {}
    for names in tied:
        there = [name for name in names if name in stored]
        for name in there[1:]:
            if not same_bytes(source, stored[name].names, stored[there[0]].names):
                module_name, _, key = name.rpartition(".")
                module = model.get_submodule(module_name)
                module._parameters[key] = nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False)


def load_weights(model: nn.Module, source: WeightSource, dtype: torch.dtype, placement: Placement) -> None:
    """Give every parameter of a skeleton its data, in `dtype` or int8, and load the buffers that are stored.

    A rank reads the rows that it holds a piece of, and of experts those experts, and quantises only these rows; every
    rank has the scales of all int8 rows. Beyond its own piece a rank holds at most some rows or one expert, as stored
    and once converted, or one whole tensor where the source cannot read rows or stores several tensors as one.
    Raises: BackboneError when a tensor is missing or has another shape.
    """
    names = _names_by_parameter(model)
    stored = stored_tensors(model, source)
    _load_buffers(model, stored, source)
    in_float = _large_part_in_float(model, dtype)
    loaded: dict[int, _Loaded] = {}
    # Children before parents: `finish` then sees a module whose whole subtree is loaded.
    for module in _leaves_first(model):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in loaded:
                rows = _computed_rows(model, module, key, names[id(parameter)], stored) or _rows_of(
                    module, parameter, require_stored(stored, names[id(parameter)], source), source
                )
                piece, scale = _read_partition(rows, parameter, dtype, placement)
                loaded[id(parameter)] = _Loaded(placement.parameter(piece, parameter.shape), scale, parameter)
            # A tied parameter stays one object; each of its layers has the scale.
            entry = loaded[id(parameter)]
            module._parameters[key] = entry.parameter
            if entry.scale is not None:
                setattr(module, scale_of(key), entry.scale)
        placement.finish(module)
    if placement.partition.rank == 0 and in_float:
        _log.info("%s", in_float)


def _large_part_in_float(model: nn.Module, dtype: torch.dtype) -> str | None:
    """A sentence on what of an int8 model stays in float, if that is much."""
    int8 = sum(parameter.numel() for parameter in model.parameters() if parameter.dtype == torch.int8)
    in_float = weights_in_float(model, dtype)
    total = sum(in_float.values())
    if not int8 or total <= _MUCH * (total + int8):
        return None
    named = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in list(in_float.items())[:_NAMED])
    return f"{total / (total + int8):.0%} of the weights' bytes stay in float: {named}{' …' * (len(in_float) > _NAMED)}"


@dataclass(frozen=True)
class _Loaded:
    parameter: nn.Parameter
    scale: Tensor | None
    skeleton: nn.Parameter
    """Kept, so that no other object gets its id."""


@dataclass(frozen=True)
class _Rows:
    """A stored tensor that is read by entries along its first side: by rows, or by experts of many rows each."""

    read: Callable[[int, int], Tensor]
    at_a_time: int


def _rows_of(module: nn.Module, parameter: nn.Parameter, stored: StoredTensor, source: WeightSource) -> _Rows:
    # GPT-2's `Conv1D` stores `[I, O]`: a row of the layer is a column of the file, so the tensor is read as a whole.
    # Of experts `[E, I, O]` each is turned by itself.
    turned = _is_turned(module, parameter)
    shape = _turned(stored.shape) if turned else stored.shape
    if tuple(parameter.shape) != shape:
        raise _other_shape(source, stored, shape, parameter.shape)
    entries = len(parameter) if shape else 1
    if stored.in_parts and not (turned and parameter.dim() == 2):
        at_a_time = max(1, _CHUNK // max(1, parameter.numel() // entries))
        if not turned:
            return _Rows(stored.read, at_a_time)
        return _Rows(lambda first, last: stored.read(first, last).mT, at_a_time)
    everything = (0, stored.shape[0] if shape else 1)
    return _Rows(
        lambda first, last: (stored.read(*everything).mT if turned else stored.read(*everything))[first:last], entries
    )


def _computed_rows(
    model: Any, module: Any, key: str, names: Sequence[str], stored: dict[str, StoredTensor]
) -> _Rows | None:
    """A parameter that need not be stored, since transformers computes it (sinusoids, say); None if it is stored."""
    optional = list(model._keys_to_ignore_on_load_missing or ())
    if any(name in stored for name in names) or not any(re.search(o, name) for o in optional for name in names):
        return None
    made, empty = copy.copy(module), nn.Parameter(torch.empty_like(module._parameters[key], device="cpu"))
    made._parameters = {**module._parameters, key: empty}
    with torch.random.fork_rng(devices=[]):
        model._init_weights(made)
    tensor = empty.detach()
    return _Rows(lambda first, last: tensor[first:last], len(tensor))


def _is_turned(module: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether transformers has the last two sides of an int8 matrix the other way round."""
    return bool(getattr(module, "stored_transposed", False)) and parameter.dtype == torch.int8


def _turned(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2])


def _other_shape(
    source: WeightSource, stored: StoredTensor, shape: Sequence[int], wanted: Sequence[int]
) -> BackboneError:
    name = stored.names[0] + (f" (with {len(stored.names) - 1} others)" if len(stored.names) > 1 else "")
    return BackboneError(
        f"{source.origin}: the weight {name} has the shape {list(shape)} where config.json says {list(wanted)}"
    )


def _read_partition(
    rows: _Rows, parameter: nn.Parameter, dtype: torch.dtype, placement: Placement
) -> tuple[Tensor, Tensor | None]:
    """This rank's piece, flat and padded with zeros, and the scales of all rows if the parameter is int8."""
    # A piece may begin and end within a row; a row is quantised as a whole by each rank that holds some of it.
    int8 = parameter.dtype == torch.int8
    partition, numel = placement.partition, parameter.numel()
    entries = len(parameter) if parameter.dim() else 1
    width = parameter.shape[-1] if int8 else numel // entries
    of_entry = numel // entries // width  # rows: more than one of an expert
    start, stop = partition.span(numel)
    size = partition.size(numel)
    piece = torch.empty(size, dtype=torch.int8 if int8 else dtype)
    piece[stop - start :] = 0
    scale = torch.zeros(numel // width)
    first_row, last_row = start // width, -(-stop // width)
    last_entry = -(-last_row // of_entry)
    for entry in range(first_row // of_entry, last_entry, rows.at_a_time):
        read = rows.read(entry, min(entry + rows.at_a_time, last_entry)).reshape(-1, width)
        first = max(first_row, entry * of_entry)
        part = read[first - entry * of_entry : last_row - entry * of_entry]
        last = first + len(part)
        if int8:
            part, scale[first:last] = quantize_matrix(part)
        into, out_of = max(start, first * width), min(stop, last * width)
        piece[into - start : out_of - start] = part.reshape(-1)[into - first * width : out_of - first * width]
    if not int8:
        return piece, None
    # Scales are summed over ranks, so one rank alone may count a row that two share: the one with its beginning.
    scale[: -(-start // width)] = 0
    return piece, placement.sum_over_ranks(scale).view(parameter.shape[:-1])


def stored_buffers(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The buffers that a checkpoint stores: checkpoint name -> (module, key in the module)."""
    return {
        _name_in_checkpoint(f"{path}.{key}" if path else key): (module, key)
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
        if buffer is not None and key not in module._non_persistent_buffers_set
    }


def _load_buffers(model: Any, tensors: dict[str, StoredTensor], source: WeightSource) -> None:
    """Raises: BackboneError when one is missing or has another shape."""
    # Some are kept in float32 whatever the model's type: biases that decide which experts a token goes to, say.
    wide = list(model._get_dtype_plan(model.dtype))
    optional = list(model._keys_to_ignore_on_load_missing or ())
    for name, (module, key) in stored_buffers(model).items():
        if name not in tensors and any(re.search(pattern, name) for pattern in optional):
            continue
        found, buffer = require_stored(tensors, [name], source), module._buffers[key]
        assert buffer is not None
        if found.shape != tuple(buffer.shape):
            raise _other_shape(source, found, found.shape, buffer.shape)
        stored = found.read(0, found.shape[0] if found.shape else 1)
        keep = any(re.search(pattern.replace("*", ".*"), name) for pattern in wide)
        module._buffers[key] = stored.to(torch.float32 if keep else buffer.dtype)


def _names_by_parameter(model: nn.Module) -> dict[int, list[str]]:
    """The names that a checkpoint may have for each parameter."""
    names: dict[int, list[str]] = {}
    for name, _, parameter in _named_parameters(model):
        names.setdefault(id(parameter), []).append(_name_in_checkpoint(name))
    return names


def _named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Every parameter under each of its names, with the module that holds it."""
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{path}.{key}" if path else key, module, parameter


def _name_in_checkpoint(name: str) -> str:
    # `Int8Embedding` holds the embedding that it replaced, so names in memory have one part more than in the file.
    return name.replace(f".{Int8Embedding.USUAL}.", ".")


def _leaves_first(module: nn.Module) -> list[nn.Module]:
    below = [leaf for child in module.children() for leaf in _leaves_first(child)]
    return [*below, module]


@torch.no_grad()
def _make_buffers(module: nn.Module, model: PreTrainedModel) -> bool:
    """Compute buffers as `from_pretrained` does: by the `_init_weights` of the nearest model above each of them.

    Parameters are on the meta device meanwhile, so it changes nothing in them. Returns whether there were any buffers.
    """
    model = module if isinstance(module, PreTrainedModel) else model
    below = [_make_buffers(child, model) for child in module.children()]
    missing = {key: buffer for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
    for key, buffer in missing.items():
        # A buffer that nothing sets must be seen, so it does not hold what lay in memory.
        empty = torch.nan if buffer.is_floating_point() else 0
        module._buffers[key] = torch.full_like(buffer, empty, device="cpu")
    if missing or any(below):  # some models set the buffers of their layers
        model._init_weights(module)
    return bool(missing) or any(below)
