"""Tiny configurations of decoder-only families: windows, soft caps, experts, states, latent attention and others."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import VOCAB, make_tokenizer

WINDOW = 6
"""Shorter than the rows of the tests."""
_LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_PLAIN: dict[str, Any] = {k: v for k, v in _LLAMA.items() if k != "head_dim"}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_GEMMA4: dict[str, Any] = {
    **_LLAMA,
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": WINDOW,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCAB,
    "use_double_wide_mlp": False,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "qwen3": ("qwen3", _LLAMA),
    "mistral_window": ("mistral", {**_LLAMA, "sliding_window": WINDOW}),
    "gemma": ("gemma", _LLAMA),
    "gemma2": (
        "gemma2",
        {
            **_LLAMA,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 3.0,
            "attn_logit_softcapping": 2.0,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **_LLAMA,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma3_multimodal": (
        "gemma3",
        {
            "text_config": {
                **_LLAMA,
                "sliding_window": WINDOW,
                "query_pre_attn_scalar": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "vocab_size": VOCAB,
            },
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
            "boi_token_index": 4,
            "eoi_token_index": 5,
        },
    ),
    "gemma3n_text": (
        "gemma3n_text",
        {
            **_LLAMA,
            "sliding_window": WINDOW,
            "intermediate_size": 64,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 2,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
            "altup_num_inputs": 2,
        },
    ),
    "gemma4_text": ("gemma4_text", _GEMMA4),
    "gemma4_text_per_layer": (
        "gemma4_text",
        {
            **_GEMMA4,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
        },
    ),
    "gemma4_text_experts": (
        "gemma4_text",
        {**_GEMMA4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    "qwen2_moe": ("qwen2_moe", {**_PLAIN, **_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3_moe": ("qwen3_moe", {**_LLAMA, **_EXPERTS}),
    "qwen3_next": (
        "qwen3_next",
        {
            **_LLAMA,
            **_EXPERTS,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "qwen3_5_text": (
        "qwen3_5_text",
        {
            **_LLAMA,
            "head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
            },
        },
    ),
    "qwen3_5_multimodal": (
        "qwen3_5",
        {
            "text_config": {
                **_LLAMA,
                "head_dim": 16,
                "vocab_size": VOCAB,
                "layer_types": ["linear_attention", "full_attention"],
                "linear_num_value_heads": 4,
                "linear_num_key_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [1, 1, 0],
                    "partial_rotary_factor": 0.25,
                    "mrope_interleaved": True,
                },
            },
            "vision_config": {
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
            },
            "image_token_id": 3,
            "video_token_id": 4,
            "vision_start_token_id": 5,
            "vision_end_token_id": 6,
        },
    ),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text",
        {
            **_LLAMA,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 0],
                "partial_rotary_factor": 0.25,
                "mrope_interleaved": True,
            },
        },
    ),
    "llama4_text": (
        "llama4_text",
        {
            **_LLAMA,
            "intermediate_size_mlp": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "attention_chunk_size": WINDOW,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            **_LLAMA,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "phi": ("phi", _PLAIN),
    "phi3": ("phi3", {**_PLAIN, "sliding_window": None}),
    "phi3_window": ("phi3", {**_PLAIN, "sliding_window": WINDOW}),
    "phimoe": ("phimoe", {**_PLAIN, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "olmo2": ("olmo2", _PLAIN),
    "olmo3": ("olmo3", {**_PLAIN, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}),
    "olmoe": ("olmoe", {**_PLAIN, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite": (
        "granite",
        {
            **_PLAIN,
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
        },
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **_PLAIN,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 16,
            "layer_types": ["mamba", "attention"],
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "mamba_n_heads": 8,
            "mamba_d_state": 8,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 16,
        },
    ),
    "smollm3": ("smollm3", {**_PLAIN, "no_rope_layers": [1, 0], "use_sliding_window": False}),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_PLAIN,
            "num_key_value_heads": 4,
            **_LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "glm4": ("glm4", _LLAMA),
    "glm4_moe": (
        "glm4_moe",
        {
            **_LLAMA,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "n_shared_experts": 1,
        },
    ),
    "glm4_moe_lite": (
        "glm4_moe_lite",
        {
            **_PLAIN,
            "num_key_value_heads": 4,
            **_LATENT,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
        },
    ),
    "mixtral": ("mixtral", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "ministral3": ("ministral3", {**_LLAMA, "sliding_window": None}),
    "ministral": (
        "ministral",
        {**_LLAMA, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "falcon_parallel": (
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": False,
            "multi_query": True,
            "parallel_attn": True,
            "new_decoder_architecture": False,
            "bias": False,
        },
    ),
    "falcon_alibi": (
        "falcon",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "new_decoder_architecture": False,
            "bias": True,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_PLAIN,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_d_state": 8,
            "mamba_chunk_size": 16,
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt_neox": (
        "gpt_neox",
        {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
        },
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 256,
        },
    ),
    "gptj": ("gptj", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4}),
    "opt": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 32,
        },
    ),
    "opt_projected": (
        "opt",
        {
            "hidden_size": 32,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "word_embed_proj_dim": 16,
            "do_layer_norm_before": False,
        },
    ),
    "bloom": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}),
    "gpt_bigcode": ("gpt_bigcode", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "cohere": ("cohere", _PLAIN),
    "cohere2": (
        "cohere2",
        {**_PLAIN, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "starcoder2": ("starcoder2", {**_PLAIN, "sliding_window": None}),
    "stablelm": ("stablelm", _PLAIN),
    "codegen": (
        "codegen",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 4, "n_ctx": 256},
    ),
    "mamba": ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "mamba2": (
        "mamba2",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    "nemotron": ("nemotron", _LLAMA),
    "nemotron_h": (
        "nemotron_h",
        {
            **_LLAMA,
            "layers_block_type": ["mamba", "attention"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "n_groups": 1,
            "ssm_state_size": 8,
            "chunk_size": 16,
        },
    ),
    "exaone4": (
        "exaone4",
        {**_PLAIN, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "lfm2": ("lfm2", {**_PLAIN, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", _LLAMA),
    "ernie4_5": ("ernie4_5", _LLAMA),
    "seed_oss": ("seed_oss", _LLAMA),
    "apertus": ("apertus", _PLAIN),
    "arcee": ("arcee", _LLAMA),
    "helium": ("helium", _LLAMA),
    "minimax_m2": ("minimax_m2", {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "jamba": (
        "jamba",
        {
            **_PLAIN,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
}
FAMILIES = sorted(CONFIGS)
WITH_EXPERTS = [
    "deepseek_v3",
    "gemma4_text_experts",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt_oss",
    "granitemoehybrid",
    "jamba",
    "llama4_text",
    "minimax_m2",
    "mixtral",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_moe_text",
    "qwen3_moe",
    "qwen3_next",
]
"""Families whose experts are one tensor of three sides."""


def make_config(family: str, **changes: Any) -> PretrainedConfig:
    kind, sizes = CONFIGS[family]
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if "text_config" not in sizes:
        ids["vocab_size"] = VOCAB
    return CONFIG_MAPPING[kind](**{**ids, **sizes, **changes})


def make_decoder(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of a family, with its tokenizer, as from a hub: under the names that a hub's files have."""
    config = make_config(family, **changes)
    auto = AutoModelForImageTextToText if config.get_text_config() is not config else AutoModelForCausalLM
    torch.manual_seed(seed)
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name or "correction_bias" in name:
                parameter.normal_()
            elif parameter.dim() == 1 and name.endswith("norm.weight"):  # norms of ones would show nothing
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.dim() >= 2 and "embed" not in name:
                parameter.mul_(3.0)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:  # which experts a token goes to
                buffer.normal_()
    model.save_pretrained(folder)
    make_tokenizer(eos_template=False).save_pretrained(folder)
    return folder
