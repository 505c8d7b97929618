"""Experts of a layer whose frozen matrices are int8 parameters `[E, O, I]`, one scale for each row of each expert.

transformers keeps the experts of a layer in one tensor, and asks its experts interface for the function that runs
them. Here the function of int8 experts is registered. It runs the rows of one expert after the other.

Shapes: N tokens, K experts a token, E experts, H hidden.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pipeline.backbone.int8 import empty_int8, multiply, scale_of, unknown_scale

_NAME = "promptbank_int8"
_MATRICES = ("weight", "gate_up_proj", "up_proj", "down_proj")
_BY_BLOCKS = ("Llama4TextExperts",)
"""Experts, by class name, that take tokens `[E * N, H]` in one block for each expert, `[I, O]` matrices, no biases."""
_SORTED = ("JetMoeParallelExperts",)
"""Experts, by class name, of one matrix each, that take tokens in the order of experts."""
_OF_OWN = ("LongcatFlashExperts", "Step3p7Experts")
"""Experts, by class name, that take what the interface's do, but do not ask it."""


def make_experts_int8(model: nn.Module) -> None:
    """Put int8 parameters in place of the matrices of a skeleton's experts."""
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if type(child).__name__ in _BY_BLOCKS:
                setattr(parent, key, BlockExperts(child))
            elif type(child).__name__ in _SORTED:
                setattr(parent, key, SortedExperts(child))
            elif type(child).__name__ in _OF_OWN and _matrices(child):
                _make_int8(child, transposed=False)
                child.forward = partial(_run_experts, child)
            elif hasattr(child, "is_transposed") and _matrices(child):
                _make_int8(child, bool(child.is_transposed))
                child.config._experts_implementation = _NAME  # type: ignore[union-attr]


def _matrices(experts: nn.Module) -> dict[str, nn.Parameter]:
    named = {key: experts._parameters.get(key) for key in _MATRICES}
    return {key: matrix for key, matrix in named.items() if matrix is not None and matrix.dim() == 3}


def _make_int8(experts: Any, transposed: bool) -> None:
    for key, matrix in _matrices(experts).items():
        count, rows, columns = matrix.shape
        int8 = empty_int8(count, columns, rows) if transposed else empty_int8(count, rows, columns)
        experts._parameters[key] = int8
        experts.register_buffer(scale_of(key), unknown_scale(int8), persistent=False)
    experts.stored_transposed = transposed
    experts.with_matrices = count
    experts.sides = tuple(side for matrix in _matrices(experts).values() for side in matrix.shape[1:])
    experts.int8_products = experts.exact_backward = experts.kernels = False


def _product(experts: Any, key: str, x: Tensor, expert: int) -> Tensor:
    y = multiply(experts, x, getattr(experts, key), getattr(experts, scale_of(key))[expert], expert)
    bias = experts._parameters.get(f"{key}_bias")
    return y if bias is None else y + bias[expert]


def _by_expert(top_k_index: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each expert that some token goes to, and the places of these tokens in the flattened `[N, K]`."""
    index = top_k_index.flatten()
    order = index.argsort(stable=True)
    counts = index.bincount().tolist()
    yield from ((expert, places) for expert, places in enumerate(order.split(counts)) if len(places))


def _run_expert(experts: Any, x: Tensor, expert: int) -> Tensor:
    if expert >= experts.with_matrices:  # one of LongCat's that leave a token as it is
        return x
    if not getattr(experts, "has_gate", True):
        return _product(experts, "down_proj", experts.act_fn(_product(experts, "up_proj", x, expert)), expert)
    inner = _product(experts, "gate_up_proj", x, expert)
    if hasattr(experts, "_apply_gate"):
        return _product(experts, "down_proj", experts._apply_gate(inner), expert)
    gate, up = inner.chunk(2, dim=-1)
    return _product(experts, "down_proj", experts.act_fn(gate) * up, expert)


def _run_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`[N, H]`, each token's experts and their weights `[N, K]` -> the weighted sums of the experts' outputs `[N, H]`.

    As transformers' own functions of this interface, but for the products.
    """
    some = list(_by_expert(top_k_index))
    places = torch.cat([of_expert for _, of_expert in some])
    tokens = hidden_states[places // top_k_index.shape[-1]]
    outputs = []
    for (expert, _), x in zip(some, tokens.split([len(of_expert) for _, of_expert in some]), strict=True):
        outputs.append(_run_expert(experts, x, expert))
    output = torch.cat(outputs)
    if getattr(experts, "has_post_expert_norm", False):
        output = experts.post_expert_norm(output)
    weighted = output * top_k_weights.flatten()[places, None]
    # Back to the order of tokens and summed there: adding up by index has no fixed order on a GPU.
    return weighted[places.argsort()].view(*top_k_index.shape, -1).sum(-2).to(hidden_states.dtype)


ALL_EXPERTS_FUNCTIONS.register(_NAME, _run_experts)


class BlockExperts(nn.Module):
    """llama4's experts in int8: every token is given to every expert, times its score, which is zero for most."""

    with_matrices: int

    def __init__(self, usual: Any) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.act_fn = usual.gate_up_proj, usual.down_proj, usual.act_fn
        _make_int8(self, transposed=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`[E * N, H]` -> `[E * N, H]`."""
        return torch.cat([self._run(x, expert) for expert, x in enumerate(hidden_states.chunk(self.with_matrices))])

    def _run(self, x: Tensor, expert: int) -> Tensor:
        # A row of zeros gives zeros, and no gradient: SiLU(0) is 0.
        rows = x.any(-1).nonzero().squeeze(-1)
        if not len(rows):
            return torch.zeros_like(x)
        gate, up = _product(self, "gate_up_proj", x[rows], expert).chunk(2, dim=-1)
        return torch.zeros_like(x).index_copy(0, rows, _product(self, "down_proj", up * self.act_fn(gate), expert))


class SortedExperts(nn.Module):
    """JetMoE's experts in int8, for one of their products."""

    def __init__(self, usual: Any) -> None:
        super().__init__()
        self.weight = usual.weight
        _make_int8(self, transposed=False)

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """Tokens `[N, I]` in the order of experts, and each expert's number of them -> `[N, O]`."""
        parts = enumerate(inputs.split(list(expert_size)))
        return torch.cat([_product(self, "weight", x, expert) for expert, x in parts if len(x)])
