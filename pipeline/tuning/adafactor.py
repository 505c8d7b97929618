"""Adafactor as T5X has it. In a module of its own, because it imports transformers' Trainer, which takes seconds."""

from collections.abc import Sequence
from typing import Any

from transformers.optimization import Adafactor

FACTORED_FROM = 128
"""T5X's `min_dim_size_to_factor`."""


class T5XAdafactor(Adafactor):
    """transformers' Adafactor, but for when the second moment is factored.

    transformers factors that of every matrix. T5X (its `adafactor.py`), with which Lester et al. (2021) tuned, keeps an
    entry for each weight where a side of the matrix is below 128, as with most prompts: v = b v + (1 - b) (g² + 1e-30)
    with b = 1 - t^-0.8, and the update g / √v is divided by its RMS where that is above 1. So no entry's first step is
    larger than the rate; factored, it may be thirty times as large. One difference is left: T5X's weight decay is not
    multiplied by the rate.

    A group of parameters has `factored_from`, the shorter side from which a matrix is factored.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], **options: Any) -> None:
        super().__init__([{"factored_from": FACTORED_FROM, **group} for group in groups], **options)

    @staticmethod
    def _get_options(param_group: dict[str, Any], param_shape: Sequence[int]) -> tuple[bool, bool]:
        """Whether the second moment is factored, and whether there is a first moment; called by `step`."""
        return len(param_shape) >= 2 and min(param_shape) >= param_group["factored_from"], False
