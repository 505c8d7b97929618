"""Embeddings of words as a model makes them from ids, for the place where its layers take embeddings.

Most families scale words within their embedding module, or not at all. Some (Pegasus, Marian, Falcon-H1) scale outside
it, and only when they are given ids: the words beside a soft prompt have to be scaled in their stead.

Shapes: T tokens, H hidden.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pipeline.backbone.files import embedding_rows
from pipeline.backbone.output import layers_of
from pipeline.errors import BackboneError

_WORDS = 16
"""Words that both ways are compared on: of a few, some may have an embedding of zeros."""
_AGREES = 1e-3
"""Largest difference between the two ways, in the unit of the largest entry: above the rounding of 16 bits."""

_factors: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def embed_words(model: Any, ids: Tensor) -> Tensor:
    """Embeddings `[..., H]` of token ids `[...]`: given these, the model does as if it were given the ids.

    The first call for a model finds out what that takes. Under ZeRO-3 every rank must make it, as every other call.
    Raises: BackboneError for a model that does with ids what no factor on their embeddings gives.
    """
    if model not in _factors:
        _factors[model] = _factor_of_ids(model, _some_words(model.config, ids.device))
    words: Tensor = model.get_input_embeddings()(ids)
    return words if _factors[model] == 1.0 else words * _factors[model]


def _some_words(config: Any, device: torch.device) -> Tensor:
    """Ids `[1, T]` from all over the vocabulary."""
    text = config.get_text_config(encoder=True) if config.is_encoder_decoder else config
    ids = torch.linspace(0, embedding_rows(config) - 1, _WORDS, device=device).long()
    # Some families give padding no position, and that only where they see ids.
    return ids[ids != (-1 if text.pad_token_id is None else text.pad_token_id)][None]


@torch.no_grad()
def _factor_of_ids(model: Any, ids: Tensor) -> float:
    """What a model multiplies the embeddings of ids by, but not embeddings that it is given."""
    stack = model.get_encoder() if model.config.is_encoder_decoder else layers_of(model)
    embedded = model.get_input_embeddings()(ids)
    wanted = _enters_layers(stack, input_ids=ids)
    # Nothing is done to most families' embeddings. (Gemma 4, given embeddings, would search its table for their ids.)
    if wanted.shape == embedded.shape and torch.equal(wanted, embedded):
        return 1.0
    # No list of names says where a family keeps its factor: it is a number of the stack's own that makes both agree.
    for factor in dict.fromkeys([1.0, *(value for value in vars(stack).values() if isinstance(value, float))]):
        given = _enters_layers(stack, inputs_embeds=embedded * factor)
        if (given - wanted).abs().max() <= _AGREES * wanted.abs().max():
            return factor
    raise BackboneError(
        f"the model's {type(stack).__name__} does not do with embeddings what it does with ids, and no number of its "
        "own makes up for it: a soft prompt cannot stand beside its words; give a model of another family"
    )


class _Entered(Exception):
    """Ends a pass once it is known what enters the layers."""


def _enters_layers(stack: Any, **given: Tensor) -> Tensor:
    """The first tensor of floats that a layer is called with."""
    entered: list[Tensor] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        entered.extend(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point())
        raise _Entered

    # Before DeepSpeed's own hook, so that no weights of a layer are gathered.
    handles = [
        layer.register_forward_pre_hook(stop, prepend=True, with_kwargs=True)
        for layers in stack.modules()
        if isinstance(layers, nn.ModuleList)
        for layer in layers
    ]
    try:
        stack(**given, use_cache=False)
    except _Entered:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return entered[0]
