"""Train all weights on one rank, with PyTorch alone."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig

from pipeline.backbone.host import Backbone, Hosted, choose_way, whole_placement
from pipeline.backbone.loading import input_width, load_weights
from pipeline.backbone.offload import on_device
from pipeline.backbone.weights import WeightSource
from pipeline.lab.full_weights.optimise import PartitionedAdafactor, Span, make_weight_optimizer
from pipeline.lab.full_weights.pieces import Piece
from pipeline.settings import OptimizerSettings


@dataclass(frozen=True, eq=False)
class WholeModel:
    """See `TrainedModel`."""

    backbone: Backbone
    pieces: Sequence[Piece]
    parameters: Sequence[nn.Parameter]
    """The parameters that the model runs; pieces of float32 parameters are views of them."""
    optimizer: Optimizer
    clip_norm: float | None

    def backward(self, loss: Tensor, last: bool) -> None:
        loss.backward()

    def update(self, lr: float) -> None:
        for piece, parameter in zip(self.pieces, self.parameters, strict=True):
            gradient, parameter.grad = parameter.grad, None
            piece.values.grad = None if gradient is None else gradient.reshape(-1).float()
        values = [piece.values for piece in self.pieces]
        if self.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(values, self.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.take_up()

    def take_up(self) -> None:
        for piece, parameter in zip(self.pieces, self.parameters, strict=True):
            if parameter.dtype != torch.float32:
                parameter.data.view(-1).copy_(piece.values)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for piece, parameter in zip(self.pieces, self.parameters, strict=True):
            yield piece.name, parameter.detach()


def load_whole(
    model: nn.Module,
    source: WeightSource,
    config: PretrainedConfig,
    settings: OptimizerSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> WholeModel:
    """Load weights into a skeleton on this rank. Raises: BackboneError."""
    load_weights(model, source, dtype, whole_placement(device, on_device(device)))
    model.requires_grad_(True)
    named = list(model.named_parameters())
    pieces = [
        Piece(name, weight.shape, 0, weight.numel(), weight.detach().view(-1).float().requires_grad_())
        for name, weight in named
    ]
    optimizer = make_weight_optimizer([piece.values for piece in pieces], settings)
    if isinstance(optimizer, PartitionedAdafactor):
        optimizer.describe({piece.values: Span(piece.shape, piece.start, piece.stop) for piece in pieces})
    hosted = Hosted(model)
    proof = choose_way(hosted, model, source.origin, device, dtype, partitioned=False, gradients=False)
    backbone = Backbone(config, hosted, device, dtype, input_width(model), proof)
    return WholeModel(backbone, pieces, [weight for _, weight in named], optimizer, settings.clip_norm)
