"""Build the frozen model leaf by leaf: read this rank's rows of a tensor, quantise them, hand them to their host."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from pipeline.backbone.files import FAMILIES
from pipeline.backbone.fused import fuse
from pipeline.backbone.int8 import Int8Embedding, Int8Linear, empty_int8, quantize_rows
from pipeline.backbone.weights import WeightSource, first_name, stored_alike
from pipeline.errors import BackboneError

_CHUNK = 2**18
"""Weights that are read at a time: they stay in the processor's cache until they are quantised."""


@dataclass(frozen=True)
class Share:
    """What a rank holds of every tensor: one of `ranks` equal pieces of it, flattened, as ZeRO-3 partitions it."""

    rank: int = 0
    ranks: int = 1

    def size(self, numel: int) -> int:
        """Entries of a piece; the last one is padded."""
        return -(-numel // self.ranks)

    def span(self, numel: int) -> tuple[int, int]:
        """First entry in, first entry out."""
        size = self.size(numel)
        return min(self.rank * size, numel), min((self.rank + 1) * size, numel)


@dataclass(frozen=True)
class Placement:
    """Where weights go as they come."""

    share: Share
    parameter: Callable[[Tensor, torch.Size], nn.Parameter]
    """This rank's piece of a tensor, and the tensor's shape -> what stands for the tensor in its module."""
    sum_over_ranks: Callable[[Tensor], Tensor]
    finish: Callable[[nn.Module], None]
    """Told of every module once its tensors are there."""


def build_skeleton(config: PretrainedConfig, int8: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model on the meta device (no memory), its matrices replaced by int8 ones if asked for."""
    auto = AutoModelForCausalLM if FAMILIES[config.model_type] == "decoder-only" else AutoModelForSeq2SeqLM
    with torch.device("meta"):
        model: nn.Module = auto.from_config(config, attn_implementation="sdpa", trust_remote_code=False)
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
            if not stored_alike(source, name, stored[0]):
                module_name, _, key = name.rpartition(".")
                module = model.get_submodule(module_name)
                module._parameters[key] = nn.Parameter(torch.empty_like(model.get_parameter(name)), requires_grad=False)


def load_weights(model: nn.Module, source: WeightSource, dtype: torch.dtype, placement: Placement) -> None:
    """Give every parameter of a skeleton its data, in `dtype` or int8, leaf by leaf.

    A rank reads and quantises only the rows that it holds a piece of; scales of int8 rows are whole on every rank.
    The most that is held beyond the rank's own share is some rows as stored and once converted; of a tensor that
    cannot be read by rows, the tensor.
    Raises: BackboneError when a tensor is missing or has another shape.
    """
    names = _names_by_parameter(model)
    loaded: dict[int, _Loaded] = {}
    for module in _leaves_first(model):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            if id(parameter) not in loaded:
                rows = _rows_of(module, parameter, source, first_name(source, names[id(parameter)]))
                piece, scale = _read_share(rows, parameter, dtype, placement)
                loaded[id(parameter)] = _Loaded(placement.parameter(piece, parameter.shape), scale, parameter)
            # A tied parameter stays one object; each of its layers has the scale.
            entry = loaded[id(parameter)]
            module._parameters[key] = entry.parameter
            if entry.scale is not None:
                module.scale = entry.scale
        _make_buffers(model, module)
        placement.finish(module)


@dataclass(frozen=True)
class _Loaded:
    parameter: nn.Parameter
    scale: Tensor | None
    skeleton: nn.Parameter
    """Kept, so that its id stays unique."""


@dataclass(frozen=True)
class _Rows:
    """A stored tensor, to be read by rows."""

    read: Callable[[int, int], Tensor]
    at_a_time: int


def _rows_of(module: nn.Module, parameter: nn.Parameter, source: WeightSource, name: str) -> _Rows:
    turned = getattr(module, "stored_transposed", False) and parameter.dim() == 2
    stored = source.shape(name)
    shape = stored[::-1] if turned else stored
    if tuple(parameter.shape) != shape:
        raise BackboneError(
            f"{source.origin}: a weight has the shape {list(shape)} where config.json says {list(parameter.shape)}"
        )
    if source.reads_rows and not turned:
        width = parameter.numel() // max(1, len(parameter))
        return _Rows(lambda first, last: source.read(name, first, last), max(1, _CHUNK // max(1, width)))
    return _Rows(
        lambda first, last: (source.read(name).t() if turned else source.read(name))[first:last], len(parameter)
    )


def _read_share(
    rows: _Rows, parameter: nn.Parameter, dtype: torch.dtype, placement: Placement
) -> tuple[Tensor, Tensor | None]:
    """This rank's piece, flat and padded with zeros, and the scales of all rows if the parameter is int8."""
    int8 = parameter.dtype == torch.int8
    share, numel, width = placement.share, parameter.numel(), parameter.numel() // len(parameter)
    start, stop = share.span(numel)
    size = share.size(numel)
    piece = torch.empty(size, dtype=torch.int8 if int8 else dtype)
    piece[stop - start :] = 0
    scale = torch.zeros(len(parameter))
    first_row, last_row = start // width, -(-stop // width)
    for first in range(first_row, last_row, rows.at_a_time):
        last = min(first + rows.at_a_time, last_row)
        part = rows.read(first, last)
        if int8:
            part, scale[first:last] = quantize_rows(part)
        into, out_of = max(start, first * width), min(stop, last * width)
        piece[into - start : out_of - start] = part.reshape(-1)[into - first * width : out_of - first * width]
    if not int8:
        return piece, None
    # A row that two ranks share counts once: for the one that has its beginning.
    scale[: -(-start // width)] = 0
    return piece, placement.sum_over_ranks(scale)


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


def _make_buffers(model: nn.Module, module: nn.Module) -> None:
    # Buffers that no checkpoint stores (rotary frequencies): transformers knows how to compute them.
    missing = {key: buffer for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
    for key, buffer in missing.items():
        module._buffers[key] = torch.empty_like(buffer, device="cpu")
    if missing:
        model._init_weights(module)  # type: ignore[operator]
