"""Kernels that treat each token by itself: what surrounds the int8 products, each in one pass over memory.

PyTorch's operators would take several passes, and memory is the limit for these.

Shapes: N tokens, X the width of a row. Everything is float32 on the CPU unless said otherwise.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from pipeline.backbone.native.build import load_kernels

_P, _N, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
DEEP = 16
"""What the width of int16 rows is a multiple of."""
_SIGNATURES: dict[str, list[Any]] = {
    "quantize_rows": [_P, _P, _P, _P, _N, _N],
    "quantize_fine_rows": [_P, _P, _P, _F, _N, _N, _N],
    "quantize_digits": [_P, _P, _P, _P, _N, _N],
    "quantize_bfloat16_weights": [_P, _P, _P, _N, _N],
    "quantize_float32_weights": [_P, _P, _P, _N, _N],
    "rescale": [_P, _P, _P, _P, _N, _N],
    "rms_norm": [_P, _P, _F, _P, _P, _N, _N],
    "rms_norm_backward": [_P, _P, _P, _P, _P, _N, _N],
    **{f"{activation}_product": [*[_P] * 3, _N, _N] for activation in ("silu", "gelu_tanh")},
    **{f"{activation}_product_backward": [*[_P] * 5, _N, _N] for activation in ("silu", "gelu_tanh")},
    **{f"{activation}_product_quantized": [*[_P] * 4, _N, _N] for activation in ("silu", "gelu_tanh")},
    **{f"{activation}_product_fine": [*[_P] * 4, _F, _N, _N, _N] for activation in ("silu", "gelu_tanh")},
    **{f"{activation}_product_backward_quantized": [*[_P] * 9, _N, _N] for activation in ("silu", "gelu_tanh")},
}


def supports(*tensors: Tensor) -> bool:
    """Whether these kernels can be used for the tensors."""
    return all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and load_kernels() is not None


def quantize_activations(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X `[N, X]`, times `columns` `[X]` if given -> (int8 `[N, X]`, scale `[N, 1]`)."""
    x = x.contiguous()  # the kernels know no strides
    rows, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty(len(x), 1)
    _call("quantize_rows", x, columns, rows, scale, *x.shape)
    return rows, scale


def quantize_digits(x: Tensor, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X `[N, X]`, times `columns` `[X]` if given -> int8 `[3, N, X]`, scale `[3, N, 1]`, whose products sum up to X."""
    x = x.contiguous()
    digits, scale = torch.empty((3, *x.shape), dtype=torch.int8), torch.empty(3, len(x), 1)
    _call("quantize_digits", x, columns, digits, scale, *x.shape)
    return digits, scale


def fine_sides(width: int) -> tuple[int, int]:
    """-> the width of int16 rows for floats `[N, width]`, and the size of their largest number.

    Sums of products with int8 numbers of such rows fit into 32 bits.
    """
    return -(-width // DEEP) * DEEP, min(2**15 - 1, (2**31 - 1) // (2**7 * width))


def quantize_finely(x: Tensor) -> tuple[Tensor, Tensor]:
    """X `[N, X]` -> (int16 `[N, X, and zeros]`, scale `[N, 1]`), as `fine_sides` tells."""
    x = x.contiguous()
    deep, levels = fine_sides(x.shape[1])
    rows, scale = torch.empty((len(x), deep), dtype=torch.int16), torch.empty(len(x), 1)
    _call("quantize_fine_rows", x, rows, scale, levels, *x.shape, deep)
    return rows, scale


def quantize_weights(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """W `[N, X]`, float32 or bfloat16 -> (int8 `[N, X]`, absolute maximum of each row `[N]`), as bitsandbytes does it.

    None for another type or device, or without a compiler.
    """
    kernel = {torch.float32: "quantize_float32_weights", torch.bfloat16: "quantize_bfloat16_weights"}.get(weight.dtype)
    if kernel is None or weight.device.type != "cpu" or load_kernels() is None:
        return None
    weight = weight.contiguous()
    rows, largest = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    _call(kernel, weight, rows, largest, *weight.shape)
    return rows, largest


def rescale(product: Tensor, scale: Tensor, columns: Tensor | None = None) -> Tensor:
    """Int32 `[N, X]` x scale `[N, 1]` (x columns `[X]` if given) -> `[N, X]`."""
    out = torch.empty(product.shape)
    _call("rescale", product.contiguous(), columns, scale, out, *product.shape)
    return out


class RmsNormFunction(torch.autograd.Function):
    """`x / rms(x) * weight` of x `[..., X]`, with a frozen weight `[X]`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y, inverse = torch.empty_like(flat), torch.empty(len(flat))
        _call("rms_norm", flat, weight, epsilon, y, inverse, *flat.shape)
        # 1 / rms of each row is kept: a number a token, which saves the backward pass a walk over x.
        ctx.save_for_backward(flat, inverse)
        ctx.weight = weight  # a reference: under ZeRO-3 its data comes and goes
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        flat, inverse = ctx.saved_tensors
        dx = torch.empty_like(flat)
        _call("rms_norm_backward", grad.contiguous(), flat, ctx.weight, inverse, dx, *flat.shape)
        return dx.view(grad.shape), None, None


class GatedProductFunction(torch.autograd.Function):
    """`activation(gate) * up`, both `[..., X]`; the activation is `silu` or `gelu_tanh`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        y = torch.empty_like(gate)
        _call(f"{activation}_product", gate, up, y, *_rows(gate))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grads
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _call(f"{ctx.activation}_product_backward", grad.contiguous(), gate, up, dgate, dup, *_rows(gate))
        return dgate, dup, None


def gated_rows(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`activation(gate) * up`, both `[N, X]`, quantised: int8 `[N, X]` and scale `[N, 1]`."""
    rows, scale = torch.empty(gate.shape, dtype=torch.int8), torch.empty(len(gate), 1)
    _call(f"{activation}_product_quantized", gate, up, rows, scale, *gate.shape)
    return rows, scale


def gated_fine_rows(gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`activation(gate) * up`, both `[N, X]`, as `quantize_finely`."""
    deep, levels = fine_sides(gate.shape[1])
    rows, scale = torch.empty((len(gate), deep), dtype=torch.int16), torch.empty(len(gate), 1)
    _call(f"{activation}_product_fine", gate, up, rows, scale, levels, *gate.shape, deep)
    return rows, scale


def gated_gradients(
    grad: Tensor, gate: Tensor, up: Tensor, columns: tuple[Tensor, Tensor], activation: str
) -> list[tuple[Tensor, Tensor]]:
    """The gradients of gate and of up, given that of their product, all `[N, X]`; each times its columns `[X]`, and
    quantised: int8 `[N, X]` and scale `[N, 1]`.
    """
    found = [(torch.empty(gate.shape, dtype=torch.int8), torch.empty(len(gate), 1)) for _ in columns]
    _call(f"{activation}_product_backward_quantized", grad, gate, up, *columns, *found[0], *found[1], *gate.shape)
    return found


def _rows(x: Tensor) -> tuple[int, int]:
    return x.numel() // x.shape[-1], x.shape[-1]


def _call(name: str, *args: Tensor | int | float | None) -> None:
    kernels = load_kernels()
    assert kernels is not None
    function = getattr(kernels, name)
    if function.argtypes is None:  # once: without a signature ctypes would pass 64-bit pointers as 32-bit integers
        function.argtypes, function.restype = _SIGNATURES[name], None
    function(*(arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args))
