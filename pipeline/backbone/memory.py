"""How much memory a rank will need, counted from the model's shapes before anything is loaded."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from pipeline.backbone.int8 import CONVERTED_AT_ONCE
from pipeline.backbone.loading import build_skeleton, input_width, untie_separate_weights
from pipeline.backbone.output import LOGIT_BYTES, logit_bytes
from pipeline.backbone.weights import WeightSource

# Imported libraries and the allocator, as measured on an idle rank.
_PROCESS_BYTES = 700 * 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    parameters: int
    """Number of parameters of the whole model; a count, not bytes."""
    weights: int
    """Held between calls: this rank's part of every matrix, and the small parameters whole."""
    gathered: int
    """The largest layer, gathered from all ranks, and the part of a matrix that is converted at a time."""
    activations: int
    """Kept for the backward pass of one micro-batch."""

    @property
    def parts(self) -> dict[str, int]:
        return {
            "weights": self.weights,
            "largest layer gathered": self.gathered,
            "activations": self.activations,
            "the process": _PROCESS_BYTES,
        }


def estimate_memory(
    config: PretrainedConfig,
    int8: bool,
    dtype: torch.dtype,
    world_size: int,
    tokens_per_microbatch: int,
    source: WeightSource | None = None,
) -> MemoryEstimate:
    """An upper estimate, within a factor of about two, of what a rank needs in training.

    `source` says whether a checkpoint stores separately what transformers would tie.
    """
    skeleton = build_skeleton(config, int8)
    if source is not None:
        untie_separate_weights(skeleton, source)
    size = dtype.itemsize
    whole = 2 * input_width(skeleton)  # up to here a parameter stays on every rank, see host.py
    parameters = list(skeleton.parameters())
    int8_parameters = [p for p in parameters if p.dtype == torch.int8]
    on_every_rank = sum(buffer.nbytes for buffer in skeleton.buffers())  # scales of all rows among them
    weights = sum(_bytes(p, size) // (world_size if p.numel() > whole else 1) for p in parameters) + on_every_rank
    gathered = max(sum(_bytes(p, size) for p in group) for group in gathered_together(skeleton))
    # Of experts, the matrix of one is converted at a time.
    converted = max((min(p.shape[-2] * p.shape[-1], CONVERTED_AT_ONCE) for p in int8_parameters), default=0)
    text: Any = config.get_text_config(decoder=True)
    # A layer keeps norms, projections, residuals and the feed-forward's branches. T5Gemma's halves are nearly alike,
    # and a token passes through one of them. Logits are assumed at a quarter of the positions.
    layer = 10 * input_width(skeleton) + 4 * _inner_width(text)
    layers = int(text.num_hidden_layers)
    logits = min(logit_bytes(config, tokens_per_microbatch // 4), LOGIT_BYTES)
    activations = tokens_per_microbatch * layers * layer * size + logits
    return MemoryEstimate(
        parameters=sum(p.numel() for p in parameters),
        weights=weights,
        gathered=(gathered if world_size > 1 else 0) + converted * size,
        activations=activations,
    )


def gathered_together(model: nn.Module) -> list[list[nn.Parameter]]:
    """Parameters that ZeRO-3 gathers at once (see host.py): those of a transformer layer; each other one alone."""
    layers = [layer for block in model.modules() if isinstance(block, nn.ModuleList) for layer in block]
    inner = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    groups = [list(layer.parameters()) for layer in layers if id(layer) not in inner]
    of_layers = {id(parameter) for group in groups for parameter in group}
    return [*groups, *([parameter] for parameter in model.parameters() if id(parameter) not in of_layers)]


def _bytes(parameter: nn.Parameter, size: int) -> int:
    return parameter.numel() * (1 if parameter.dtype == torch.int8 else size)


def _inner_width(config: Any) -> int:
    """Hidden units of a layer's feed-forward for a token: of the experts that it goes to, where there are some."""
    widths = (getattr(config, "intermediate_size", None), getattr(config, "d_ff", None), 4 * config.hidden_size)
    dense = next(width for width in widths if width)
    of_expert = getattr(config, "moe_intermediate_size", None) or dense
    experts = getattr(config, "num_experts_per_tok", None) or 1
    # Some families give a number for each layer.
    dense, of_expert, experts = (max(n) if isinstance(n, list) else n for n in (dense, of_expert, experts))
    return int(max(dense, of_expert * experts))
