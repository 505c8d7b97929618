"""Gather the next layer's weights while a layer runs, under ZeRO-3.

DeepSpeed prefetches by the trace of an earlier pass. A pass of another kind (an evaluation, a step with more blocks of
logits) makes the trace void, and two passes go by until there is a new one. Here nothing is recorded: layers of a stack
follow each other, up in a forward pass and down in a backward pass, whatever kind of pass it is. At most one layer more
is there than without.

All ranks run the same layers in the same order, and so ask for the same gathers in the same order.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from pipeline.backbone.output import layers_of

Gather = Callable[[set[nn.Parameter], bool], None]
"""Begins to gather those of some parameters that are not there, and does not wait; whether for a forward pass."""


def prefetch_layers(model: Any, gather: Gather) -> None:
    """Let each layer ask for the weights of the one that runs after it, once its own are there.

    It is called after DeepSpeed has installed its hooks, which gather a layer's own weights.
    """
    for before, after in itertools.pairwise(_in_order(model)):
        # Behind DeepSpeed's hook of this kind, so that a layer's own weights are asked for first.
        before.register_forward_pre_hook(partial(_ask, after, gather))
        # In front of DeepSpeed's, so that in a backward pass it comes behind it.
        after.register_forward_hook(partial(_ask_in_backward, before, gather), prepend=True)


def _in_order(model: Any) -> list[nn.Module]:
    """The layers in the order of a forward pass, an encoder's first, and the output layer last.

    The first layer is not asked for ahead, and neither is the table of words: who looks up words does not always run
    layers behind it. Layers that make something else than text (a vision tower) do not run here.
    """
    stacks = [model.get_encoder()] if model.config.is_encoder_decoder else []
    stacks.append(layers_of(model))
    return [*(layer for stack in stacks for layer in _layers(stack)), model.get_output_embeddings()]


def _layers(stack: nn.Module) -> Iterator[nn.Module]:
    for child in stack.children():
        if isinstance(child, nn.ModuleList):
            yield from (layer for layer in child if any(layer.children()))
        else:
            yield from _layers(child)


def _ask(layer: nn.Module, gather: Gather, *_: Any) -> None:
    with torch.no_grad():
        gather(set(layer.parameters()), True)


def _ask_in_backward(layer: nn.Module, gather: Gather, _module: nn.Module, _args: Any, output: Any) -> None:
    """Ask for a layer once the gradient of the layer behind it, whose output this is, is on its way."""
    reached = next((x for x in tree_leaves(output) if isinstance(x, Tensor) and x.requires_grad), None)
    if reached is not None:
        reached.register_hook(lambda _gradient: gather(set(layer.parameters()), False))
