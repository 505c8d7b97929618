"""Weights of checkpoints that are quantised already, read as floats some rows at a time.

Each format keeps a matrix as several stored tensors: small numbers, and scales for blocks of them. A source that is
wrapped here has the matrix itself under its usual name. What reads it brings it to int8 rows as it would any floats.

Shapes: O output rows, I inputs, E experts, G groups of inputs that share a scale.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pipeline.backbone.files import method_of
from pipeline.backbone.weights import WeightSource
from pipeline.errors import BackboneError

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Place of each of eight neighbouring outputs in a 32-bit number, in units of four bits, from the lowest."""
_OF_MX_BLOCK = 32
"""Numbers that share a scale in MXFP4."""


@dataclass(frozen=True)
class _Packed:
    """A matrix of floats that is stored as several tensors."""

    parts: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]
    """First and last entry of the first side -> these entries in float32."""
    in_rows: bool = True
    """Whether some entries cost less than all."""


def dequantised(source: WeightSource, settings: dict[str, Any]) -> WeightSource:
    """The source of a quantised checkpoint as one of floats; `settings` is its `quantization_config`.

    Raises: BackboneError for a tensor that is packed in another way than the format's.
    """
    find = {
        "mxfp4": _mxfp4,
        "bitsandbytes": _bitsandbytes,
        "gptq": _gptq,
        "awq": _awq,
    }.get(method_of(settings), _scaled)
    packed = dict(find(source, settings))
    used = {part for matrix in packed.values() for part in matrix.parts}

    def shape(name: str) -> tuple[int, ...]:
        return packed[name].shape if name in packed else source.shape(name)

    def read(name: str, first: int = 0, last: int | None = None) -> Tensor:
        if name not in packed:
            return source.read(name, first, last)
        return packed[name].read(first, packed[name].shape[0] if last is None else last)

    def stored(name: str) -> Iterator[Any]:
        parts = packed[name].parts if name in packed else (name,)
        return chain.from_iterable(source.stored(part) for part in parts)

    return replace(
        source,
        names=(source.names - used) | packed.keys(),
        shape=shape,
        read=read,
        stored=stored,
        whole=source.whole | {name for name, matrix in packed.items() if not matrix.in_rows},
    )


_Found = Iterator[tuple[str, _Packed]]


def _scaled(source: WeightSource, settings: dict[str, Any]) -> _Found:
    """FP8 and int8 numbers with a scale for a tensor, a row or a block: fp8, fbgemm_fp8, compressed-tensors."""
    named = settings.get("weight_block_size") or (None, None)
    for scale in source.names:
        base = scale.removesuffix("_inv").removesuffix("_scale")
        if base == scale or base not in source.names:
            continue
        if f"{base}_zero_point" in source.names:
            raise BackboneError(
                f"{source.origin}: '{base}' has a zero point ({base}_zero_point), which is not read here"
            )
        yield base, _Packed((base, scale), source.shape(base), _scaled_reader(source, base, scale, named))


def _scaled_reader(
    source: WeightSource, base: str, scale: str, named: Any, unit: float = 1.0
) -> Callable[[int, int], Tensor]:
    sides, grid = source.shape(base), source.shape(scale)
    if math.prod(grid) == 1:
        return lambda first, last: (
            source.read(base, first, last).float() * _as_factor(source.read(scale)).view(()) * unit
        )
    grid = grid if len(grid) > 1 else (*grid, 1)
    if len(grid) != len(sides) or grid[:-2] != sides[:-2]:
        raise BackboneError(f"{source.origin}: '{scale}' {list(grid)} does not fit '{base}' {list(sides)}")
    rows, columns = (
        _side_of_block(side, count, block) for side, count, block in zip(sides[-2:], grid[-2:], named, strict=True)
    )

    def read(first: int, last: int) -> Tensor:
        part = source.read(base, first, last).float()
        if len(sides) > 2:  # experts
            factors = _as_factor(source.read(scale, first, last)).repeat_interleave(rows, -2)[..., : sides[-2], :]
        else:
            start = first // rows
            factors = _as_factor(source.read(scale, start, -(-last // rows))).view(-1, grid[-1])
            factors = factors[torch.arange(first, last) // rows - start]
        return part.mul_(factors.repeat_interleave(columns, -1)[..., : sides[-1]] * unit)

    return read


def _as_factor(scale: Tensor) -> Tensor:
    # A byte is an exponent of two (E8M0).
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def _side_of_block(side: int, count: int, named: int | None) -> int:
    """Entries of a block, of which `count` cover a side; the last one may be short if the format names its size."""
    return named if named and -(-side // named) == count else -(-side // count)


def _mxfp4(source: WeightSource, _: dict[str, Any]) -> _Found:
    """gpt-oss: blocks `[E, O, I / 32, 16]` of two numbers a byte, and exponents `[E, O, I / 32]`, for `[E, I, O]`."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    def reader(blocks: str, scales: str) -> Callable[[int, int], Tensor]:
        def read(first: int, last: int) -> Tensor:
            numbers, exponents = source.read(blocks, first, last), source.read(scales, first, last)
            floats: Tensor = convert_moe_packed_tensors(numbers, exponents, dtype=torch.float32)
            return floats

        return read

    for blocks in source.names:
        base = blocks.removesuffix("_blocks")
        scales = f"{base}_scales"
        if base != blocks and scales in source.names:
            experts, rows, in_row, _bytes = source.shape(blocks)
            yield base, _Packed((blocks, scales), (experts, in_row * _OF_MX_BLOCK, rows), reader(blocks, scales))


def _bitsandbytes(source: WeightSource, _: dict[str, Any]) -> _Found:
    for name in source.names:
        if name.endswith(".SCB"):  # the absolute maximum of each row of int8 numbers
            base = f"{name.removesuffix('SCB')}weight"
            read = _scaled_reader(source, base, name, (None, None), 1 / 127)
            yield base, _Packed((base, name), source.shape(base), read)
        elif name.endswith(".absmax"):
            base = name.removesuffix(".absmax")
            yield base, _of_four_bits(source, base)


def _of_four_bits(source: WeightSource, base: str) -> _Packed:
    """NF4 or FP4: two codes a byte, the first in the high bits; a scale for each block, maybe quantised itself."""
    parts = tuple(sorted(name for name in source.names if name == base or name.startswith(f"{base}.")))
    state = json.loads(bytes(source.read(next(part for part in parts if ".quant_state." in part)).tolist()))
    values, of_block = source.read(f"{base}.quant_map").float(), int(state["blocksize"])
    rows, columns = state["shape"]
    packed = source.shape(base)

    def scales(first: int, last: int) -> Tensor:
        absmax = source.read(f"{base}.absmax", first, last)
        if "nested_offset" not in state:
            return absmax.float()
        of_scales = source.read(f"{base}.nested_absmax").float()
        groups = torch.arange(first, last) // int(state["nested_blocksize"])
        return (
            source.read(f"{base}.nested_quant_map").float()[absmax.long()] * of_scales[groups] + state["nested_offset"]
        )

    def read(first: int, last: int) -> Tensor:
        start, stop = first * columns, last * columns
        low, high = start // 2, -(-stop // 2)
        numbers = (source.read(base, low, high) if packed[0] != 1 else source.read(base).view(-1)[low:high]).view(-1)
        codes = torch.stack([numbers >> 4, numbers & 15], -1).view(-1)[start - 2 * low :][: stop - start]
        blocks = torch.arange(start, stop) // of_block
        factors = scales(int(blocks[0]), int(blocks[-1]) + 1)[blocks - blocks[0]]
        return (values[codes.long()] * factors).view(last - first, columns)

    return _Packed(parts, (rows, columns), read)


def _gptq(source: WeightSource, settings: dict[str, Any]) -> _Found:
    """qweight `[I * bits / 32, O]`, qzeros `[G, O * bits / 32]`, scales `[G, O]` and the group of each input, `[I]`."""
    bits = int(settings["bits"])
    # The first format stores zero points less one.
    more = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    for name in source.names:
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        parts = tuple(p for p in (f"{stem}.{k}" for k in ("qweight", "qzeros", "scales", "g_idx")) if p in source.names)
        inputs, outputs = source.shape(name)[0] * 32 // bits, source.shape(name)[1]

        def read(first: int, last: int, stem: str = stem, inputs: int = inputs) -> Tensor:
            numbers = _unpacked(source.read(f"{stem}.qweight").t(), bits)[first:last]  # [O, I]
            zeros = _unpacked(source.read(f"{stem}.qzeros"), bits)[:, first:last] + more  # [G, O]
            scales = source.read(f"{stem}.scales")[:, first:last].float()
            if f"{stem}.g_idx" in source.names:
                group = source.read(f"{stem}.g_idx").long()
            else:
                group = torch.arange(inputs) // (-(-inputs // len(scales)))
            return (numbers - zeros[group].t()) * scales[group].t()

        yield f"{stem}.weight", _Packed(parts, (outputs, inputs), read, in_rows=False)


def _awq(source: WeightSource, _: dict[str, Any]) -> _Found:
    """qweight `[I, O / 8]`, qzeros `[G, O / 8]`, scales `[G, O]`; eight outputs a number, in an order of their own."""

    def in_order(packed: Tensor) -> Tensor:
        numbers = _unpacked(packed, 4)
        return numbers.view(len(numbers), -1, 8)[..., list(_AWQ_ORDER)].flatten(1)

    for name in source.names:
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        parts = (name, f"{stem}.qzeros", f"{stem}.scales")
        inputs, outputs = source.shape(name)[0], source.shape(name)[1] * 8

        def read(first: int, last: int, stem: str = stem, inputs: int = inputs) -> Tensor:
            scales = source.read(f"{stem}.scales").float()
            of_group = inputs // len(scales)
            zeros = in_order(source.read(f"{stem}.qzeros")).repeat_interleave(of_group, 0)
            floats = (in_order(source.read(f"{stem}.qweight")) - zeros) * scales.repeat_interleave(of_group, 0)
            return floats.t()[first:last].contiguous()

        yield f"{stem}.weight", _Packed(parts, (outputs, inputs), read, in_rows=False)


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """32-bit numbers `[..., n]` -> the small numbers in them, lowest bits first, `[..., n * 32 / bits]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed.unsqueeze(-1) >> shifts) & (2**bits - 1)).flatten(-2)
