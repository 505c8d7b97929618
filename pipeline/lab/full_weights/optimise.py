"""Optimizers for weights of which each rank holds a piece. AdamW treats each weight alone; Adafactor needs whole rows.

Shapes: R rows and C columns of a matrix, n entries of a piece.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from pipeline.settings import OptimizerSettings
from pipeline.tuning.ranks import sum_over_ranks

CUT_STATE = frozenset({"square", "exp_avg", "exp_avg_sq"})
"""Optimizer state with an entry for each weight of a piece; all other state is the same on every rank."""

_DECAY, _CLIP = 0.8, 1.0
_EPSILON, _LEAST_SCALE = 1e-30, 1e-3


@dataclass(frozen=True)
class Span:
    """The entries of a flattened parameter that a piece holds."""

    shape: torch.Size
    start: int
    stop: int


class PartitionedAdafactor(Optimizer):
    """Adafactor (Shazeer & Stern 2018) as transformers computes it with `scale_parameter`, and as T5 was trained.

    Row and column statistics, and the sizes of parameter and update, are those of the whole matrix, summed over ranks.
    So all ranks must step the same parameters in the same order.
    """

    def __init__(self, pieces: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(pieces, {"lr": lr, "weight_decay": weight_decay})
        self._spans: dict[int, Span] = {}

    def describe(self, spans: Mapping[Tensor, Span]) -> None:
        """Set which span of its parameter each tensor holds; must be called before the first step."""
        self._spans = {id(values): span for values, span in spans.items()}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step each parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for values in group["params"]:
                if values.grad is not None:
                    self._step_piece(values, self._spans[id(values)], group["lr"], group["weight_decay"])

    def _step_piece(self, padded: Tensor, span: Span, lr: float, weight_decay: float) -> None:
        assert padded.grad is not None
        state: dict[str, Tensor] = self.state[padded]
        count = span.stop - span.start
        values, gradient = padded[:count], padded.grad[:count]
        state["step"] = state.get("step", torch.tensor(0.0)) + 1
        decay = 1.0 - float(state["step"]) ** -_DECAY
        squares = gradient**2 + _EPSILON
        if len(span.shape) == 2:
            inverse_root, size = _factored_inverse_root(state, squares, values, span, decay)
        else:
            size = sum_over_ranks(values.pow(2).sum())
            # State is as long as the padded piece, whose length depends on the number of ranks.
            squares = torch.nn.functional.pad(squares, (0, len(padded) - count))
            state["square"] = _moving_average(state.get("square"), squares, decay)
            inverse_root = state["square"][:count].rsqrt()
        update = inverse_root * gradient
        entries = span.shape.numel()
        update_rms = (sum_over_ranks(update.pow(2).sum()) / entries).sqrt()
        rate = lr * (size / entries).sqrt().clamp_(min=_LEAST_SCALE)
        if weight_decay:
            values.mul_(1.0 - weight_decay * rate)
        values.sub_(update.mul_(rate / (update_rms / _CLIP).clamp_(min=1.0)))


def _factored_inverse_root(
    state: dict[str, Tensor], squares: Tensor, values: Tensor, span: Span, decay: float
) -> tuple[Tensor, Tensor]:
    """1 / root of a matrix's factored mean squared gradient `[n]`, and the sum of squares of the matrix itself."""
    rows, columns = span.shape
    first, last = span.start // columns, -(-span.stop // columns)
    table = squares.new_zeros((last - first) * columns)
    offset = span.start - first * columns
    table[offset : offset + len(squares)] = squares
    table = table.view(-1, columns)  # [rows of the piece, C]
    row_sums = squares.new_zeros(rows)
    row_sums[first:last] = table.sum(1)
    sums = torch.cat([row_sums, table.sum(0), values.pow(2).sum()[None]])
    by_row, by_column, size = sum_over_ranks(sums).split([rows, columns, 1])
    state["row"] = _moving_average(state.get("row"), by_row / columns, decay)
    state["column"] = _moving_average(state.get("column"), by_column / rows, decay)
    factors = (state["row"][first:last] / state["row"].mean()).rsqrt()
    table = factors[:, None] * state["column"].rsqrt()
    return table.view(-1)[offset : offset + len(squares)], size[0]


def _moving_average(before: Tensor | None, new: Tensor, decay: float) -> Tensor:
    return new * (1.0 - decay) if before is None else before.mul_(decay).add_(new, alpha=1.0 - decay)


def make_weight_optimizer(pieces: Iterable[Tensor], settings: OptimizerSettings) -> Optimizer:
    """Adafactor relative to each parameter's size, as T5 was trained (Raffel et al. 2020), or AdamW."""
    if settings.name == "adamw":
        return AdamW(pieces, lr=settings.rate, weight_decay=settings.weight_decay)
    return PartitionedAdafactor(pieces, settings.rate, settings.weight_decay)
