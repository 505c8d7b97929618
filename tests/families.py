"""One tiny random model of every kind of decoder that transformers has: windows, experts, states, odd heads.

Windows and chunks are shorter than the rows of tests, so that a rule which is not kept shows.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.tiny import VOCAB, make_tokenizer

WINDOW = 6

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DENSE = {**_SIZES, "intermediate_size": 64, "num_key_value_heads": 2, "max_position_embeddings": 256}
_HEADS_OF_8 = {**_DENSE, "head_dim": 8}
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
_MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
_GEMMA = {**_HEADS_OF_8, **_MIXED, "query_pre_attn_scalar": 8}
_GEMMA_4 = {
    **_HEADS_OF_8,
    **_MIXED,
    "global_head_dim": 8,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "vocab_size_per_layer_input": VOCAB,
    "use_double_wide_mlp": False,
}
_DELTA = {
    **_HEADS_OF_8,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_QWEN_3_5 = {
    **_DELTA,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [1, 1, 0],
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
    },
}
_FALCON = {**_SIZES, "new_decoder_architecture": False}
_GRANITE = {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
_MAMBA_2 = {"mamba_n_heads": 8, "mamba_d_state": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}


@dataclass(frozen=True)
class Family:
    kind: str
    """transformers' `model_type`."""
    sizes: dict[str, Any]
    way: str = "packed"
    """How its rows run."""
    text_of: dict[str, Any] = field(default_factory=dict)
    """What a model that also sees has beside the text model that `sizes` describes."""


DECODERS = {
    "llama": Family("llama", _DENSE),
    "mistral, window": Family("mistral", {**_DENSE, "sliding_window": WINDOW}),
    "ministral, windows": Family("ministral", {**_HEADS_OF_8, **_MIXED}),
    "ministral3": Family("ministral3", {**_HEADS_OF_8, "sliding_window": None}),
    "mixtral": Family("mixtral", {**_HEADS_OF_8, **_LOCAL_EXPERTS, "sliding_window": None}),
    "qwen2": Family("qwen2", _DENSE),
    "qwen2_moe": Family("qwen2_moe", {**_DENSE, **_EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3": Family("qwen3", _HEADS_OF_8),
    "qwen3_moe": Family("qwen3_moe", {**_HEADS_OF_8, **_EXPERTS}),
    "qwen3_next": Family("qwen3_next", {**_DELTA, **_EXPERTS, "shared_expert_intermediate_size": 16}, "padded"),
    "qwen3_5_text": Family("qwen3_5_text", _QWEN_3_5, "padded"),
    "qwen3_5_moe_text": Family(
        "qwen3_5_moe_text", {**_QWEN_3_5, **_EXPERTS, "shared_expert_intermediate_size": 16}, "padded"
    ),
    "gemma": Family("gemma", _HEADS_OF_8),
    "gemma2, caps": Family("gemma2", {**_GEMMA, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3_text": Family("gemma3_text", _GEMMA),
    "gemma3, with vision": Family(
        "gemma3",
        {**_GEMMA, "vocab_size": VOCAB},
        text_of={
            "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
            | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
            "boi_token_index": 4,
            "eoi_token_index": 5,
        },
    ),
    "gemma3n_text": Family(
        "gemma3n_text",
        {
            **_HEADS_OF_8,
            **_MIXED,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0, 0.0],
            "altup_num_inputs": 2,
        },
    ),
    "gemma4_text": Family("gemma4_text", _GEMMA_4),
    "gemma4_text, inputs of layers": Family(
        "gemma4_text",
        {
            **_GEMMA_4,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "layer_types": _MIXED["layer_types"] * 2,
            "num_kv_shared_layers": 2,
        },
    ),
    "gemma4_text, experts": Family(
        "gemma4_text",
        {**_GEMMA_4, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
    ),
    "llama4_text, chunks": Family(
        "llama4_text",
        {**_HEADS_OF_8, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1}
        | {
            "attention_chunk_size": WINDOW,
            "moe_layers": [1],
            "no_rope_layers": [1, 0],
            "attn_temperature_tuning": False,
        },
    ),
    "llama4_text, scaled by place": Family(
        "llama4_text",
        {**_HEADS_OF_8, "intermediate_size_mlp": 64, "num_local_experts": 4, "num_experts_per_tok": 1}
        | {"attention_chunk_size": 4096, "moe_layers": [1], "no_rope_layers": [1, 0], "floor_scale": 40},
        "padded",
    ),
    "gpt_oss, sinks": Family(
        "gpt_oss",
        {**_HEADS_OF_8, **_LOCAL_EXPERTS, **_MIXED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    "phi": Family("phi", _DENSE),
    "phi3": Family("phi3", {**_DENSE, "sliding_window": None}),
    "phi3, window": Family("phi3", {**_DENSE, "sliding_window": WINDOW}),
    "phimoe": Family("phimoe", {**_DENSE, **_LOCAL_EXPERTS, "sliding_window": None}),
    "olmo2": Family("olmo2", _DENSE),
    "olmo3, windows": Family("olmo3", {**_DENSE, **_MIXED}),
    "olmoe": Family("olmoe", {**_DENSE, "num_experts": 4, "num_experts_per_tok": 2}),
    "granite": Family("granite", {**_DENSE, **_GRANITE}),
    "granitemoehybrid": Family(
        "granitemoehybrid",
        {**_DENSE, **_LOCAL_EXPERTS, **_GRANITE, **_MAMBA_2}
        | {"shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]},
        "padded",
    ),
    "smollm3": Family("smollm3", {**_DENSE, "no_rope_layers": [1, 0], "use_sliding_window": False}),
    "deepseek_v3": Family(
        "deepseek_v3",
        {**_DENSE, **_LATENT, **_ROUTED, "num_key_value_heads": 4, "n_group": 2}
        | {"first_k_dense_replace": 1, "n_shared_experts": 1},
    ),
    "glm4": Family("glm4", _HEADS_OF_8),
    "glm4_moe": Family("glm4_moe", {**_HEADS_OF_8, **_ROUTED, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "glm4_moe_lite": Family(
        "glm4_moe_lite", {**_DENSE, **_LATENT, **_ROUTED, "num_key_value_heads": 4, "n_shared_experts": 1}
    ),
    "falcon, rotary": Family("falcon", {**_FALCON, "multi_query": True, "bias": False}, "shared"),
    "falcon, alibi": Family(
        "falcon", {**_FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}, "padded"
    ),
    "falcon_h1": Family(
        "falcon_h1",
        {**_DENSE, **_MAMBA_2, "mamba_d_ssm": 32, "mamba_n_heads": 4, "embedding_multiplier": 3.0},
        "padded",
    ),
    "gpt2": Family("gpt2", _GPT),
    "gpt_bigcode": Family("gpt_bigcode", _GPT),
    "gptj": Family("gptj", {**_GPT, "rotary_dim": 4}, "shared"),
    "codegen": Family("codegen", {**_GPT, "rotary_dim": 4, "n_ctx": 256}, "shared"),
    "gpt_neo, window": Family(
        "gpt_neo",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 256}
        | {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        "padded",
    ),
    "gpt_neox": Family("gpt_neox", {**_SIZES, "intermediate_size": 64, "max_position_embeddings": 256}),
    "opt": Family("opt", {**_SIZES, "ffn_dim": 64, "max_position_embeddings": 256, "word_embed_proj_dim": 32}),
    "opt, narrow embeddings": Family(
        "opt",
        {**_SIZES, "ffn_dim": 64, "max_position_embeddings": 256, "word_embed_proj_dim": 16}
        | {"do_layer_norm_before": False},
    ),
    "bloom": Family("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, "padded"),
    "mpt": Family("mpt", {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 256}, "padded"),
    "cohere": Family("cohere", _DENSE),
    "cohere2, windows": Family("cohere2", {**_DENSE, **_MIXED}),
    "starcoder2": Family("starcoder2", {**_DENSE, "sliding_window": None}),
    "stablelm": Family("stablelm", _DENSE),
    "mamba": Family("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}, "padded"),
    "mamba2": Family(
        "mamba2",
        {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8}
        | {"n_groups": 1, "chunk_size": 4},
        "padded",
    ),
    "nemotron": Family("nemotron", _HEADS_OF_8),
    "nemotron_h": Family(
        "nemotron_h",
        {**_HEADS_OF_8, "layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8}
        | {"n_groups": 1, "ssm_state_size": 8, "chunk_size": 4},
        "padded",
    ),
    "exaone4, windows": Family("exaone4", {**_DENSE, **_MIXED}),
    "lfm2": Family("lfm2", {**_DENSE, "layer_types": ["conv", "full_attention"], "block_ff_dim": 64}, "padded"),
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", _HEADS_OF_8),
    "ernie4_5": Family("ernie4_5", _HEADS_OF_8),
    "seed_oss": Family("seed_oss", _HEADS_OF_8),
    "apertus": Family("apertus", _DENSE),
    "arcee": Family("arcee", _HEADS_OF_8),
    "helium": Family("helium", _HEADS_OF_8),
    "minimax_m2": Family("minimax_m2", {**_HEADS_OF_8, **_LOCAL_EXPERTS}),
    "jamba": Family(
        "jamba",
        {**_DENSE, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 4}
        | {"use_mamba_kernels": False},
        "padded",
    ),
}


def make_decoder(folder: Path, family: Family, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of the family, whose outputs differ clearly between inputs, with a tokenizer.

    It is saved under the names that a hub's files have. `changes` are sizes in place of the family's own.
    """
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if family.text_of:
        config = CONFIG_MAPPING[family.kind](text_config=dict(family.sizes), **family.text_of, **ids)
    else:
        config = CONFIG_MAPPING[family.kind](**{**family.sizes, **ids, "vocab_size": VOCAB, **changes})
    torch.manual_seed(seed)
    model = (AutoModelForImageTextToText if family.text_of else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and "norm" in name:  # as trained ones are: not all alike
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "sinks" in name:
                parameter.normal_()
            elif parameter.dim() >= 2 and "embed" not in name:
                parameter.mul_(3.0)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:  # which experts a token goes to
                buffer.normal_()
        model.get_input_embeddings().weight[0].normal_(std=0.02)  # zeros have no direction, which some families ask for
    model.save_pretrained(folder)
    make_tokenizer(eos_template=False).save_pretrained(folder)
    return folder
