"""GGUF files of tiny models, written by the gguf library's own writer with llama.cpp's names and layout."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

_PERMUTED = (".attn_q.", ".attn_k.")
_TURNED = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")


def open_model(folder: Path) -> Any:
    """The model of a safetensors folder as transformers loads it, in float32."""
    auto = AutoModelForSeq2SeqLM if '"t5"' in (folder / "config.json").read_text() else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def write_gguf(
    path: Path,
    model: Any,
    arch: str,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    pre: str | None = "gpt-2",
    leave_out: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> Path:
    """Write a transformers model as llama.cpp's converter does; `keys` are written below `arch.`, or with a dot first
    as they are; keys `without` and tensors to `leave_out` are not."""
    config = model.config
    writer = gguf.GGUFWriter(path, arch)
    fields: dict[str, Any] = {"vocab_size": config.vocab_size, **_shape(config, arch), **(keys or {})}
    for key, value in fields.items():
        if key in without:
            continue
        _add(writer, key.removeprefix(".") if key.startswith(".") else f"{arch}.{key}", value)
    _write_tokenizer(writer, config.vocab_size, pre)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    written = set()
    # T5 1.1's output layer is stored apart: its answers are not scaled as those of a tied one.
    apart = arch == "t5" and not config.scale_decoder_outputs
    for name, parameter in model.named_parameters(remove_duplicate=not apart):
        stem, _, suffix = name.rpartition(".")
        place = f"{names.get_name(stem)}.{suffix}"
        if place in written or any(part in place for part in leave_out):
            continue
        written.add(place)
        writer.add_tensor(place, _laid_out(parameter.detach().numpy(), place, arch, config))
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shape(config: Any, arch: str) -> dict[str, Any]:
    if arch == "gpt2":
        return {
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "feed_forward_length": 4 * config.n_embd,
            "block_count": config.n_layer,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
        }
    if arch == "t5":
        return {
            "context_length": 512,
            "embedding_length": config.d_model,
            "feed_forward_length": config.d_ff,
            "block_count": config.num_layers,
            "attention.head_count": config.num_heads,
            "attention.key_length": config.d_kv,
            "attention.value_length": config.d_kv,
            "attention.layer_norm_epsilon": config.layer_norm_epsilon,
            "attention.layer_norm_rms_epsilon": config.layer_norm_epsilon,
            "attention.relative_buckets_count": config.relative_attention_num_buckets,
            "decoder_start_token_id": config.decoder_start_token_id,
        }
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"]),
        **({"rope.dimension_count": size} if arch == "llama" else {}),
        **({"attention.key_length": size, "attention.value_length": size} if arch in ("qwen3", "gemma3") else {}),
        **({"attention.sliding_window": config.sliding_window} if arch == "gemma3" else {}),
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)


def _write_tokenizer(writer: gguf.GGUFWriter, size: int, pre: str | None) -> None:
    letters = [chr(33 + i) for i in range(size - 2)]
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*letters, '!"', "<eos>"])
    writer.add_token_types([1] * (len(letters) + 1) + [3])
    writer.add_token_merges(['! "'])
    writer.add_eos_token_id(size - 1)


def _laid_out(array: np.ndarray, place: str, arch: str, config: Any) -> np.ndarray:
    if arch == "llama" and any(part in place for part in _PERMUTED):
        heads = config.num_attention_heads if ".attn_q." in place else config.num_key_value_heads
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        array = halves.swapaxes(1, 2).reshape(array.shape)
    if arch == "gpt2" and place.endswith(_TURNED):
        array = array.T
    if arch == "gemma3" and "norm" in place:
        array = array + 1
    return np.ascontiguousarray(array)
