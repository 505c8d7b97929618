"""A rank's part of the weights in training: a piece of each parameter, and the model that trains them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from pipeline.backbone.host import Backbone


@dataclass(frozen=True, eq=False)
class Piece:
    """Entries `start` to `stop` (not included) of one flattened parameter, which the optimizer changes in place."""

    name: str
    """As transformers names the parameter."""
    shape: torch.Size
    start: int
    stop: int
    values: Tensor
    """`[stop - start]` float32, whatever type the model runs in. Under ZeRO the last rank's values are padded."""

    def __len__(self) -> int:
        return self.stop - self.start


class TrainedModel(Protocol):
    """A model with all weights in training. Every rank must make the same calls in the same order."""

    @property
    def backbone(self) -> Backbone:
        """The model, which runs with the present weights."""

    @property
    def pieces(self) -> Sequence[Piece]: ...

    @property
    def optimizer(self) -> Optimizer:
        """Its state is kept by the pieces' `values`."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient, summed over ranks. `last`: whether it is the last one of this step."""

    def update(self, lr: float) -> None:
        """Take one step of the optimizer, and reset gradients."""

    def take_up(self) -> None:
        """Make the model run with `values` that were changed by anything else than `update`."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each whole parameter, in the type that the model runs in. It is valid until the next one is fetched."""


def trained_parameters(model: TrainedModel) -> int:
    return sum(piece.shape.numel() for piece in model.pieces)
