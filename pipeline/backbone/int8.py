"""Layers whose frozen matrix is int8: what lets ZeRO-3 partition it as int8.

bitsandbytes' own `Linear8bitLt` keeps its matrix in attributes that ZeRO cannot see, so every
rank would hold all of it. Here the matrix is an ordinary int8 parameter, quantised row by row
with bitsandbytes' function (absmax of each output row, Dettmers et al. 2022, without outliers).

The product multiplies activations in their own type by the int8 matrix converted on the fly:
exact in the matrix's 8 bits, row-independent (so trials in one batch cannot touch each other),
and with an exact gradient. Nothing is stored for the backward pass but a reference.
"""

import logging
from typing import Any

import torch

# It warns at import of a kernel for 4 bits, which is not used here.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

from bitsandbytes.functional import int8_vectorwise_quant  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional  # noqa: E402

_LEVELS = 127.0
_CHUNK = 2**20
"""Weights that are quantised at a time."""


class Int8Linear(nn.Module):
    """`y = x Wᵀ + b` with W `[O, I]` frozen in int8 and one float32 scale per output row."""

    scale: Tensor

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, stored_transposed: bool = False) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.stored_transposed = stored_transposed
        """Whether checkpoints hold `[I, O]`, as for GPT-2's `Conv1D`."""
        self.register_buffer("scale", _unknown_scale(weight))

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., I]` of any float type -> `[..., O]` of the same type."""
        y = _Int8Product.apply(x, self.weight, self.scale)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{len(self.scale)} rows of int8"


class Int8Embedding(nn.Module):
    """A table `[V, H]` frozen in int8, with one float32 scale a token; may share its table with the output layer."""

    scale: Tensor

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype
        self.register_buffer("scale", _unknown_scale(weight))

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids `[...]` -> embeddings `[..., H]`."""
        rows = functional.embedding(token_ids, self.weight)
        return (rows * self.scale[token_ids].unsqueeze(-1)).to(self.dtype)


def empty_int8(rows: int, columns: int) -> nn.Parameter:
    """A parameter `[rows, columns]` on the meta device, to be loaded."""
    return nn.Parameter(torch.empty(rows, columns, dtype=torch.int8, device="meta"), requires_grad=False)


def _unknown_scale(weight: nn.Parameter) -> Tensor:
    # A buffer: DeepSpeed would cast a float32 parameter to bf16 without a word.
    return torch.empty(weight.shape[0], dtype=torch.float32, device="meta")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W `[O, I]` of any float type -> (int8 `[O, I]`, float32 scale `[O]`) with W ≈ int8 x scale, row by row."""
    rows, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape[0])
    # Some rows at a time: bitsandbytes makes several float copies of what it quantises.
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        part = weight[start : start + step].to(torch.float32).contiguous()
        rows[start : start + step], absmax, _ = int8_vectorwise_quant(part)
        scale[start : start + step] = absmax.to(torch.float32) / _LEVELS
    return rows, scale


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        # A reference to the parameter, not its data: ZeRO-3 releases the data after this
        # layer and gathers it again behind the same object before this layer's backward.
        ctx.weight, ctx.scale = weight, scale
        return ((x @ weight.to(x.dtype).t()) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        scaled = (grad * ctx.scale).to(grad.dtype)
        return scaled @ ctx.weight.to(grad.dtype), None, None
