"""A GGUF file's metadata that decides the output: it is applied to the configuration, or refused by name.

transformers reads some of the keys and ignores the others. What is applied here stands in the configuration, and so in
the fingerprint. A key of the architecture that is not known to be harmless is refused: its name does not say what it
changes, nobody reads a warning in a nightly job, and there is a way out, the model's safetensors folder.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from pipeline.errors import BackboneError

_log = logging.getLogger(__name__)

ROPE_FACTORS = "rope_freqs.weight"
"""Llama 3's tensor of divisors, one for each rotary frequency."""

_APPLIED = {
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
}
_ROTARY = {
    "attention.layer_norm_rms_epsilon",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scale_linear",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_APPLIED_BY = {
    "llama": _APPLIED | _ROTARY,
    "qwen2": _APPLIED | _ROTARY,
    "qwen3": _APPLIED | _ROTARY,
    "gemma3": _APPLIED
    | _ROTARY
    | {"attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"},
    "gpt2": _APPLIED | {"attention.layer_norm_epsilon"},
    "t5": _APPLIED
    | {
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.relative_buckets_count",
        "decoder_start_token_id",
        "decoder_block_count",
    },
}
ROTARY_FAMILIES = ("llama", "qwen2", "qwen3")
"""Values of `general.architecture` whose models rotate positions; Mistral's files say llama."""
# These do not matter for the next token, or are the converter's notes.
_HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout", "pooling_type"}
# Keys that change nothing at these values, and much at any other value.
_OFF: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}
_LAYERS_OF_GEMMA_3_27B = 62
# Values of tokenizer.ggml.pre that mean GPT-2's split, which transformers uses where it does not know the name.
_AS_GPT2 = {"gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4", "mellum", "a.x-4.0"}


@contextmanager
def quick_gguf_reader() -> Iterator[None]:
    """Let whoever reads a GGUF file meanwhile, transformers included, use the gguf library's reader, but quickly.

    It makes two arrays of each word of a vocabulary. As parts of a mapped file, as it has them, they take many times as
    long as ordinary arrays (half a minute for 262,144 words, and a start reads a file three times).
    """
    import gguf

    usual = gguf.GGUFReader
    gguf.GGUFReader = _quick_reader()
    try:
        yield
    finally:
        gguf.GGUFReader = usual


@cache
def _quick_reader() -> Any:
    import gguf

    class Reader(gguf.GGUFReader):
        _data: Any

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = np.asarray(mapped)

    return Reader


def check_metadata(path: str) -> None:
    """Raises: BackboneError naming a key that decides the output and is not applied."""
    metadata, _ = _read(path)
    _refuse_other_files(metadata, path)
    family, values = _of_family(metadata)
    if family not in _APPLIED_BY:
        raise BackboneError(
            f"{path}: of GGUF files only {', '.join(_APPLIED_BY)} are read here, and its general.architecture is "
            f"'{family}'; give the model's safetensors folder instead"
        )
    for key, value in values.items():
        _refuse_unapplied(family, key, value, path)
    # llama.cpp puts a space before the text, and transformers' tokenizer of this family does not.
    if family == "gemma3" and metadata.get("tokenizer.ggml.add_space_prefix"):
        raise _cannot_apply(path, "tokenizer.ggml.add_space_prefix", True)


def complete_config(config: Any, path: str) -> None:
    """Apply to a configuration what transformers ignored when it read it from a GGUF file.

    Raises: BackboneError naming a key or tensor that decides the output and cannot be applied.
    """
    metadata, tensors = _read(path)
    family, values = _of_family(metadata)
    _apply_shapes(config, family, values, tensors, path)
    if family == "gemma3":
        _apply_windows(config, values, path)
    elif family in ROTARY_FAMILIES:
        _apply_rope(config, family, values, tensors, path)


def warn_of_unknown_split(path: str) -> None:
    """Warn where a byte-level vocabulary's own split of text is not known and GPT-2's is used in its place."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    metadata, _ = _read(path)
    split = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") == "gpt2" and split not in {*GGUF_PRE_TOKENIZER_SPLITS, *_AS_GPT2}:
        named = f"its split of text '{split}' is not known" if split else "it does not name its split of text"
        _log.warning(
            "%s: %s, so text is split as GPT-2 does it, and digits above all may come out as other tokens than the "
            "model was trained on; the model's safetensors folder has its own split",
            path,
            named,
        )


def _read(path: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    from transformers.integrations.gguf import read_gguf_metadata

    metadata: dict[str, Any]
    metadata, tensors = read_gguf_metadata(path)
    return metadata, tensors


def _of_family(metadata: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The architecture, and its keys without the architecture's name in front."""
    family = str(metadata["general.architecture"])
    start = f"{family}."
    return family, {key.removeprefix(start): value for key, value in metadata.items() if key.startswith(start)}


def _refuse_other_files(metadata: Mapping[str, Any], path: str) -> None:
    if metadata.get("split.count", 1) > 1:
        raise BackboneError(
            f"{path} is one of {metadata['split.count']} parts of a model (split.count); join them first: "
            "llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise BackboneError(f"{path} holds no model but a '{kind}' (general.type); give the model")


def _refuse_unapplied(family: str, key: str, value: Any, path: str) -> None:
    if key in _HARMLESS or (key in _OFF and value in _OFF[key]):
        return
    if key not in _APPLIED_BY[family]:
        raise _cannot_apply(path, f"{family}.{key}", value)
    if isinstance(value, list):
        raise BackboneError(
            f"{path}: {family}.{key} differs from layer to layer, and is one number in this model family; "
            "give the model's safetensors folder instead"
        )


def _cannot_apply(path: str, key: str, value: Any) -> BackboneError:
    return BackboneError(
        f"{path}: its key {key} = {value} may change the model's answers and is not applied here; "
        "give the model's safetensors folder instead"
    )


def _apply_shapes(config: Any, family: str, values: Mapping[str, Any], tensors: tuple[str, ...], path: str) -> None:
    if values.get("attention.value_length", values.get("attention.key_length")) != values.get("attention.key_length"):
        raise _cannot_apply(path, f"{family}.attention.value_length", values["attention.value_length"])
    if family == "gpt2":
        config.n_positions = values["context_length"]
        if values.get("feed_forward_length", 4 * config.n_embd) != 4 * config.n_embd:
            config.n_inner = values["feed_forward_length"]
        return
    if family == "t5":
        gated = any(".ffn_gate." in name for name in tensors)
        config.feed_forward_proj, config.dense_act_fn = ("gated-gelu", "gelu_new") if gated else ("relu", "relu")
        config.is_gated_act = gated
        config.num_decoder_layers = values.get("decoder_block_count", config.num_layers)
        config.layer_norm_epsilon = values.get("attention.layer_norm_rms_epsilon", config.layer_norm_epsilon)
        return
    config.num_key_value_heads = values.get("attention.head_count_kv", config.num_attention_heads)
    usual = config.hidden_size // config.num_attention_heads
    size = values.get("attention.key_length", values.get("rope.dimension_count", usual))
    if values.get("rope.dimension_count", size) != size:
        raise _cannot_apply(path, f"{family}.rope.dimension_count", values["rope.dimension_count"])
    if (getattr(config, "head_dim", None) or usual) != size:
        config.head_dim = size
    if config.model_type in ("llama", "qwen3") and any(
        name.endswith(f".attn_{part}.bias") for name in tensors for part in ("q", "k", "v", "output")
    ):
        config.attention_bias = True
    if config.model_type == "llama" and any(
        name.endswith(f".ffn_{part}.bias") for name in tensors for part in ("gate", "up", "down")
    ):
        config.mlp_bias = True


def _apply_windows(config: Any, values: Mapping[str, Any], path: str) -> None:
    """Gemma 3's layers, of which most have a window and rotate by frequencies of their own, as llama.cpp has them."""
    window, every = values.get("attention.sliding_window", 0), values.get("attention.sliding_window_pattern", 6)
    config.layer_types = [
        "sliding_attention" if window and (every == 0 or (layer + 1) % every) else "full_attention"
        for layer in range(config.num_hidden_layers)
    ]
    factor = values.get("rope.scaling.factor") or values.get("rope.scale_linear") or 1.0
    kind = values.get("rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise _cannot_apply(path, "gemma3.rope.scaling.type", kind)
    far: dict[str, Any] = {"rope_type": "default", "rope_theta": values.get("rope.freq_base", 10_000.0)}
    if kind == "linear" and factor != 1:
        far |= {"rope_type": "linear", "factor": factor}
    near = {"rope_type": "default", "rope_theta": values.get("rope.freq_base_swa", 10_000.0)}
    config.rope_parameters = {"full_attention": far, "sliding_attention": near}
    # No key says it: llama.cpp knows the one size whose scores are scaled otherwise by its number of layers.
    whole = config.num_hidden_layers == _LAYERS_OF_GEMMA_3_27B
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if whole else config.head_dim


def _apply_rope(config: Any, family: str, values: Mapping[str, Any], tensors: tuple[str, ...], path: str) -> None:
    """Scaling of the rotary frequencies, as llama.cpp computes it, in transformers' terms."""
    factor = values.get("rope.scaling.factor") or values.get("rope.scale_linear") or 1.0
    kind = values.get("rope.scaling.type", "linear")
    if config.rope_parameters["rope_theta"] != (base := values.get("rope.freq_base", 10_000.0)):
        _set_rope(config, rope_theta=base)
    factors = _rope_factors(path, config) if ROPE_FACTORS in tensors else np.ones(1)
    if kind not in ("none", "linear", "yarn") or (kind == "yarn" and (factors != 1).any()):
        raise _cannot_apply(path, f"{family}.rope.scaling.type", kind)
    if kind == "yarn" and factor != 1:
        betas = {beta: values.get(f"rope.scaling.yarn_{beta}") for beta in ("beta_fast", "beta_slow")}
        original = values.get("rope.scaling.original_context_length", values["context_length"])
        _set_rope(
            config,
            rope_type="yarn",
            factor=factor,
            original_max_position_embeddings=original,
            **{beta: value for beta, value in betas.items() if value is not None},
        )
    elif (factors != 1).any():
        # transformers' longrope divides each frequency by a number of its own; here at every length by the same one.
        scaled = [float(each) * (factor if kind == "linear" else 1.0) for each in factors]
        _set_rope(
            config,
            rope_type="longrope",
            factor=1.0,
            attention_factor=1.0,
            short_factor=scaled,
            long_factor=scaled,
            original_max_position_embeddings=config.max_position_embeddings,
        )
    elif kind == "linear" and factor != 1:
        _set_rope(config, rope_type="linear", factor=factor)


def _set_rope(config: Any, **parameters: Any) -> None:
    config.rope_parameters = {**config.rope_parameters, **parameters}


def _rope_factors(path: str, config: PretrainedConfig) -> np.ndarray:
    import gguf

    with quick_gguf_reader():
        tensor = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == ROPE_FACTORS)
    factors: np.ndarray = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if len(factors) != size // 2:
        raise BackboneError(
            f"{path}: its tensor {ROPE_FACTORS} has {len(factors)} numbers where {size // 2} frequencies are; "
            "fetch the model again, or give its safetensors folder"
        )
    return factors
