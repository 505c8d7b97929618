"""How many kernels a layer asks a GPU to launch, and how many bytes they move: counted without a GPU and without data.

A layer of any size runs on PyTorch's meta device, where tensors have shapes alone; what would be launched is listed in
its stead. A pass that had to wait for a number from the device would fail there, so one that is counted waits for none.

Shapes: N tokens that run, H hidden.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from pipeline.backbone import gpu
from pipeline.backbone.int8 import Int8Linear, set_products
from pipeline.backbone.packed import make_layout, run_packed
from pipeline.lab.benchmark.random_weights import random_model

META = torch.device("meta")
# They make another view of a tensor, or room for one, and launch nothing.
_NOTHING = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "detach", "alias", "unsqueeze", "squeeze", "slice", "select"),
    *("permute", "as_strided", "split", "unbind", "empty", "empty_like", "empty_strided", "new_empty", "unflatten"),
    *("_reshape_alias", "lift_fresh", "split_with_sizes"),
}
_LOOKUPS = {"embedding", "index", "index_select", "gather"}
"""They read as much of their first tensor as they write, and not all of it."""


@dataclass
class Counts:
    """What was launched, by the name of an operator or kernel."""

    launches: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)
    """Bytes of inputs and outputs. An input that a kernel reads again counts once: caches may hold it."""

    def minus(self, other: "Counts") -> "Counts":
        return Counts(self.launches - other.launches, self.moved - other.moved)


@dataclass(frozen=True)
class LayerCost:
    """Of one layer in one direction."""

    launches: int
    moved: int
    """Bytes."""
    least: int
    """Bytes of the layer's weights once, and of what goes into the layer and out of it once."""
    least_of_products: int
    """The same of each of its products: int8 weights and int8 rows in, and a row of activations out."""
    by_name: dict[str, tuple[int, int]]
    """Launches and bytes of each operator or kernel, most bytes first."""

    @property
    def times_least(self) -> float:
        return self.moved / self.least


class LaunchCounter(TorchDispatchMode):
    """Counts PyTorch's operators while it is active; those that launch nothing are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counts()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        if name not in _NOTHING:
            given, made = _tensors((args, kwargs)), _tensors(out)
            written = sum(map(_bytes, made))
            read = sum(map(_bytes, given))
            if name in _LOOKUPS:
                read += written - _bytes(given[0])
            self.add(name, read + written)
        return out

    def add(self, name: str, moved: int) -> None:
        self.found.launches[name] += 1
        self.found.moved[name] += moved

    def so_far(self) -> Counts:
        return Counts(Counter(self.found.launches), Counter(self.found.moved))


def _tensors(values: Any) -> list[Tensor]:
    """The different tensors in a structure."""
    return list({id(leaf): leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}.values())


def _bytes(tensor: Tensor) -> int:
    """What a tensor takes in memory; a side along which it was only expanded counts once."""
    entries = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        entries *= size if stride or not size else 1
    return entries * tensor.itemsize


def layer_costs(
    config: Callable[[int], PretrainedConfig],
    lengths: Sequence[int],
    parents: Sequence[int | None],
    kernels: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[LayerCost, LayerCost]:
    """Costs of one more layer, forward and backward, in int8 products with activations in `dtype`.

    config: makes the configuration of a decoder-only model with so many layers. lengths, parents: the segments of the
    packed row. kernels: with Triton's kernels, else with PyTorch's operators alone.
    Raises: ImportError where the kernels are wanted and Triton is not installed.
    """
    one, two = (_passes(config(layers), lengths, parents, kernels, dtype) for layers in (1, 2))
    least = _least(config(1), sum(lengths), dtype)
    forward, backward = (more.minus(fewer) for fewer, more in zip(one, two, strict=True))
    return _cost(forward, *least[:2]), _cost(backward, least[0], least[2])


def _passes(
    config: PretrainedConfig, lengths: Sequence[int], parents: Sequence[int | None], kernels: bool, dtype: torch.dtype
) -> tuple[Counts, Counts]:
    """What a model's layers launch forward and backward."""
    model = random_model(config, META, dtype, int8=True, kernels=kernels)
    set_products(model, "int8", META)
    x = torch.zeros(sum(lengths), config.hidden_size, dtype=dtype, device=META, requires_grad=True)
    layout = make_layout(lengths, parents, META)
    with ExitStack() as stack:
        counter = stack.enter_context(LaunchCounter())
        if kernels:
            stack.enter_context(gpu.used(True))
            stack.enter_context(_kernels_listed(counter))
        hidden = run_packed(model, x, layout)
        forward = counter.so_far()
        torch.autograd.grad(hidden, x, torch.ones_like(hidden))
    return forward, counter.so_far().minus(forward)


@contextmanager
def _kernels_listed(counter: LaunchCounter) -> Iterator[None]:
    """Meanwhile Triton's kernels are counted, and not run."""
    from pipeline.backbone.gpu import attention_kernels

    # Compiled or interpreted, see TRITON_INTERPRET.
    kind = next(kind for kind in type(attention_kernels.forward).__mro__ if "__getitem__" in vars(kind))

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: counter.add(kernel.fn.__name__, sum(map(_bytes, _tensors((args, kwargs)))))

    with mock.patch.object(kind, "__getitem__", launch):
        yield


def _least(config: PretrainedConfig, tokens: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """The least bytes that a layer must move in one direction; and that its products must, forward and backward."""
    (layer,) = random_model(config, META, dtype, int8=True, kernels=False).model.layers
    weights = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
    sides = [module.sides for module in layer.modules() if isinstance(module, Int8Linear)]  # (O, I)
    forward = sum(o * i + tokens * (i + o * dtype.itemsize) for o, i in sides)
    backward = sum(o * i + tokens * (o + i * dtype.itemsize) for o, i in sides)
    return weights + 2 * tokens * config.hidden_size * dtype.itemsize, forward, backward


def _cost(counts: Counts, least: int, least_of_products: int) -> LayerCost:
    by_name = {name: (counts.launches[name], size) for name, size in counts.moved.most_common()}
    return LayerCost(counts.launches.total(), counts.moved.total(), least, least_of_products, by_name)
