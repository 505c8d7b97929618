"""Shapes of published models: their configurations without their weights."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, MistralConfig, PretrainedConfig, T5Config

from pipeline.backbone.files import architecture_of
from pipeline.errors import BackboneError

_T5 = {
    "vocab_size": 32_128,
    "d_kv": 64,
    "num_layers": 24,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
    "decoder_start_token_id": 0,
}
_LLAMA_3 = {"vocab_size": 128_256, "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "head_dim": 128}
_LLAMA_2 = {"vocab_size": 32_000, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "tie_word_embeddings": False}
_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    # google/t5-v1_1-base, -large, -xl and -xxl, as the LM-adapted checkpoints of Lester et al. (2021)
    "t5-base": (T5Config, {**_T5, "d_model": 768, "d_ff": 2048, "num_heads": 12, "num_layers": 12}),
    "t5-large": (T5Config, {**_T5, "d_model": 1024, "d_ff": 2816, "num_heads": 16}),
    "t5-xl": (T5Config, {**_T5, "d_model": 2048, "d_ff": 5120, "num_heads": 32}),
    "t5-xxl": (T5Config, {**_T5, "d_model": 4096, "d_ff": 10_240, "num_heads": 64}),
    # meta-llama/Llama-3.2-3B
    "llama-3b": (
        LlamaConfig,
        {
            **_LLAMA_3,
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    # meta-llama/Llama-2-7b-hf, -13b-hf and -70b-hf
    "llama-7b": (LlamaConfig, {**_LLAMA_2, **_7B, "intermediate_size": 11_008}),
    "llama-13b": (
        LlamaConfig,
        {
            **_LLAMA_2,
            "hidden_size": 5120,
            "intermediate_size": 13_824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
        },
    ),
    "llama-70b": (
        LlamaConfig,
        {
            **_LLAMA_2,
            "hidden_size": 8192,
            "intermediate_size": 28_672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
    ),
    # meta-llama/Meta-Llama-3-8B
    "llama-8b": (
        LlamaConfig,
        {
            **_LLAMA_3,
            **_7B,
            "intermediate_size": 14_336,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
    ),
    # mistralai/Mistral-7B-v0.1
    "mistral-7b": (
        MistralConfig,
        {
            **_7B,
            "vocab_size": 32_000,
            "intermediate_size": 14_336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
        },
    ),
}
SHAPES = tuple(_SHAPES)


def published_config(shape: str, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a published model by its short name, or of a config.json, with fewer layers if asked for.

    Raises: BackboneError when there is no such shape, or its family is not supported.
    """
    if shape in _SHAPES:
        config_type, values = _SHAPES[shape]
        config = config_type(**values)
    elif Path(shape).is_file():
        try:
            raw = json.loads(Path(shape).read_text())
            config = AutoConfig.for_model(raw.pop("model_type"), **raw)
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BackboneError(f"{shape} cannot be read as a model's config.json: {error}") from error
        architecture_of(config, shape)
    else:
        raise BackboneError(f"shape {shape}: no such file, and no known shape; known: {', '.join(SHAPES)}")
    if layers is not None:
        config.num_hidden_layers = layers
        if config.is_encoder_decoder:
            config.num_decoder_layers = layers
    return config
