"""What a rank holds of the weights that are trained: a piece of each parameter, and what trains them."""

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
    """`[stop - start]` float32, whatever the model runs in; under ZeRO the last rank's is padded behind that."""

    def __len__(self) -> int:
        return self.stop - self.start


class TrainedModel(Protocol):
    """A model whose weights are trained. Every rank must make the same calls in the same order."""

    @property
    def backbone(self) -> Backbone:
        """Runs the weights as they are now."""

    @property
    def pieces(self) -> Sequence[Piece]: ...

    @property
    def optimizer(self) -> Optimizer:
        """Its state is by a piece's `values`."""

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradient; that of all ranks is summed. `last`: of this step."""

    def update(self, lr: float) -> None:
        """One step of the optimizer; gradients begin anew."""

    def take_up(self) -> None:
        """Run with `values` that were changed by others than `update`."""

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter whole, in the type that the model runs in; good until the next one is asked for."""


def trained_parameters(model: TrainedModel) -> int:
    return sum(piece.shape.numel() for piece in model.pieces)
