"""Tiny real models, made in the test: a folder with config, weights and fast tokenizer, as from a hub."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MT5Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

WORDS = [
    *[
        "good",
        "bad",
        "great",
        "awful",
        "film",
        "food",
        "fine",
        "poor",
        "plain",
        "story",
        "actor",
        "music",
        "red",
        "green",
        "blue",
        "one",
        "two",
        "three",
    ],
    *[
        "positive",
        "negative",
        "neutral",
        "yes",
        "no",
        "the",
        "a",
        "an",
        "is",
        "was",
        "not",
        "very",
        "it",
        "this",
        "that",
        "with",
        "and",
        "or",
        "of",
        "to",
        "in",
    ],
]
SPECIAL = ["<pad>", "</s>", "<unk>"]
VOCAB = len(SPECIAL) + len(WORDS)

_LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
_T5_LIKE = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (LlamaConfig, {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "llama_untied": (LlamaConfig, {**_LLAMA_LIKE, "tie_word_embeddings": False}),
    "mistral": (MistralConfig, {**_LLAMA_LIKE, "sliding_window": None}),
    "qwen2": (Qwen2Config, _LLAMA_LIKE),
    "qwen3": (Qwen3Config, {**_LLAMA_LIKE, "head_dim": 8}),
    "gpt2": (GPT2Config, {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "t5": (T5Config, {**_T5_LIKE, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5_tied": (T5Config, {**_T5_LIKE, "tie_word_embeddings": True}),
    "mt5": (MT5Config, {**_T5_LIKE, "tie_word_embeddings": False}),
}
FAMILIES = sorted(CONFIGS)


def make_tokenizer(eos_template: bool) -> PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if eos_template:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def make_model(folder: Path, family: str = "llama", seed: int = 0, scale: float = 3.0, **changes: Any) -> Path:
    """Save a random model whose outputs differ clearly between inputs (`scale` above the usual init)."""
    config_type, sizes = CONFIGS[family]
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    config = config_type(**{**sizes, **ids, **changes})
    torch.manual_seed(seed)
    seq2seq = config.is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed" not in name and "shared" not in name:
                parameter.mul_(scale)
    model.save_pretrained(folder)
    make_tokenizer(eos_template=seq2seq).save_pretrained(folder)
    return folder
