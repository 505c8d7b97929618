"""How much memory a rank will need: counted from the model's shapes, before anything is loaded."""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig

from pipeline.backbone.loading import build_skeleton

# Imported libraries and the allocator, as measured on an idle rank.
_PROCESS_BYTES = 700 * 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank."""

    parameters: int
    """Of the whole model: a count, not bytes."""
    weights: int
    """Held between calls: this rank's part of every matrix, and the small parameters whole."""
    gathered: int
    """The largest layer, gathered from all ranks and converted for its product."""
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
    config: PretrainedConfig, int8: bool, dtype: torch.dtype, world_size: int, tokens_per_microbatch: int
) -> MemoryEstimate:
    """An upper estimate, within a factor of about two, of what a rank needs in training."""
    skeleton = build_skeleton(config, int8)
    size = dtype.itemsize
    parameters = list({id(p): p for p in skeleton.parameters()}.values())
    held = [(p.numel(), 1 if p.dtype == torch.int8 else size) for p in parameters]
    whole = 2 * int(config.hidden_size)  # up to here a parameter stays on every rank, see host.py
    weights = sum(n * b // (world_size if n > whole else 1) for n, b in held)
    gathered = max(n * (b if world_size > 1 else 0) + (n * size if b != size else 0) for n, b in held)
    hidden, layers = int(config.hidden_size), int(config.num_hidden_layers)
    inner = int(getattr(config, "intermediate_size", None) or getattr(config, "d_ff", None) or 4 * hidden)
    # Norms, projections, residuals and the feed-forward's two branches; logits at a quarter of the positions.
    layer = 10 * hidden + 4 * inner
    activations = tokens_per_microbatch * (layers * layer * size + int(config.vocab_size) * 8 // 4)
    return MemoryEstimate(sum(n for n, _ in held), weights, gathered, activations)
