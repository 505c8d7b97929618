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
        spoiled += x - x  # NaN where x is not finite, which a maximum may pass over
    scale = tl.maximum(tl.max(largest), smallest) / 127.0 + tl.sum(spoiled)
    tl.store(scales + row, scale)
    for at in range(0, width, BLOCK):
        place = at + tl.arange(0, BLOCK)
        x = tl.load(x_pointer + row * width + place, mask=place < width, other=0.0).to(tl.float32)
        if SCALED:
            x = x * tl.load(columns + place, mask=place < width, other=0.0)
        # `/` is approximate on a GPU, and where it errs a number could go to another step than PyTorch's.
        whole = _rounded(tl.where(scale == scale, tl.div_rn(x, scale), 0.0))
        tl.store(rows_pointer + row * width + place, whole.to(tl.int8), mask=place < width)


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
