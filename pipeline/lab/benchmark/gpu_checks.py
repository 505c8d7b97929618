"""Whether what a GPU computes for a layer is right: each part in each way it can run, against float64.

A part runs in Triton's kernels or in PyTorch's operators. Numbers are random, and references are computed from the same
rounded inputs.

Shapes: N tokens, I inputs, O outputs, A heads, A' heads of keys, D head size.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.backbone import gpu, int8, packed_attention
from pipeline.backbone.fused import _ACTIVATIONS as ACTIVATIONS
from pipeline.backbone.fused import GatedMlp, RmsNorm, use_kernels
from pipeline.backbone.gpu import attention as gpu_attention
from pipeline.backbone.gpu import rows as gpu_rows
from pipeline.backbone.int8 import Int8Linear, set_products
from pipeline.backbone.segments import Segments, make_segments

Entry = dict[str, Any]
Report = Callable[[Entry], None]
"""Takes what is known as soon as it is: the process may be ended before its section is."""
Way = Literal["triton", "operators"]

_SMALLEST = int8._SMALLEST
# Rounding of a number in each type, relative, with room for the sums of a check's sizes.
_CLOSE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = (1, 2, 15, 16, 17, 18, 31, 33, 100, 257)
"""cuBLAS takes int8 matrices of more than 16 rows; others are padded."""
_SIDES = ((8, 8), (24, 40), (64, 72), (136, 88), (520, 1032), (1024, 4096))
"""I and O of products: multiples of 8, and not all of 16 and 32."""


@dataclass(frozen=True)
class Distance:
    """How far a tensor is from the one that it should be."""

    most: float
    """The greatest difference of two numbers."""
    relative: float
    """Size of the difference as a part of the size of what is wanted."""
    bound: float
    """Of `relative`."""

    @property
    def holds(self) -> bool:
        return self.relative <= self.bound  # False for NaN

    def entry(self) -> Entry:
        return {
            "max_absolute": finite(self.most),
            "relative": finite(self.relative),
            "bound": self.bound,
            "passed": self.holds,
        }


def distance(found: Tensor, wanted: Tensor, bound: float) -> Distance:
    """Of two tensors of one shape, in float64. Raises: ValueError where the shapes differ."""
    if found.shape != wanted.shape:
        raise ValueError(f"its shape is {list(found.shape)}, and should be {list(wanted.shape)}")
    a, b = found.detach().double().cpu(), wanted.detach().double().cpu()
    size = float(b.norm())
    off = float((a - b).norm())
    return Distance(float((a - b).abs().max()), off / size if size else off, bound)


def finite(value: float) -> float | None:
    """JSON has no NaN and no infinity."""
    return value if np.isfinite(value) else None


Check = tuple[str, Callable[[], Mapping[str, Distance]]]
"""A name, and what computes the distances of its outputs and gradients."""


def run_checks(report: Report, checks: Iterator[Check]) -> None:
    """Report an entry for each output of each check; one that raises has failed, and the others go on."""
    for name, check in checks:
        try:
            for part, found in check().items():
                report({"check": f"{name}: {part}", **found.entry()})
        except Exception as error:  # whatever a kernel, a compiler or a driver says
            report({"check": name, "passed": False, "error": short(error)})


def short(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:400]


def triton_is_missing(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None where they can. Its interpreter runs them on a CPU, too."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if device.type == "cuda" or triton.knobs.runtime.interpret:
        return None
    return "Triton's kernels need a GPU, or TRITON_INTERPRET=1"


def check_kernels(device: torch.device, report: Report, small: bool = False) -> None:
    """All parts in all ways. `small` leaves out the larger sizes."""
    missing = triton_is_missing(device)
    ways: list[Way] = ["operators"]
    if missing is None:
        ways.append("triton")
    else:
        report({"check": "Triton's kernels", "skipped": missing})
    run_checks(report, product_checks(device, small))
    for way in ways:
        with gpu.used(way == "triton"):
            run_checks(report, linear_checks(device, way, small))
            run_checks(report, row_checks(device, way, small))
            run_checks(report, gate_checks(device, way))
            run_checks(report, attention_checks(device, way, small))


def _random(device: torch.device, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _random_int8(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device)


def product_checks(device: torch.device, small: bool) -> Iterator[Check]:
    """Products of whole numbers, forward and with the transpose, which have no error at all."""

    def check(rows: int, inputs: int, outputs: int) -> dict[str, Distance]:
        x, weight = _random_int8(device, rows, inputs), _random_int8(device, outputs, inputs, seed=1)
        grad = _random_int8(device, rows, outputs, seed=2)
        wide = weight.double()  # exact: sums are below 2^53
        return {
            "x times the transpose": distance(int8._multiply(x, weight.t()), x.double() @ wide.t(), 0.0),
            "gradient times the matrix": distance(int8._multiply(grad, weight), grad.double() @ wide, 0.0),
        }

    for (inputs, outputs), rows in itertools.product(_SIDES[:3] if small else _SIDES, _ROWS):
        yield f"int8 product, {rows} rows, {inputs} to {outputs}", partial(check, rows, inputs, outputs)


def linear_checks(device: torch.device, way: Way, small: bool) -> Iterator[Check]:
    """A layer's product and its gradient, through all that surrounds the product of whole numbers."""

    def check(rows: int, sides: tuple[int, int], dtype: torch.dtype, products: str) -> dict[str, Distance]:
        layer = _linear(device, *sides)
        set_products(nn.Sequential(layer), products, device)
        x = _random(device, rows, sides[0], dtype=dtype).requires_grad_()
        upstream = _random(device, rows, sides[1], dtype=dtype, seed=1)
        y = layer(x)
        (dx,) = torch.autograd.grad(y, x, upstream)
        weight = _wide(layer)
        # A normal row in 255 steps of its largest number is about 1 % off; with scales of columns somewhat more.
        loose = _CLOSE[dtype] + 0.02
        forward = loose if layer.int8_products else _CLOSE[dtype]
        backward = loose if layer.int8_products and not layer.exact_backward else _CLOSE[dtype]
        return {
            "output": distance(y, x.double() @ weight.t(), forward),
            "gradient": distance(dx, upstream.double() @ weight, backward),
        }

    shapes = [(17, (256, 520)), (1, (256, 520)), *([] if small else [(300, (1024, 1032))])]
    for (rows, sides), dtype, products in itertools.product(shapes, _TYPES, ("exact", "int8", "int8_forward")):
        name = f"{way}, Int8Linear {products}, {rows} rows, {sides[0]} to {sides[1]}, {_told(dtype)}"
        yield name, partial(check, rows, sides, dtype, products)
    # Sides that cuBLAS does not take: on a GPU such a layer multiplies in float.
    for rows in (1, 33):
        name = f"{way}, Int8Linear int8, {rows} rows, 20 to 33, {_told(torch.float32)}"
        yield name, partial(check, rows, (20, 33), torch.float32, "int8")


def row_checks(device: torch.device, way: Way, small: bool) -> Iterator[Check]:
    """Quantising, rescaling, norms and rotation."""
    widths = (1, 7, 1030) if small else (1, 7, 1024, 1500, 11_008)
    for width, dtype, scaled in itertools.product(widths, _TYPES, (False, True)):
        name = f"{way}, quantise {width} numbers a row{', scaled' if scaled else ''}, {_told(dtype)}"
        yield name, partial(_quantised, device, width, dtype, scaled)
    for width, scaled in itertools.product(widths, (False, True)):
        name = f"{way}, rescale {width} numbers a row{' and column' if scaled else ''}"
        yield name, partial(_rescaled, device, width, scaled)
    for dtype, plus_one, wide in itertools.product(_TYPES, (False, True), (False, True)):
        name = f"{way}, norm{', 1 + weight' if plus_one else ''}{', in float32' if wide else ''}, {_told(dtype)}"
        yield name, partial(_normed, device, way, dtype, plus_one, wide)
    if way == "triton":  # without it transformers' own rotation runs
        for (heads, key_heads, size), dtype in itertools.product([(4, 2, 20), (3, 1, 64), (32, 8, 128)], _TYPES):
            name = f"{way}, rotation, {heads} and {key_heads} heads of {size}, {_told(dtype)}"
            yield name, partial(_rotated, device, heads, key_heads, size, dtype)


def _quantised(device: torch.device, width: int, dtype: torch.dtype, scaled: bool) -> dict[str, Distance]:
    x = _random(device, 5, width, dtype=dtype)
    x[0], x[1] = 0, x[1] * 1e-3
    columns = _random(device, width, seed=1).abs() if scaled else None
    rows, scale = int8._quantize(x, False, columns)
    wanted = x.double() if columns is None else x.double() * columns.double()
    off = _steps_off(rows, wanted)
    x[2, width - 1] = float("nan")
    beside = int8._quantize(x, False, columns)
    same = [torch.equal(a[[0, 1, 3, 4]], b[[0, 1, 3, 4]]) for a, b in zip(beside, (rows, scale), strict=True)]
    spoiled = not beside[1][2].isfinite().any()
    kept = torch.tensor([float(all(same) and spoiled)])
    return {
        "scales": distance(scale, _steps(wanted), 1e-6),
        "steps off": off,
        "a NaN spoils its own row alone": distance(kept, torch.ones(1), 0.0),
    }


def _rescaled(device: torch.device, width: int, scaled: bool) -> dict[str, Distance]:
    generator = torch.Generator().manual_seed(0)
    product = torch.randint(-(2**24), 2**24, (5, width), dtype=torch.int32, generator=generator).to(device)
    of_row, columns = _random(device, 5, 1).abs(), _random(device, width, seed=1) if scaled else None
    wanted = product.double() * of_row.double() * (1 if columns is None else columns.double())
    return {"output": distance(int8._rescale(product, of_row, columns, False), wanted, 1e-6)}


def _normed(device: torch.device, way: Way, dtype: torch.dtype, plus_one: bool, wide: bool) -> dict[str, Distance]:
    weight = nn.Parameter(_random(device, 1100, dtype=dtype, seed=1), requires_grad=False)
    layer = RmsNorm(weight, 1e-5, plus_one, wide)
    layer.kernels = way == "triton"
    x, upstream = (_random(device, 2, 3, 1100, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 2))
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, upstream)
    high = x.detach().double().requires_grad_()
    factor = weight.double() + float(plus_one)
    wanted = high * torch.rsqrt(high.pow(2).mean(-1, keepdim=True) + 1e-5) * factor
    (slope,) = torch.autograd.grad(wanted, high, upstream.double())
    return {"output": distance(y, wanted, _CLOSE[dtype]), "gradient": distance(dx, slope, _CLOSE[dtype])}


def _rotated(device: torch.device, heads: int, key_heads: int, size: int, dtype: torch.dtype) -> dict[str, Distance]:
    given = [_random(device, 7, n, size, dtype=dtype, seed=n).requires_grad_() for n in (heads, key_heads)]
    angles = _random(device, 7, size // 2)
    found = gpu_attention.rotate(given[0], given[1], (angles.cos(), angles.sin()))
    upstream = [_random(device, *y.shape, dtype=dtype, seed=3) for y in found]
    gradients = torch.autograd.grad(found, given, upstream)
    high = [x.detach().double().requires_grad_() for x in given]
    cosine, sine = (part.double().repeat(1, 2)[:, None] for part in (angles.cos(), angles.sin()))
    wanted = [x * cosine + torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1) * sine for x in high]
    slopes = torch.autograd.grad(wanted, high, [of.double() for of in upstream])
    names = ("queries", "keys", "gradient of queries", "gradient of keys")
    sides = zip(names, (*found, *gradients), (*wanted, *slopes), strict=True)
    return {name: distance(a, b, _CLOSE[dtype]) for name, a, b in sides}


def gate_checks(device: torch.device, way: Way) -> Iterator[Check]:
    """A gated layer: three int8 products, and what lies between them."""
    for activation, dtype in itertools.product(("silu", "gelu_tanh"), _TYPES):
        yield f"{way}, gated layer, {activation}, {_told(dtype)}", partial(_gated_layer, device, way, activation, dtype)
        if way == "triton" and dtype == torch.float32:  # products are rescaled to float32, whatever the type
            yield f"{way}, gate and its gradients, {activation}", partial(_gate, device, activation)


def _gated_layer(device: torch.device, way: Way, activation: str, dtype: torch.dtype) -> dict[str, Distance]:
    layers = [_linear(device, *sides, seed=s) for s, sides in enumerate([(256, 520), (256, 520), (520, 256)])]
    layer = GatedMlp(dict(zip(("gate", "up", "down"), layers, strict=True)), activation)
    set_products(layer, "int8", device)
    use_kernels(layer, way == "triton")
    x, upstream = (_random(device, 33, 256, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, upstream)
    high = x.detach().double().requires_grad_()
    gate, up, down = map(_wide, layers)
    wanted = (ACTIVATIONS[activation](high @ gate.t()) * (high @ up.t())) @ down.t()
    (slope,) = torch.autograd.grad(wanted, high, upstream.double())
    return {
        "output": distance(y, wanted, 0.04 + 2 * _CLOSE[dtype]),
        "gradient": distance(dx, slope, 0.05 + 2 * _CLOSE[dtype]),
    }


def _gate(device: torch.device, activation: str) -> dict[str, Distance]:
    gate, up, grad = (_random(device, 5, 1100, seed=seed) for seed in range(3))
    columns = (_random(device, 1100, seed=3).abs(), _random(device, 1100, seed=4).abs())
    high = [x.double().requires_grad_() for x in (gate, up)]
    product = ACTIVATIONS[activation](high[0]) * high[1]
    slopes = torch.autograd.grad(product, high, grad.double())
    found = [
        gpu_rows.gated_rows(gate, up, activation, _SMALLEST),
        *gpu_rows.gated_gradients(grad, gate, up, columns, activation, _SMALLEST),
    ]
    wanted = [product, *(slope * of.double() for slope, of in zip(slopes, columns, strict=True))]
    names = ("product", "gradient of gate", "gradient of up")
    return {
        f"steps off, {name}": _steps_off(rows, of) for name, (rows, _), of in zip(names, found, wanted, strict=True)
    } | {
        f"scales, {name}": distance(scale, _steps(of), 1e-5)
        for name, (_, scale), of in zip(names, found, wanted, strict=True)
    }


def _steps(wanted: Tensor) -> Tensor:
    """`[N, 1]`: the size of each row's steps of quantising."""
    return wanted.detach().abs().amax(-1, keepdim=True).clamp_min(_SMALLEST) / 127


def _steps_off(rows: Tensor, wanted: Tensor) -> Distance:
    """Half a step at most, and what float32 adds where a number lies between two."""
    off = float((rows.double() - wanted.detach() / _steps(wanted)).abs().max())
    return Distance(off, off, 0.5 + 1e-3)


@dataclass(frozen=True)
class _Rule:
    """What a family does with scores, beside looking back."""

    window: int | None = None
    softcap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        told = {"window": self.window, "bound": self.softcap, "sinks": self.sinks}
        return "".join(
            f", {name} {value}" if value is not True else f", {name}" for name, value in told.items() if value
        )


def _forests() -> dict[str, Segments]:
    """Packed rows: prompts, texts behind them, and labels behind texts."""
    return {
        "two prompts": make_segments([100, 20, 33, 1, 45, 7, 31, 64, 2, 3], [None, None, 0, 0, 0, 1, 1, 1, 2, 7]),
        "prompts given": make_segments([100, 20, 33, 1, 45, 7, 65], [None, None, 0, 0, 0, 1, 1], 2),
        "one token": make_segments([1, 1], [None, 0]),
        "no prompt": make_segments([0, 37, 5], [None, 0, 1]),
    }


def attention_checks(device: torch.device, way: Way, small: bool) -> Iterator[Check]:
    """Attention behind shared prompts. Windows, bounds and sinks run in PyTorch's operators alone."""
    sizes = [(4, 2, 64), (3, 3, 20)] if small else [(4, 2, 64), (3, 3, 20), (8, 1, 128), (2, 2, 256)]
    kinds = list(itertools.product(sizes, _TYPES))
    if way == "triton":  # each kind takes seconds to compile, so some stand for all
        some = {(4, 2, 64): _TYPES, (3, 3, 20): _TYPES[:1], (8, 1, 128): _TYPES[1:2], (2, 2, 256): _TYPES[:2]}
        kinds = [(sides, dtype) for sides in sizes for dtype in some[sides]]
    if way == "triton" and device.type == "cpu":  # its interpreter multiplies the bit patterns of bfloat16 (findings/)
        kinds = [(sides, dtype) for sides, dtype in kinds if dtype != torch.bfloat16]
    for (sides, dtype), (name, segments) in itertools.product(kinds, _forests().items()):
        told = f"{way}, attention, {name}, {sides[0]} and {sides[1]} heads of {sides[2]}, {_told(dtype)}"
        yield told, partial(_attended, device, way, segments, sides, dtype, _Rule())
    for name, segments in _forests().items():
        yield f"{way}, attention, {name}, a tree gone NaN", partial(_attended_beside_nan, device, way, segments)
    if way == "operators":
        rules = [_Rule(window=5), _Rule(softcap=2.0), _Rule(sinks=True), _Rule(window=40, softcap=2.0, sinks=True)]
        for (name, segments), dtype, rule in itertools.product(_forests().items(), _TYPES[:2], rules):
            told = f"{way}, attention, {name}{rule}, {_told(dtype)}"
            yield told, partial(_attended, device, way, segments, sizes[0], dtype, rule)


def _attended(
    device: torch.device, way: Way, segments: Segments, sides: tuple[int, int, int], dtype: torch.dtype, rule: _Rule
) -> dict[str, Distance]:
    low, upstream = _queries_keys_values(device, segments, sides, dtype)
    sinks = _random(device, sides[0], seed=9) if rule.sinks else None
    out = _attend(way, segments, low, rule, sinks)
    gradients = torch.autograd.grad(out, low, upstream)
    high = [x.detach().double().requires_grad_() for x in low]
    wanted = _attended_whole(segments, high, rule, None if sinks is None else sinks.double())
    slopes = torch.autograd.grad(wanted, high, upstream.double())
    close = _CLOSE[dtype]
    found = {"output": distance(out, wanted, close)}
    if float(slopes[0].norm()):  # of a single key the queries have none
        found["gradient of queries"] = distance(gradients[0], slopes[0], 3 * close)
        found["gradient of keys"] = distance(gradients[1], slopes[1], 3 * close)
    return found | {"gradient of values": distance(gradients[2], slopes[2], 2 * close)}


def _attended_beside_nan(device: torch.device, way: Way, segments: Segments) -> dict[str, Distance]:
    """Rows of other trees than that of the first segment, bit by bit, with a NaN in the first key and without."""
    given, upstream = _queries_keys_values(device, segments, (4, 2, 64), torch.float32)
    before = _attend(way, segments, given, _Rule(), None)
    gradients = torch.autograd.grad(before, given, upstream)
    spoiled = [x.detach().clone().requires_grad_() for x in given]
    with torch.no_grad():
        spoiled[1][0] = float("nan")
    beside = _attend(way, segments, spoiled, _Rule(), None)
    of_spoiled = torch.autograd.grad(beside, spoiled, upstream)
    roots = np.array([chain[0] for chain in segments.chains()])
    first = roots[np.flatnonzero(segments.lengths)[0]]
    of_token = np.repeat(roots, segments.lengths) != first
    others = torch.as_tensor(of_token[segments.given_tokens :], device=device)
    all_others = torch.as_tensor(of_token, device=device)
    pairs = {
        "outputs": (beside[others], before[others]),
        "gradient of queries": (of_spoiled[0][others], gradients[0][others]),
        "gradient of keys": (of_spoiled[1][all_others], gradients[1][all_others]),
    }
    return {name: Distance(0.0, float(not torch.equal(a, b)), 0.0) for name, (a, b) in pairs.items()}


def _queries_keys_values(
    device: torch.device, segments: Segments, sides: tuple[int, int, int], dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    heads, key_heads, size = sides
    total, run = int(segments.lengths.sum()), int(segments.lengths.sum()) - segments.given_tokens
    shapes = [(run, heads, size), (total, key_heads, size), (total, key_heads, size)]
    given = [_random(device, *shape, dtype=dtype, seed=s).requires_grad_() for s, shape in enumerate(shapes)]
    return given, _random(device, run, heads, size, dtype=dtype, seed=3)


def _attend(way: Way, segments: Segments, given: list[Tensor], rule: _Rule, sinks: Tensor | None) -> Tensor:
    q, k, v = given
    scaling = q.shape[-1] ** -0.5
    if way == "triton":
        return gpu_attention.attend(q, k, v, scaling, gpu_attention.make_tables(segments, q.device))
    levels, biases = packed_attention.make_levels(segments, q.device), None
    if rule.window is not None:
        width, positions = rule.window, torch.as_tensor(segments.all_positions(), device=q.device)
        biases = packed_attention.make_biases(levels, lambda of, seen: (seen <= of) & (of - seen < width), positions)
    scores = packed_attention.Scores(biases, rule.softcap, sinks)
    return packed_attention.attend(q * scaling, k, v, levels, scores)


def _attended_whole(segments: Segments, given: list[Tensor], rule: _Rule, sinks: Tensor | None) -> Tensor:
    """The same by a mask of tokens by tokens."""
    q, k, v = given
    times = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(times, 1) for x in (k, v))
    scores = torch.einsum("nad,mad->anm", q, k) * q.shape[-1] ** -0.5
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    seen = torch.as_tensor(_seen(segments, rule.window), device=q.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    weights = scores.softmax(-1)[..., : len(k)]
    return torch.einsum("anm,mad->nad", weights, v)


def _seen(segments: Segments, window: int | None) -> np.ndarray:
    """`[N, G + N]`: whether a token that runs sees another."""
    count = len(segments.lengths)
    above = np.zeros((count, count), bool)
    for segment, chain in enumerate(segments.chains()):
        above[segment, chain] = True
    owner, place = np.repeat(np.arange(count), segments.lengths), np.arange(int(segments.lengths.sum()))
    seen = above[owner][:, owner] & ((owner[:, None] != owner) | (place <= place[:, None]))
    if window is not None:
        positions = segments.all_positions()
        seen &= positions[:, None] - positions < window
    return seen[segments.given_tokens :]


def _linear(device: torch.device, inputs: int, outputs: int, seed: int = 0) -> Int8Linear:
    layer = Int8Linear(nn.Parameter(_random_int8(device, outputs, inputs, seed=seed), requires_grad=False), None)
    layer.scale = (0.5 + _random(device, outputs, seed=seed).abs()) * inputs**-0.5 / 73
    return layer


def _wide(layer: Int8Linear) -> Tensor:
    """W `[O, I]` in float64."""
    weight: Any = layer._parameters["weight"]
    return weight.double() * layer.scale.double()[:, None]


def _told(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
