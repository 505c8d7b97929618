"""Products of int8 rows with a frozen int8 matrix, rescaled to floats in the same kernel.

Shapes: N tokens, I the length of the sum, O the width of the result.
"""

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from pipeline.backbone.native.build import load_kernels

_P, _N = ctypes.c_void_p, ctypes.c_int64
_LONGEST_SUM = 2**16
"""The longest sum of products of int8 numbers that surely fits into 32 bits, where one of them may be 128 larger."""


@lru_cache(maxsize=1)
def ways() -> tuple[int, ...]:
    """The ways in which this processor multiplies, as the kernel numbers them, the fastest first; it may have none."""
    kernels = load_kernels()
    found = 0 if kernels is None else kernels.int8_ways()
    return tuple(way for way in (2, 1) if found & way)


def supports(rows: Tensor, weight: Tensor) -> bool:
    """Whether the kernel can multiply int8 rows `[N, I]` by a matrix of this many entries a row."""
    return rows.device.type == weight.device.type == "cpu" and max(weight.shape) <= _LONGEST_SUM and bool(ways())


def multiply(
    rows: Tensor, scale: Tensor, weight: Tensor, columns: Tensor | None, across: bool, way: int | None = None
) -> Tensor:
    """Int8 `[N, I]` x int8 -> `[N, O]`, times scale `[N, 1]` and, if given, columns `[O]`.

    The matrix `weight` is `[O, I]`, or with `across` `[I, O]`.
    """
    rows, weight = rows.contiguous(), weight.contiguous()
    inner, outer = weight.shape if across else reversed(weight.shape)
    assert rows.shape[1] == inner and len(scale) == len(rows), (rows.shape, weight.shape)
    out = torch.empty(len(rows), outer)
    kernels = load_kernels()
    assert kernels is not None
    function = kernels.int8_product
    if function.argtypes is None:
        function.argtypes, function.restype = [_P] * 5 + [_N] * 3 + [ctypes.c_int] * 2, None
    pointers = (None if t is None else t.data_ptr() for t in (rows, scale, weight, columns, out))
    function(*pointers, len(rows), inner, outer, across, ways()[0] if way is None else way)
    return out


@lru_cache(maxsize=1)
def _multiplies_int16() -> bool:
    kernels = load_kernels()
    return kernels is not None and bool(kernels.multiplies_int16())


def supports_int16(weight: Tensor) -> bool:
    """Whether `multiply_int16` can multiply by a matrix."""
    return weight.device.type == "cpu" and weight.shape[1] <= _LONGEST_SUM and _multiplies_int16()


def multiply_int16(rows: Tensor, scale: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """Int16 `[N, I]`, widened with zeros (`rows.fine_sides`), x int8 `[O, I]` -> `[N, O]`, times scale `[N, 1]` and
    columns `[O]`.
    """
    rows, weight = rows.contiguous(), weight.contiguous()
    (outer, inner), (n, deep) = weight.shape, rows.shape
    out = torch.empty(n, outer)
    kernels = load_kernels()
    assert kernels is not None
    function = kernels.int16_product
    if function.argtypes is None:
        function.argtypes, function.restype = [_P] * 5 + [_N] * 4, None
    function(*(t.data_ptr() for t in (rows, scale, weight, columns, out)), n, inner, deep, outer)
    return out
