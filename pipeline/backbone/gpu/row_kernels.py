"""The Triton code of `rows`. It imports Triton, so nothing but `rows` imports it, where Triton is installed.

One program handles one row, X numbers wide, block by block.
"""

import triton
import triton.language as tl


@triton.jit
def _rounded(x):
    """To the nearest integer, and of two equally near ones to the even one, as PyTorch and the CPU's kernel round."""
    # In the range of floats whose last bit is a one; |x| is at most 127.
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _scale(largest, spoiled, smallest):
    """Of a row, from its largest numbers by place, and from what is NaN where the row is not finite."""
    # A maximum may pass over NaN, and a sum does not.
    return tl.maximum(tl.max(largest), smallest) / 127.0 + tl.sum(spoiled)


@triton.jit
def _put_int8(pointer, at, x, scale, inside):
    # `/` is approximate on a GPU, and where it errs a number could go to another step than PyTorch's.
    whole = _rounded(tl.where(scale == scale, tl.div_rn(x, scale), 0.0))
    tl.store(pointer + at, whole.to(tl.int8), mask=inside)


@triton.jit
def quantize(x_pointer, columns, rows_pointer, scales, width, smallest, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """A row, times `columns` if SCALED -> int8 and its scale; a row that is not finite has a scale that is not."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    spoiled = tl.zeros([BLOCK], tl.float32)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        if SCALED:
            x = x * tl.load(columns + place, mask=place < width, other=0.0)
        largest = tl.maximum(largest, tl.abs(x))
        spoiled += x - x
    scale = _scale(largest, spoiled, smallest)
    tl.store(scales + row, scale)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        if SCALED:
            x = x * tl.load(columns + place, mask=place < width, other=0.0)
        _put_int8(rows_pointer, row * width + place, x, scale, place < width)


@triton.jit
def rescale(product, row_scales, columns, y_pointer, width, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    """A part of an int32 row times the row's scale, and times `columns` if SCALED, in the output's type."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(product + row * width + place, mask=place < width, other=0).to(tl.float32)
    if SCALED:
        y = y * tl.load(columns + place, mask=place < width, other=0.0)
    y = y * tl.load(row_scales + row)
    tl.store(y_pointer + row * width + place, y.to(y_pointer.dtype.element_ty), mask=place < width)


@triton.jit
def rms_norm(
    x_pointer, weights, y_pointer, inverses, width, epsilon,
    PLUS_ONE: tl.constexpr, IN_FLOAT32: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`x / rms(x) * weight` of a row, and 1 / rms; see `fused.RmsNorm` for the two flags."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BLOCK], tl.float32)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        squares += x * x
    inverse = 1.0 / tl.sqrt_rn(tl.sum(squares) / width + epsilon)
    tl.store(inverses + row, inverse)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        weight = _norm_weight(weights, place, width, PLUS_ONE)
        normal = x * inverse
        if not IN_FLOAT32:
            normal = normal.to(y_pointer.dtype.element_ty).to(tl.float32)
        tl.store(y_pointer + row * width + place, (normal * weight).to(y_pointer.dtype.element_ty), mask=place < width)


@triton.jit
def rms_norm_backward(
    grad_pointer, x_pointer, weights, inverses, dx_pointer, width, PLUS_ONE: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    inverse = tl.load(inverses + row)
    along = tl.zeros([BLOCK], tl.float32)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_pointer + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        along += grad * _norm_weight(weights, place, width, PLUS_ONE) * x
    share = tl.sum(along) / width * inverse * inverse
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        grad = tl.load(grad_pointer + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        dx = (grad * _norm_weight(weights, place, width, PLUS_ONE) - x * share) * inverse
        tl.store(dx_pointer + row * width + place, dx.to(dx_pointer.dtype.element_ty), mask=place < width)


@triton.jit
def _norm_weight(weights, place, width, PLUS_ONE: tl.constexpr):
    weight = tl.load(weights + place, mask=place < width, other=0.0).to(tl.float32)
    return weight + 1.0 if PLUS_ONE else weight


@triton.jit
def _activated(x, SILU: tl.constexpr):
    """The activation of x and its slope: SiLU, or GELU by its tanh."""
    if SILU:
        gate = tl.sigmoid(x)
        return x * gate, gate * (1.0 + x * (1.0 - gate))
    inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    bent = 2.0 * tl.sigmoid(2.0 * inner) - 1.0  # tanh
    slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    return 0.5 * x * (1.0 + bent), 0.5 * (1.0 + bent) + 0.5 * x * (1.0 - bent * bent) * slope


@triton.jit
def _gated(gates, ups, at, inside, SILU: tl.constexpr):
    gate = tl.load(gates + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(ups + at, mask=inside, other=0.0).to(tl.float32)
    activated, slope = _activated(gate, SILU)
    return activated * up, slope * up, activated


@triton.jit
def gated_rows(gates, ups, rows_pointer, scales, width, smallest, SILU: tl.constexpr, BLOCK: tl.constexpr):
    """`activation(gate) * up` of a row, quantised as `quantize` does."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros([BLOCK], tl.float32)
    spoiled = tl.zeros([BLOCK], tl.float32)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        y, _, _ = _gated(gates, ups, row * width + place, place < width, SILU)
        largest = tl.maximum(largest, tl.abs(y))
        spoiled += y - y
    scale = _scale(largest, spoiled, smallest)
    tl.store(scales + row, scale)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        y, _, _ = _gated(gates, ups, row * width + place, place < width, SILU)
        _put_int8(rows_pointer, row * width + place, y, scale, place < width)


@triton.jit
def gated_gradients(
    grads, gates, ups, of_gate, of_up, gate_rows, gate_scales, up_rows, up_scales, width, smallest,
    SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of a row's gate and up, each times its columns, quantised as `quantize` does."""
    row = tl.program_id(0).to(tl.int64)
    gate_largest, up_largest = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    spoiled = tl.zeros([BLOCK], tl.float32)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < width
        grad = tl.load(grads + row * width + place, mask=inside, other=0.0).to(tl.float32)
        _, to_gate, to_up = _gated(gates, ups, row * width + place, inside, SILU)
        dgate = grad * to_gate * tl.load(of_gate + place, mask=inside, other=0.0)
        dup = grad * to_up * tl.load(of_up + place, mask=inside, other=0.0)
        gate_largest = tl.maximum(gate_largest, tl.abs(dgate))
        up_largest = tl.maximum(up_largest, tl.abs(dup))
        spoiled += (dgate - dgate) + (dup - dup)
    gate_scale, up_scale = _scale(gate_largest, spoiled, smallest), _scale(up_largest, spoiled, smallest)
    tl.store(gate_scales + row, gate_scale)
    tl.store(up_scales + row, up_scale)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        inside = place < width
        grad = tl.load(grads + row * width + place, mask=inside, other=0.0).to(tl.float32)
        _, to_gate, to_up = _gated(gates, ups, row * width + place, inside, SILU)
        dgate = grad * to_gate * tl.load(of_gate + place, mask=inside, other=0.0)
        dup = grad * to_up * tl.load(of_up + place, mask=inside, other=0.0)
        _put_int8(gate_rows, row * width + place, dgate, gate_scale, inside)
        _put_int8(up_rows, row * width + place, dup, up_scale, inside)
