"""Tiny configurations of encoder-decoder families, each with what makes it differ from the others: windows, blocks,
experts, soft caps, scaled embeddings and heads."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import VOCAB, make_tokenizer

WINDOW = 6
"""Shorter than the rows of the tests, as radius of attention, length of blocks and width of windows."""
_T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 2,
    "scale_embedding": True,
    "init_std": 0.2,
}
_GEMMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "bos_token_id": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_CAPS = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_PROPHET = {
    "hidden_size": 32,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "init_std": 0.2,
    "max_position_embeddings": 256,
    "decoder_start_token_id": 1,
}
_EXPERTS = {"num_experts": 4, "expert_capacity": 64}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5_tied": ("t5", {**_T5, "tie_word_embeddings": True}),
    "mt5": ("mt5", {**_T5, "tie_word_embeddings": False}),
    "umt5": ("umt5", _T5),
    "longt5_local": ("longt5", {**_T5, "local_radius": WINDOW, "encoder_attention_type": "local"}),
    "longt5_tglobal": (
        "longt5",
        {**_T5, "local_radius": WINDOW, "encoder_attention_type": "transient-global", "global_block_size": 4},
    ),
    "switch": (
        "switch_transformers",
        {**_T5, **_EXPERTS, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_decoder_layers": 2},
    ),
    "switch_full": (
        "switch_transformers",
        {
            **_T5,
            **_EXPERTS,
            "expert_capacity": 2,
            "num_sparse_encoder_layers": 1,
            "num_sparse_decoder_layers": 1,
            "num_decoder_layers": 2,
        },
    ),
    "bart": ("bart", _BART),
    "mbart": ("mbart", _BART),
    "plbart": ("plbart", _BART),
    "blenderbot": ("blenderbot", _BART),
    "blenderbot_small": ("blenderbot-small", _BART),
    "m2m_100": ("m2m_100", _BART),
    "nllb_moe": (
        "nllb-moe",
        # Not its usual relu: where an input is near 0, its gradient is all or nothing by the last bit.
        {**_BART, **_EXPERTS, "activation_function": "gelu", "encoder_sparse_step": 2, "decoder_sparse_step": 2},
    ),
    "marian": ("marian", _BART),
    "pegasus": ("pegasus", _BART),
    "pegasus_x": ("pegasus_x", {**_BART, "block_size": 8, "num_global_tokens": 4}),
    "bigbird_pegasus": ("bigbird_pegasus", {**_BART, "attention_type": "original_full"}),
    "bigbird_pegasus_sparse": (
        "bigbird_pegasus",
        {**_BART, "attention_type": "block_sparse", "block_size": 4, "num_random_blocks": 1},
    ),
    "led": (
        "led",
        {
            **{key: value for key, value in _BART.items() if key not in ("max_position_embeddings", "scale_embedding")},
            "max_encoder_position_embeddings": 256,
            "max_decoder_position_embeddings": 256,
            "attention_window": 4,
        },
    ),
    "mvp": ("mvp", _BART),
    "prophetnet": ("prophetnet", _PROPHET),
    "t5gemma": (
        "t5gemma",
        {
            "encoder": {**_GEMMA, **_CAPS},
            "decoder": {**_GEMMA, **_CAPS, "cross_attention_hidden_size": 32},
            "decoder_start_token_id": 2,
        },
    ),
    "t5gemma2": (
        "t5gemma2",
        {
            "encoder": {
                "text_config": _GEMMA,
                "vision_config": _VISION,
                "mm_tokens_per_image": 4,
                "image_token_index": 41,
                "boi_token_index": 39,
                "eoi_token_index": 40,
            },
            "decoder": _GEMMA,
            "image_token_index": 41,
            "eoi_token_index": 40,
            "decoder_start_token_id": 2,
        },
    ),
}
FACTORS = {"pegasus": 32**0.5, "marian": 32**0.5, "blenderbot_small": 32**0.5, "mvp": 32**0.5}
"""What a family multiplies the embeddings of ids by, outside its embedding module."""
FAMILIES = sorted(CONFIGS)


def make_config(family: str, **changes: Any) -> PretrainedConfig:
    kind, sizes = CONFIGS[family]
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if "encoder" not in sizes:
        ids["vocab_size"] = VOCAB
    return CONFIG_MAPPING[kind](**{**ids, **sizes, **changes})


def make_seq2seq(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of a family, with its tokenizer, as from a hub."""
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(make_config(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # norms and biases that leave numbers as they are would show nothing
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif CONFIGS[family][0].startswith("t5gemma") and "embed" not in name:
                parameter.mul_(5.0)
        if hasattr(model, "final_logits_bias"):
            model.final_logits_bias.normal_()
    model.save_pretrained(folder)
    make_tokenizer(eos_template=True).save_pretrained(folder)
    return folder
