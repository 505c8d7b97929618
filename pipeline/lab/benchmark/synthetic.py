"""Checkpoints of any size with random weights, in the form of a hub's, for measurements without a download."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from pipeline.backbone.files import embedding_rows
from pipeline.backbone.loading import build_skeleton
from pipeline.errors import BackboneError, StorageError

SHARD_BYTES = 512 * 2**20
_SPECIAL = ("<pad>", "</s>", "<unk>")
_PAD, _EOS, _UNK = range(3)
_INDEX = "model.safetensors.index.json"


def write_checkpoint(
    config: PretrainedConfig,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write config, byte-level tokenizer and weights, as transformers saves them.

    Values depend only on the seed and a tensor's name, and are scaled for activations of about one. Little more than
    one shard is in memory at a time; a tensor that is larger than a shard has its own.
    Raises: BackboneError when the vocabulary is too small for bytes, StorageError when the disk is full.
    """
    tokenizer = byte_tokenizer(eos_template=bool(config.is_encoder_decoder))
    if (rows := embedding_rows(config)) < len(tokenizer):
        raise BackboneError(f"vocab_size {rows}: a byte-level tokenizer needs at least {len(tokenizer)}")
    skeleton = build_skeleton(config, int8=False)
    untied = not getattr(config, "scale_decoder_outputs", True)  # T5 1.1; transformers always ties in memory
    if untied:
        output = skeleton.get_output_embeddings()  # type: ignore[operator]
        output.weight = nn.Parameter(torch.empty_like(output.weight), requires_grad=False)
    parameters = dict(skeleton.named_parameters())
    wide = deviations(skeleton, config)
    shards = _shards({name: p.numel() * dtype.itemsize for name, p in parameters.items()}, shard_bytes)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "model.safetensors").exists():  # transformers would read it in place of the shards
            raise StorageError(f"{folder} holds another model already (model.safetensors); give a new folder")
        index: dict[str, str] = {}
        for place, names in enumerate(shards, 1):
            file = f"model-{place:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: _values(name, parameters[name], wide.get(name), dtype, seed) for name in names}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            index.update(dict.fromkeys(names, file))
        total = sum(p.numel() * dtype.itemsize for p in parameters.values())
        (folder / _INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1))
        tokenizer.save_pretrained(folder)
        ids = {"pad_token_id": _PAD, "eos_token_id": _EOS, "bos_token_id": None}
        known = {"architectures": [type(skeleton).__name__], "dtype": str(dtype).removeprefix("torch.")}
        described = {**config.to_dict(), **ids, **known, **({"tie_word_embeddings": False} if untied else {})}
        # Written last: a folder that has it is complete.
        (folder / "config.json").write_text(json.dumps(described, indent=1, default=str))
    except OSError as error:
        raise StorageError(f"cannot write the checkpoint to {folder}: {error}") from error


def byte_tokenizer(eos_template: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for every byte and three special ones; `eos_template` ends texts with `</s>`, as T5."""
    names = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], unk_token=_SPECIAL[_UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if eos_template:
        end = _SPECIAL[_EOS]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, _EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=_SPECIAL[_PAD], eos_token=_SPECIAL[_EOS], unk_token=_SPECIAL[_UNK]
    )


def _shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > most:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def deviations(skeleton: nn.Module, config: PretrainedConfig) -> dict[str, float]:
    """Standard deviation of every matrix: 1 / root of its inputs. Vectors (norms, biases) have none.

    T5 does not scale its dot products, so its queries are made smaller.
    """
    found = {}
    for module_name, module in skeleton.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() == 2:
                inputs = parameter.shape[0 if isinstance(module, Conv1D) else 1]
                if config.model_type in ("t5", "mt5") and module_name.endswith(".q"):
                    inputs *= config.d_kv
                found[f"{module_name}.{key}"] = float(inputs**-0.5)
    return found


def _values(name: str, like: Tensor, deviation: float | None, dtype: torch.dtype, seed: int) -> Tensor:
    if deviation is None:
        return torch.zeros(like.shape, dtype=dtype) if name.endswith("bias") else torch.ones(like.shape, dtype=dtype)
    own = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:7])
    edge = 3**0.5 * deviation  # uniform numbers are drawn two times faster than normal ones
    return torch.empty(like.shape, dtype=dtype).uniform_(-edge, edge, generator=torch.Generator().manual_seed(own))
