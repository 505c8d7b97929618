"""The backbone's fingerprint, which says where a prompt belongs: config, tokenizer, weights and quantisation."""

import hashlib
from typing import Any

from transformers import PretrainedConfig

from pipeline.backbone.files import architecture_of, canonical_config
from pipeline.backbone.loading import build_skeleton, input_width
from pipeline.backbone.weights import WeightSource, weights_digest
from pipeline.bank import BackboneId

QUANTIZATION = {"int8": "int8 rows absmax", "full": "none"}


def weights_setting(backbone: BackboneId) -> str:
    """The value of the setting `model.weights` that gives this backbone."""
    return next(setting for setting, name in QUANTIZATION.items() if name == backbone.quantization)


def tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the fast tokenizer's whole definition and its special tokens."""
    definition = tokenizer.backend_tokenizer.to_str() + repr(sorted(tokenizer.special_tokens_map.items()))
    return hashlib.sha256(definition.encode()).hexdigest()


def identify(name: str, config: PretrainedConfig, tokenizer: Any, source: WeightSource, weights: str) -> BackboneId:
    """Read every weight once and name the backbone that prompts tuned on it belong to."""
    parts = {
        "config": hashlib.sha256(canonical_config(config).encode()).hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer),
        "weights": weights_digest(source),
        "quantization": QUANTIZATION[weights],
    }
    joined = "\n".join(f"{key} {value}" for key, value in sorted(parts.items()))
    return BackboneId(
        fingerprint=hashlib.sha256(joined.encode()).hexdigest(),
        model=name,
        architecture=architecture_of(config),
        hidden_size=input_width(build_skeleton(config, int8=False)),
        **parts,
    )
