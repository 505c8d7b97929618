"""Train all weights over several ranks with DeepSpeed ZeRO-3, which partitions weights, gradients and optimizer.

ZeRO hands the optimizer one flat piece at a time. With one sub-group for each parameter, that is a piece of one
parameter, and Adafactor can sum a matrix's statistics over ranks. A joint flat buffer would mix several matrices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PretrainedConfig

from pipeline.backbone.host import (
    Backbone,
    Hosted,
    Traffic,
    choose_way,
    layer_types,
    set_gather,
    start_deepspeed,
    zero3_placement,
    zero_settings,
)
from pipeline.backbone.loading import Partition, input_width, load_weights
from pipeline.backbone.offload import on_device
from pipeline.backbone.weights import WeightSource
from pipeline.lab.full_weights.optimise import PartitionedAdafactor, Span, make_weight_optimizer
from pipeline.lab.full_weights.pieces import Piece
from pipeline.settings import OptimizerSettings


@dataclass(frozen=True, eq=False)
class PartitionedModel:
    """See `TrainedModel`."""

    backbone: Backbone
    pieces: Sequence[Piece]
    parameters: Sequence[nn.Parameter]
    optimizer: Optimizer
    engine: Any

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        # ZeRO takes the mean over ranks, and the sum is needed.
        self.engine.backward(loss * dist.get_world_size())

    def update(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.engine.step()

    def take_up(self) -> None:
        zero = self.engine.optimizer
        self._release()
        for index in range(len(self.pieces)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        import deepspeed

        self._release()
        for piece, parameter in zip(self.pieces, self.parameters, strict=True):
            with deepspeed.zero.GatheredParameters([parameter]):
                yield piece.name, parameter.detach()

    def _release(self) -> None:
        """Release gathered parameters: an evaluation may leave some gathered, or being gathered."""
        self.engine.optimizer._partition_all_parameters()


def load_partitioned(
    model: nn.Module,
    source: WeightSource,
    config: PretrainedConfig,
    settings: OptimizerSettings,
    dtype: torch.dtype,
    device: torch.device,
) -> PartitionedModel:
    """Load weights into a skeleton, each rank its own part. Raises: BackboneError."""
    start_deepspeed(device)
    import deepspeed

    width = input_width(model)
    zero = _settings(width, settings.clip_norm, dtype)
    traffic = Traffic()
    set_gather(None, traffic)
    load_weights(model, source, dtype, zero3_placement(zero, dtype, device, on_device(device)))
    model.requires_grad_(True)
    hosted = Hosted(model)
    deepspeed.utils.set_z3_leaf_modules(hosted, layer_types(model))
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    optimizer = make_weight_optimizer(model.parameters(), settings)
    engine, *_ = deepspeed.initialize(model=hosted, optimizer=optimizer, config=zero)
    parameters = [group[0] for group in engine.optimizer.fp16_groups]
    assert all(len(group) == 1 for group in engine.optimizer.fp16_groups)
    flat = engine.optimizer.fp32_partitioned_groups_flat
    partition = Partition(dist.get_rank(), dist.get_world_size())
    pieces = [
        Piece(named[id(parameter)], parameter.ds_shape, *partition.span(parameter.ds_numel), values)
        for parameter, values in zip(parameters, flat, strict=True)
    ]
    if isinstance(optimizer, PartitionedAdafactor):
        optimizer.describe({piece.values: Span(piece.shape, piece.start, piece.stop) for piece in pieces})
    proof = choose_way(engine, model, source.origin, device, dtype, partitioned=True, gradients=False)
    backbone = Backbone(config, engine, device, dtype, width, proof, traffic, partitioned=True)
    return PartitionedModel(backbone, pieces, parameters, optimizer, engine)


def _settings(hidden_size: int, clip_norm: float | None, dtype: torch.dtype) -> dict[str, Any]:
    settings = zero_settings(hidden_size)
    settings["zero_optimization"] |= {"sub_group_size": 1, "reduce_scatter": dist.get_backend() != "gloo"}
    return settings | {
        "bf16": {"enabled": dtype == torch.bfloat16},
        # 0 turns clipping off; DeepSpeed's own default clips.
        "gradient_clipping": clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
    }
