"""How much memory a rank will need, counted from the model's shapes before anything is loaded."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from pipeline.backbone.files import embedding_rows
from pipeline.backbone.int8 import CONVERTED_AT_ONCE
from pipeline.backbone.loading import build_skeleton, input_width, untie_separate_weights
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
    weights = sum(_bytes(p, size) // (world_size if p.numel() > whole else 1) for p in parameters)
    gathered = max(sum(_bytes(p, size) for p in group) for group in gathered_together(skeleton))
    converted = max((min(p.numel(), CONVERTED_AT_ONCE) for p in parameters if p.dtype == torch.int8), default=0)
    # T5Gemma's halves have a configuration each, nearly alike; a token passes through one of them.
    stack = config if hasattr(config, "hidden_size") else config.get_text_config(decoder=True)
    hidden, layers = int(stack.hidden_size), int(stack.num_hidden_layers)
    inner = int(getattr(stack, "intermediate_size", None) or getattr(stack, "d_ff", None) or 4 * hidden)
    # A layer keeps norms, projections, residuals and the feed-forward's two branches. Logits are assumed at a quarter
    # of the positions.
    layer = 10 * hidden + 4 * inner
    activations = tokens_per_microbatch * (layers * layer * size + embedding_rows(config) * 8 // 4)
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
