"""What surrounds an int8 product on a GPU, each in one launch; PyTorch's operators take four and three.

Shapes: N tokens, X the width of a row.
"""

from typing import Any

import torch
from torch import Tensor

_BLOCK = 1024
"""Numbers that a program handles at a time."""


def quantize_activations(x: Tensor, smallest: float, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X `[N, X]` of any float type, times `columns` `[X]` if given -> (int8 `[N, X]`, float32 scale `[N, 1]`).

    A row whose largest number is below `smallest` is divided by that. The scale of a row that is not finite is NaN.
    """
    from pipeline.backbone.gpu import row_kernels

    x = x.contiguous()
    rows, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty((len(x), 1), dtype=torch.float32)
    if len(x):
        row_kernels.quantize[(len(x),)](
            x, scale if columns is None else columns, rows, scale, x.shape[1], smallest, columns is not None, _BLOCK
        )
    return rows, scale


def rescale(product: Tensor, row_scale: Tensor, columns: Tensor | None, dtype: torch.dtype = torch.float32) -> Tensor:
    """Int32 `[N, X]` times scales `[N, 1]`, and times `columns` `[X]` if given -> `[N, X]`, rounded once to `dtype`."""
    from pipeline.backbone.gpu import row_kernels

    y = torch.empty_like(product, dtype=dtype)
    if len(product):
        grid = (len(product), -(-product.shape[1] // _BLOCK))
        row_kernels.rescale[grid](
            product, row_scale, row_scale if columns is None else columns, y, product.shape[1], columns is not None,
            _BLOCK,
        )  # fmt: skip
    return y


class RmsNormFunction(torch.autograd.Function):
    """`x / rms(x) * weight` of x `[..., X]`, with a frozen weight `[X]`; `fused.RmsNorm` explains the flags."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, plus_one: bool, wide: bool) -> Tensor:
        from pipeline.backbone.gpu import row_kernels

        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y, inverse = torch.empty_like(flat), flat.new_empty(len(flat), dtype=torch.float32)
        row_kernels.rms_norm[(len(flat),)](flat, weight, y, inverse, flat.shape[1], epsilon, plus_one, wide, _BLOCK)
        ctx.save_for_backward(flat, inverse)
        ctx.weight, ctx.plus_one = weight, plus_one  # a reference: under ZeRO-3 its data comes and goes
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from pipeline.backbone.gpu import row_kernels

        flat, inverse = ctx.saved_tensors
        grad, dx = grads[0].contiguous(), torch.empty_like(flat)
        row_kernels.rms_norm_backward[(len(flat),)](
            grad, flat, ctx.weight, inverse, dx, flat.shape[1], ctx.plus_one, _BLOCK
        )
        return dx.view(grad.shape), *(None,) * 4


def gated_rows(gate: Tensor, up: Tensor, activation: str, smallest: float) -> tuple[Tensor, Tensor]:
    """`activation(gate) * up`, both `[N, X]`, quantised: int8 `[N, X]` and scale `[N, 1]`."""
    from pipeline.backbone.gpu import row_kernels

    (found,) = _quantised_like(gate, 1)
    row_kernels.gated_rows[(len(gate),)](gate, up, *found, gate.shape[1], smallest, activation == "silu", _BLOCK)
    return found


def gated_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, columns: tuple[Tensor, Tensor], activation: str, smallest: float
) -> list[tuple[Tensor, Tensor]]:
    """The gradients of gate and of up, given that of their product, all `[N, X]`; each times its columns `[X]`, and
    quantised: int8 `[N, X]` and scale `[N, 1]`.
    """
    from pipeline.backbone.gpu import row_kernels

    found = _quantised_like(gate, 2)
    row_kernels.gated_gradients[(len(gate),)](
        grad, gate, up, *columns, *found[0], *found[1], gate.shape[1], smallest, activation == "silu", _BLOCK
    )
    return found


def _quantised_like(x: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    scale = (len(x), 1)
    return [(torch.empty_like(x, dtype=torch.int8), x.new_empty(scale, dtype=torch.float32)) for _ in range(count)]
