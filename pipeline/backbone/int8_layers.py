"""Which parts of a model become int8: all that are large, and whose arithmetic is known."""

import dis
import inspect
import itertools
import re
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pipeline.backbone.experts import make_experts_int8
from pipeline.backbone.int8 import Int8Embedding, empty_int8, make_int8_linear

_LARGE_TABLE = 2**24
"""Weights from which a table other than that of the input embeddings is kept in int8."""
_LINEAR = ("FalconLinear",)
"""Classes of linear layers, by name, whose forward of their own computes the same."""
_ROUTERS = ("gate", "router", "shared_expert_gate")
"""What routers are called beside experts."""


def make_int8(model: nn.Module, dtype: torch.dtype) -> None:
    """Put int8 layers in place of a skeleton's linear layers, experts and large tables; tied weights stay tied."""
    table = model.get_input_embeddings().weight  # type: ignore[operator]
    replaced: dict[int, tuple[Tensor, nn.Parameter]] = {}

    def int8_of(weight: Tensor, transposed: bool = False) -> nn.Parameter:
        rows, columns = reversed(weight.shape) if transposed else weight.shape
        # The old parameter is kept beside the new one, so that no other object gets its id.
        return replaced.setdefault(id(weight), (weight, empty_int8(rows, columns)))[1]

    # An embedding that shares its table with an output layer goes with it.
    shared = {id(table)} | {id(layer.weight) for layer in model.modules() if isinstance(layer, nn.Linear)}
    make_experts_int8(model)
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if isinstance(child, Conv1D) or (_is_linear(child) and not _is_router(parent, key)):
                transposed = isinstance(child, Conv1D)
                seen_as = dtype if _reads_matrix(parent, key) else None
                layer = make_int8_linear(int8_of(child.weight, transposed), child.bias, transposed, seen_as)
                setattr(parent, key, layer)
            elif isinstance(child, nn.Embedding) and (
                id(child.weight) in shared or child.weight.numel() >= _LARGE_TABLE
            ):
                setattr(parent, key, Int8Embedding(int8_of(child.weight), dtype, child))


def _reads_matrix(parent: nn.Module, key: str) -> bool:
    """Whether the code of a module reads the matrix of its child: for a product of its own, or for its type."""
    kind: Any = type(parent)
    return (key, "weight") in _read_of_children(kind)


@cache
def _read_of_children(kind: Any) -> frozenset[tuple[Any, Any]]:
    """Pairs of attributes, (a child, `weight`), that a class of transformers reads one after the other."""
    functions = [
        inspect.unwrap(function)
        for above in kind.__mro__
        if above.__module__.startswith("transformers.models.")
        for name, function in vars(above).items()
        if inspect.isfunction(function) and name != "_init_weights"
    ]
    loads = [[step.argval for step in dis.get_instructions(function)] for function in functions]
    return frozenset(pair for names in loads for pair in itertools.pairwise(names) if pair[1] == "weight")


def _is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module multiplies by its matrix and does nothing else."""
    return isinstance(module, nn.Linear) and (
        type(module).forward is nn.Linear.forward or type(module).__name__ in _LINEAR
    )


def _is_router(parent: nn.Module, key: str) -> bool:
    # A router is small, and rounding it sends tokens to other experts.
    return "Router" in type(parent).__name__ or (hasattr(parent, "experts") and key in _ROUTERS)


def weights_in_float(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Parameters of a skeleton that are not int8, layers' numbers as `*`: name -> bytes in `dtype`, most first."""
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.int8:
            alike = re.sub(r"\b\d+\b", "*", name)
            sizes[alike] = sizes.get(alike, 0) + parameter.numel() * dtype.itemsize
    return dict(sorted(sizes.items(), key=lambda item: -item[1]))
