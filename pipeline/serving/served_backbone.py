"""The model of a service: loaded whole into this process, with its tokenizer and its identity."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from pipeline.backbone.files import Architecture, check_eos, context_length, find_model, read_config, read_tokenizer
from pipeline.backbone.fingerprint import identify
from pipeline.backbone.host import Backbone, compute_dtype, host_backbone
from pipeline.backbone.loading import build_skeleton
from pipeline.backbone.weights import open_weights
from pipeline.bank import BackboneId


class ServedText(Protocol):
    """What turning rows into tokens needs of a model, wherever its weights are held."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def identity(self) -> BackboneId: ...
    @property
    def architecture(self) -> Architecture: ...
    @property
    def embedding_rows(self) -> int: ...


@dataclass(frozen=True)
class ServedBackbone:
    """A frozen model ready to answer, and the identity that its prompts must have."""

    backbone: Backbone
    tokenizer: Any
    identity: BackboneId

    @cached_property
    def architecture(self) -> Architecture:
        return self.backbone.architecture

    @cached_property
    def embedding_rows(self) -> int:
        return self.backbone.embedding_rows

    @property
    def context(self) -> int | None:
        """Most tokens of prompt, input and answer together; None where positions are relative (T5)."""
        return context_length(self.backbone.config)


def load_backbone(
    model: str, weights: str = "int8", device: str = "cpu", dtype: str = "auto", products: str = "auto"
) -> ServedBackbone:
    """Load a whole model into this process: a folder, hub name, .gguf file or packaged name.

    `weights` is "int8" or "full", as the prompts were tuned on; `dtype` is the type of activations.
    `products` tells how int8 layers multiply (`int8.set_products`): `exact`, by floats; `int16`, which rounds
    activations to 1 of 20,000 to 60,000 steps and is faster on a CPU; `int8`, which rounds them to 1 of 255; `auto`,
    which is int16 where the processor has it and exact elsewhere.
    Raises: BackboneError when it cannot be loaded.
    """
    files = find_model(model)
    config, tokenizer = read_config(files), read_tokenizer(files)
    check_eos(files.name, config, tokenizer)
    identity = identify(model, config, tokenizer, open_weights(files, build_skeleton(config, False)), weights)
    place = torch.device(device)
    backbone = host_backbone(
        files,
        config,
        int8=weights == "int8",
        dtype=compute_dtype(dtype, place),
        device=place,
        sharded=False,
        products="int16" if products == "auto" else products,
    )
    return ServedBackbone(backbone, tokenizer, identity)
