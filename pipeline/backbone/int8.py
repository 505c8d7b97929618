"""Layers whose frozen matrix is an int8 parameter, so that ZeRO-3 partitions it as int8.

bitsandbytes' own `Linear8bitLt` keeps its matrix in attributes that ZeRO cannot see, so every
rank would hold all of it. Here the matrix is an ordinary int8 parameter, quantised row by row
with bitsandbytes' function (absmax of each output row, Dettmers et al. 2022, without outliers).

There are three kinds of product. All treat each row by itself, so that trials in one batch cannot touch each other:

- exact: activations in their own type are multiplied by the matrix, which is converted on the fly; the gradient is
  exact, too;
- int8: activations are quantised row by row as well, and whole numbers are multiplied. The backward pass does the same
  with the gradient, its scales folded in ("SwitchBack", Wortsman et al. 2023). Weights are frozen and have no gradient,
  so every large product is in int8. The backward pass alone can be exact;
- int16: activations are quantised to int16, which loses about as much as the order of a float sum does, and whole
  numbers are multiplied. The gradient is exact. It is for answering, by a processor that does this faster than floats.

Nothing but a reference to the matrix is stored for the backward pass. Experts of one layer are one parameter
`[E, O, I]`; a product converts the matrix of one expert at a time.
"""

import copy
import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from pipeline.backbone import gpu
from pipeline.backbone.gpu import rows as gpu_rows
from pipeline.backbone.native import products
from pipeline.backbone.native import rows as native

_LEVELS = 127.0  # -128 is left out, so that the scale is the same for both signs
_SMALLEST = 1e-30
"""Stands for the absolute maximum of a row of zeros, which could not be divided by."""
_FEWEST_CUDA_ROWS = 16
"""`torch._int_mm` needs more rows than this on CUDA."""
_EXACT_SUM = 1024
"""So many products of int8 numbers have a sum of at most 2^24, up to which a float32 tells whole numbers apart."""
_CHUNK = 2**20
"""Weights that are quantised at a time."""
CONVERTED_AT_ONCE = 2**23
"""Weights that an exact product converts at a time: a large vocabulary in float takes more than int8 saves."""
_IN_CACHE = 2**20
"""Weights that a CPU converts at a time: it multiplies them from its cache, in less than half the time."""
_FEWEST_CONVERTED_ROWS = 512
"""Where rows are long, a product of fewer of them would be slow by itself."""

# bitsandbytes warns wherever it is imported that it has no fused product of 4 bits; here nothing has 4 bits.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not str(record.msg).startswith("Failed to load CPU gemm_4bit_forward from kernels-community")
)


class Multiplies(Protocol):
    """How a module multiplies by its int8 parameters; see `set_products`."""

    int8_products: bool
    exact_backward: bool
    """Whether int8 products forward have an exact gradient."""
    kernels: bool
    """Whether what surrounds the int8 product runs as compiled kernels, where these can be used."""


class Int8Linear(nn.Module):
    """`y = x Wᵀ + b` with W `[O, I]` frozen in int8 and one float32 scale per output row."""

    scale: Tensor

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, stored_transposed: bool = False) -> None:
        super().__init__()
        self._parameters["weight"] = weight
        self.bias = bias
        self.stored_transposed = stored_transposed
        """Whether checkpoints hold `[I, O]`, as for GPT-2's `Conv1D`."""
        self.sides = (int(weight.shape[0]), int(weight.shape[1]))
        self.int8_products = False
        self.exact_backward = False
        self.kernels = False
        self.fine = False
        """Whether products are int16, where a processor has them."""
        self.digits = False
        """Whether floats may be multiplied as several int8 digits each, which is as exact; see `set_products`."""
        self.register_buffer("scale", unknown_scale(weight), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., I]` of any float type -> `[..., O]` of the same type."""
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        if self.multiplies_finely and native.supports(x, self.scale):
            y: Tensor = _FineProduct.apply(x, *_quantized(x, True, fine=True), weight, self.scale)
        elif self.digits and self.kernels and native.supports(x, self.scale) and products.supports(weight, weight):
            y = _DigitProduct.apply(x, weight, self.scale)
        else:
            y = multiply(self, x, weight, self.scale)
        return y if self.bias is None else y + self.bias

    @property
    def multiplies_finely(self) -> bool:
        """Whether its products are int16 now, by kernels."""
        weight: Tensor = self._parameters["weight"]  # type: ignore[assignment]
        return self.fine and self.kernels and (products.supports_int16(weight) or products.supports(weight, weight))

    def extra_repr(self) -> str:
        return f"{len(self.scale)} rows of int8"


class ReadInt8Linear(Int8Linear):
    """A layer of which a model's code reads the matrix by itself: it sees one of floats, made when it is used."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, stored_transposed: bool, dtype: torch.dtype
    ) -> None:
        super().__init__(weight, bias, stored_transposed)
        self.dtype = dtype

    @property
    def weight(self) -> Tensor:
        """W `[O, I]` in float, or `[I, O]` where the usual layer has it so."""
        seen = _FloatTable(self._parameters["weight"], self.scale, self.dtype)  # type: ignore[arg-type]
        return seen.mT if self.stored_transposed else seen


def make_int8_linear(
    weight: nn.Parameter, bias: nn.Parameter | None, stored_transposed: bool, seen_as: torch.dtype | None
) -> Int8Linear:
    """A layer of an int8 parameter; `seen_as` is the type of the matrix that other code reads, None if none does."""
    if seen_as is None:
        return Int8Linear(weight, bias, stored_transposed)
    return ReadInt8Linear(weight, bias, stored_transposed, seen_as)


class Int8Embedding(nn.Module):
    """A table `[V, H]` frozen in int8, with one float32 scale a token; may share its table with the output layer.

    An embedding that does more than look up rows (it may scale or norm them) goes on doing so.
    """

    USUAL = "usual"
    """Attribute that holds the embedding which this one replaces, if that has a forward of its own."""

    scale: Tensor

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype, usual: nn.Embedding | None = None) -> None:
        super().__init__()
        self.weight = weight
        self.dtype = dtype
        self.usual: nn.Embedding | None = None
        if usual is not None and type(usual).forward is not nn.Embedding.forward:
            usual._parameters["weight"] = None
            self.usual = usual
        self.register_buffer("scale", unknown_scale(weight), persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids `[...]` -> embeddings `[..., H]`."""
        if self.usual is None:
            return _embedded(token_ids, self.weight, self.scale, self.dtype)
        # A copy for this call, since threads share the module. The copy sees the table as one of floats.
        usual = copy.copy(self.usual)
        usual._parameters = {**usual._parameters, "weight": _FloatTable(self.weight, self.scale, self.dtype)}  # type: ignore[dict-item]
        rows: Tensor = usual.forward(token_ids)
        return rows


def _embedded(token_ids: Tensor, table: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    rows = functional.embedding(token_ids, table)
    return (rows * scale[token_ids].unsqueeze(-1)).to(dtype)


class _FloatTable(Tensor):
    """An int8 matrix that looks like a float one, and becomes one where it is used: of a table only the rows looked up.

    For the backward pass it keeps a reference to the parameter, as the products above do.
    """

    _table: Tensor
    _scale: Tensor

    @staticmethod
    def __new__(cls, table: Tensor, scale: Tensor, dtype: torch.dtype) -> "_FloatTable":
        made: _FloatTable = Tensor._make_wrapper_subclass(cls, table.shape, dtype=dtype, device=table.device)
        made._table, made._scale = table, scale
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's own is a static placeholder
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.embedding.default:
            return _embedded(args[1], args[0]._table, args[0]._scale, args[0].dtype)
        return func(*tree_map_only(cls, cls._whole, args), **tree_map_only(cls, cls._whole, kwargs or {}))

    def _whole(self) -> Tensor:
        return (self._table * self._scale.unsqueeze(-1)).to(self.dtype)


def empty_int8(*shape: int) -> nn.Parameter:
    """A parameter `[O, I]`, or of experts `[E, O, I]`, on the meta device, to be loaded."""
    return nn.Parameter(torch.empty(shape, dtype=torch.int8, device="meta"), requires_grad=False)


def scale_of(key: str) -> str:
    """The name of the buffer that holds the scales of a module's int8 parameter."""
    return "scale" if key == "weight" else f"{key}_scale"


def unknown_scale(weight: nn.Parameter) -> Tensor:
    """A scale for each row of an int8 parameter, to be loaded."""
    # A buffer and no parameter: DeepSpeed would cast a float32 parameter to bf16 without a word.
    return torch.empty(weight.shape[:-1], dtype=torch.float32, device="meta")


def quantize_matrix(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W `[O, I]` of any float type -> (int8 `[O, I]`, float32 scale `[O]`) with W ≈ int8 x scale, row by row."""
    quantized = native.quantize_weights(weight)
    if quantized is not None:
        return quantized[0], quantized[1] / _LEVELS
    # It takes seconds to import, and warns then of a kernel for 4 bits, which is not used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from bitsandbytes.functional import int8_vectorwise_quant

    rows, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(weight.shape[0])
    # Some rows at a time: bitsandbytes makes several float copies of what it quantises.
    step = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), step):
        part = weight[start : start + step].to(torch.float32).contiguous()
        rows[start : start + step], absmax, _ = int8_vectorwise_quant(part)
        scale[start : start + step] = absmax.to(torch.float32) / _LEVELS
    return rows, scale


def multiply(how: Multiplies, x: Tensor, weight: Tensor, scale: Tensor, expert: int | None = None) -> Tensor:
    """x `[..., I]` times an int8 matrix -> `[..., O]` of the type of x.

    The matrix is `weight` `[O, I]`, or that of an expert in `weight` `[E, O, I]`; `scale` `[O]` is the matrix' own.
    """
    if not how.int8_products:
        y: Tensor = _ExactProduct.apply(x, weight, scale, expert)
        return y
    kernels = how.kernels and native.supports(x, scale)
    y = _Int8Product.apply(x, *_quantized(x, kernels), weight, scale, expert, kernels, how.exact_backward)
    # Out here: what a function returns may not be a view, since some models change it in place.
    return y.view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class _Matrix:
    """A frozen int8 matrix, for the backward pass.

    It keeps a reference to the parameter, and is not for `save_for_backward`, which would keep its data: ZeRO-3
    releases the data after this layer, and gathers it again behind the same object before this layer's backward.
    """

    weight: Tensor
    expert: int | None

    def rows(self) -> Tensor:
        """int8 `[O, I]`, while the parameter is gathered."""
        return self.weight if self.expert is None else self.weight[self.expert]


class _ExactProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, expert: int | None) -> Tensor:
        ctx.matrix, ctx.scale = _Matrix(weight, expert), scale
        # Some rows at a time, so that the whole matrix is never there in float.
        parts = [x @ part.to(x.dtype).t() for part in _some_rows(ctx.matrix.rows())]
        return ((parts[0] if len(parts) == 1 else torch.cat(parts, -1)) * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exact_gradient(grads[0], ctx.matrix.rows(), ctx.scale), None, None, None


def _exact_gradient(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    # Row scales of W belong to the gradient's columns, so they are folded in before the product.
    scaled = (grad * scale).to(grad.dtype)
    parts = _some_rows(weight)
    columns = scaled.split([len(part) for part in parts], -1)
    first, *others = (column @ part.to(grad.dtype) for column, part in zip(columns, parts, strict=True))
    return sum(others, first)


def _some_rows(weight: Tensor) -> Sequence[Tensor]:
    """W `[O, I]` in pieces of rows that may be converted to float."""
    rows = CONVERTED_AT_ONCE // weight.shape[1]
    if weight.device.type == "cpu":
        rows = min(rows, max(_FEWEST_CONVERTED_ROWS, _IN_CACHE // weight.shape[1]))
    return weight.split(max(1, rows))


class _DigitProduct(torch.autograd.Function):
    """The exact product of floats with an int8 matrix, each float as three int8 digits.

    A processor multiplies int8 numbers several times as fast as floats, so that three products of them take less time
    than one of floats, and the matrix is not converted.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.matrix, ctx.scale = _Matrix(weight, None), scale
        digits, row_scale = native.quantize_digits(x.flatten(0, -2))
        y, start = torch.empty(digits.shape[1], len(weight)), 0
        for part in _some_rows(weight):  # what comes of a part is summed in the cache
            columns = slice(start, start + len(part))
            y[:, columns] = _sum_of_digits(digits, row_scale, part, scale[columns])
            start += len(part)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad = grads[0].flatten(0, -2)
        dx, start = torch.zeros(len(grad), ctx.matrix.rows().shape[1]), 0
        for part in _some_rows(ctx.matrix.rows()):
            columns = slice(start, start + len(part))
            digits, row_scale = native.quantize_digits(grad[:, columns], ctx.scale[columns])
            dx += _sum_of_digits(digits, row_scale, part, None)
            start += len(part)
        return dx.view(*grads[0].shape[:-1], -1), None, None


def _sum_of_digits(digits: Tensor, row_scale: Tensor, weight: Tensor, columns: Tensor | None) -> Tensor:
    """Int8 digits `[3 or 2, N, I]` times W, as in `_rescaled_product` -> float32 `[N, O]`."""
    found = products.multiply(digits.flatten(0, 1), row_scale.flatten(0, 1), weight, columns, columns is None)
    *larger, total = found.view(*digits.shape[:2], -1)
    for part in reversed(larger):  # the smallest first
        total = total.add_(part)
    return total


class _FineProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        ctx.matrix, ctx.scale = _Matrix(weight, None), scale
        return _fine_product(rows, row_scale, weight, scale).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _exact_gradient(grads[0], ctx.matrix.rows(), ctx.scale), *(None,) * 4


def multiplies_in_int16(layer: nn.Module) -> bool:
    """Whether a layer is an int16 product, by kernels, and nothing else."""
    return isinstance(layer, Int8Linear) and layer.multiplies_finely and _only_multiplies(layer)


def int16_gated_layer(x: Tensor, gate: Int8Linear, up: Int8Linear, down: Int8Linear, activation: str) -> Tensor:
    """`int8_gated_layer` in int16 products, and without a gradient."""
    rows = _quantized(x, kernels=True, fine=True)
    weights: list[Tensor] = [layer._parameters["weight"] for layer in (gate, up, down)]  # type: ignore[misc]
    of_gate, of_up = (_fine_product(*rows, weights[i], layer.scale) for i, layer in enumerate((gate, up)))
    if products.ways():
        inner = _quantize_finely(native.GatedProductFunction.apply(of_gate, of_up, activation))
    else:
        inner = native.gated_fine_rows(of_gate, of_up, activation)
    return _fine_product(*inner, weights[2], down.scale).view(*x.shape[:-1], -1)


def _quantize_finely(x: Tensor) -> tuple[Tensor, Tensor]:
    """X `[N, I]` as int16 and a scale `[N, 1]`, or as two digits of int8 with theirs, `[2, N, I]` and `[2, N, 1]`."""
    if products.ways():  # for digits this processor has instructions that are twice as fast
        digits, scale = native.quantize_digits(x)
        return digits[:2], scale[:2]
    return native.quantize_finely(x)


def _fine_product(rows: Tensor, row_scale: Tensor, weight: Tensor, columns: Tensor) -> Tensor:
    """What `_quantize_finely` gives, times W `[O, I]` -> float32 `[N, O]`."""
    if rows.dtype == torch.int8:
        return _sum_of_digits(rows, row_scale, weight, columns)
    return products.multiply_int16(rows, row_scale, weight, columns)


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        row_scale: Tensor,
        weight: Tensor,
        scale: Tensor,
        expert: int | None,
        kernels: bool,
        exact_backward: bool,
    ) -> Tensor:
        ctx.matrix, ctx.scale, ctx.kernels, ctx.exact_backward = _Matrix(weight, expert), scale, kernels, exact_backward
        ctx.shape = x.shape
        return _rescaled_product(rows, row_scale, ctx.matrix.rows(), scale, kernels, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), others = grads, (None,) * 7
        if ctx.exact_backward:
            return _exact_gradient(grad, ctx.matrix.rows(), ctx.scale).view(ctx.shape), *others
        kernels = ctx.kernels and native.supports(grad)
        # The scale of W's rows first: each column of the gradient has another one, which could not be taken out after
        # the sum over columns.
        rows, row_scale = _quantize(grad, kernels, ctx.scale)
        dx = _rescaled_product(rows, row_scale, ctx.matrix.rows(), None, kernels, grad.dtype)
        return dx.view(ctx.shape), *others


def multiplies_in_int8(layer: nn.Module) -> bool:
    """Whether a layer is an int8 product in both directions, by kernels, and nothing else."""
    return (
        isinstance(layer, Int8Linear)
        and layer.int8_products
        and layer.kernels
        and not layer.exact_backward
        and _only_multiplies(layer)
    )


def _only_multiplies(layer: Int8Linear) -> bool:
    return layer.bias is None and not layer._forward_hooks and not layer._forward_pre_hooks


def int8_gated_layer(x: Tensor, gate: Int8Linear, up: Int8Linear, down: Int8Linear, activation: str) -> Tensor:
    """`down(activation(gate(x)) * up(x))` of x `[..., H]`, by the same arithmetic as the layers one by one.

    Between the products each row is activated and quantised while it is in the cache, in both directions. On a CPU x is
    float32.
    """
    kernels = native.supports(x)  # else those of a GPU
    y: Tensor = _Int8Gated.apply(x, *_quantized(x, kernels), (gate, up, down), activation, kernels)
    return y.view(*x.shape[:-1], -1)


class _Int8Gated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        rows: Tensor,
        row_scale: Tensor,
        layers: tuple[Int8Linear, ...],
        activation: str,
        kernels: bool,
    ) -> Tensor:
        # References to parameters, as in `_Matrix`.
        ctx.weights, ctx.scales = [layer._parameters["weight"] for layer in layers], [layer.scale for layer in layers]
        ctx.activation, ctx.shape, ctx.kernels = activation, x.shape, kernels
        gate, up = (_rescaled_product(rows, row_scale, ctx.weights[i], ctx.scales[i], kernels) for i in (0, 1))
        ctx.save_for_backward(gate, up)
        gated = native.gated_rows if kernels else partial(gpu_rows.gated_rows, smallest=_SMALLEST)
        inner, inner_scale = gated(gate, up, activation)
        return _rescaled_product(inner, inner_scale, ctx.weights[2], ctx.scales[2], kernels, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        of_gate, of_up, of_down = ctx.scales
        rows, row_scale = _quantize(grads[0], ctx.kernels, of_down)
        inner = _rescaled_product(rows, row_scale, ctx.weights[2], None, ctx.kernels)
        gradients = native.gated_gradients if ctx.kernels else partial(gpu_rows.gated_gradients, smallest=_SMALLEST)
        found = gradients(inner, gate, up, (of_gate, of_up), ctx.activation)
        dx, more = (_rescaled_product(*found[i], ctx.weights[i], None, ctx.kernels) for i in (0, 1))
        return dx.add_(more).view(ctx.shape).to(grads[0].dtype), *(None,) * 5


@dataclass(frozen=True)
class _Quantized:
    of: weakref.ref[Tensor]
    version: int
    fine: bool
    rows: Tensor
    scale: Tensor


# Query, key and value projections follow each other on the same activations, which are quantised once for all three.
# One entry a thread is enough, and a weak reference keeps no activations alive.
_last = threading.local()


def _quantized(x: Tensor, kernels: bool, fine: bool = False) -> tuple[Tensor, Tensor]:
    """X `[..., I]` in int8 (or `_quantize_finely`), `[N, I]` and `[N, 1]`.

    Once for layers that follow each other on the same activations.
    """
    # The version counts changes in place, after which the same object holds other numbers.
    last: _Quantized | None = getattr(_last, "activations", None)
    if last is None or last.of() is not x or last.version != x._version or last.fine != fine:
        flat = x.detach().flatten(0, -2)
        rows, scale = _quantize_finely(flat) if fine else _quantize(flat, kernels)
        last = _last.activations = _Quantized(weakref.ref(x), x._version, fine, rows, scale)
    return last.rows, last.scale


def _quantize(x: Tensor, kernels: bool, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X `[N, I]`, times `columns` `[I]` -> (int8 `[N, I]`, float32 scale `[N, 1]`).

    The scale of a row that is not finite is not finite either, so that the product is not.
    """
    if kernels:
        return native.quantize_activations(x, columns)
    if gpu.runs_on(x.device):
        return gpu_rows.quantize_activations(x, _SMALLEST, columns)
    x = x.float() if columns is None else x * columns
    scale = x.abs().amax(-1, keepdim=True).clamp_min_(_SMALLEST) / _LEVELS
    return (x / scale).round_().to(torch.int8), scale


def _rescaled_product(
    rows: Tensor,
    row_scale: Tensor,
    weight: Tensor,
    columns: Tensor | None,
    kernels: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Int8 rows `[N, I]` times W `[O, I]`, each column times its own scale -> `[N, O]` in `dtype`.

    Without scales of columns it is the product with the transpose: int8 `[N, O]` times W `[O, I]` -> `[N, I]`. The
    CPU's kernels give float32 alone.
    """
    across = columns is None
    if kernels and products.supports(rows, weight):
        return products.multiply(rows, row_scale, weight, columns, across)
    if kernels and columns is not None and products.supports_int16(weight):
        wide = functional.pad(rows.short(), (0, -rows.shape[1] % native.DEEP))  # the same whole numbers
        return products.multiply_int16(wide, row_scale, weight, columns)
    return _rescale(_multiply(rows, weight if across else weight.t()), row_scale, columns, kernels, dtype)


def _rescale(
    product: Tensor, row_scale: Tensor, columns: Tensor | None, kernels: bool, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Int32 `[N, O]` -> `[N, O]` in `dtype`, of the CPU's kernels in float32."""
    if kernels:
        return native.rescale(product, row_scale, columns)
    if gpu.runs_on(product.device):
        return gpu_rows.rescale(product, row_scale, columns, dtype)
    # In place and in float: torch is many times slower with mixed types.
    y = product.float()
    return (y if columns is None else y.mul_(columns)).mul_(row_scale).to(dtype)


def _multiply(x: Tensor, y: Tensor) -> Tensor:
    """Int8 `[N, I]` x int8 `[I, O]` -> int32 `[N, O]`."""
    if x.is_cuda and len(x) <= _FEWEST_CUDA_ROWS:
        return torch._int_mm(functional.pad(x, (0, 0, 0, _FEWEST_CUDA_ROWS + 1 - len(x))), y)[: len(x)]
    if x.is_cpu and not multiplies_int8_fast(x.device):
        return _multiply_as_floats(x, y)
    return torch._int_mm(x, y)


def _multiply_as_floats(x: Tensor, y: Tensor) -> Tensor:
    """The same numbers from products of floats: without instructions for int8, PyTorch has nothing but a plain loop."""
    total = torch.zeros(len(x), y.shape[1], dtype=torch.int32)
    with torch.autocast("cpu", enabled=False):  # which would round the products
        for left, right in zip(x.split(_EXACT_SUM, 1), y.split(_EXACT_SUM, 0), strict=True):
            total += (left.float() @ right.float()).int()
    return total


def multiplies_int8_fast(device: torch.device) -> bool:
    """Whether the hardware has instructions for products of int8 numbers."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (7, 5)
    return torch.cpu._is_vnni_supported() or torch.cpu._is_amx_tile_supported()


def set_products(model: nn.Module, setting: str, device: torch.device) -> None:
    """Set how the model's int8 layers multiply: `int8`, `int8_forward` (the gradient is exact), `int16` or `exact`.

    Where a processor has no int16 products, `int16` is exact; so are experts.

    The output layer stays exact: its product is one of floats or, unless all are `exact`, of int8 digits. One large
    entry of a token's gradient over the vocabulary would leave the others no bits: measured on SmolLM2, the prompt's
    gradient then points elsewhere (cosine 0.2 to 0.5). cuBLAS takes int8 matrices whose sides are multiples of 8, so on
    a GPU a layer with other sides stays exact.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    assert setting in ("int8", "int8_forward", "int16", "exact"), setting
    for module in model.modules():
        if hasattr(module, "int8_products"):
            how: Any = module
            sides_fit = device.type != "cuda" or all(side % 8 == 0 for side in how.sides)
            how.int8_products = setting in ("int8", "int8_forward") and sides_fit and module is not output
            how.exact_backward = setting == "int8_forward"
            if isinstance(how, Int8Linear):
                how.fine = setting == "int16"
                how.digits = setting != "exact" and module is output
