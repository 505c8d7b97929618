"""What surrounds an int8 product on a GPU, each in one launch; PyTorch's operators take four and three.

Shapes: N tokens, X the width of a row.
"""

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


def rescale(product: Tensor, row_scale: Tensor, columns: Tensor | None) -> Tensor:
    """Int32 `[N, X]` times scales `[N, 1]`, and times `columns` `[X]` if given -> float32 `[N, X]`."""
    from pipeline.backbone.gpu import row_kernels

    y = torch.empty_like(product, dtype=torch.float32)
    if len(product):
        grid = (len(product), -(-product.shape[1] // _BLOCK))
        row_kernels.rescale[grid](
            product, row_scale, row_scale if columns is None else columns, y, product.shape[1], columns is not None,
            _BLOCK,
        )  # fmt: skip
    return y
