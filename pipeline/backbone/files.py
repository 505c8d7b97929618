"""Where a model's files are: a folder, a hub name, a .gguf file, or a packaged model's short name."""

import json
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from pipeline.backbone.gguf_metadata import (
    check_metadata,
    complete_config,
    quick_gguf_reader,
    warn_of_unknown_split,
)
from pipeline.backbone.packaged import PACKAGED, find_packaged
from pipeline.backbone.weight_files import weight_files, weights_to_fetch
from pipeline.errors import BackboneError

Architecture = Literal["decoder-only", "encoder-decoder"]

UNQUANTISED = (
    "give the model in 16 or 32 bits that it was made from: its weights are brought to int8 here (model.weights int8)"
)
_QUANTISATIONS = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "bitsandbytes": "bitsandbytes",
    "fp8": "FP8",
    "fbgemm_fp8": "FP8",
    "mxfp4": "MXFP4",
}

_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine's disk."""

    name: str
    """As the user wrote it."""
    folder: Path
    gguf: str | None
    """File name of the GGUF weights in `folder`; None for safetensors."""


def find_model(path: str) -> ModelFiles:
    """Find a model's files, downloading them only for a hub name.

    Raises: BackboneError when there is no such model, or it holds no weights that are safe to read; StorageError when
    a packaged model's parts cannot be joined.
    """
    if path in PACKAGED:
        file = find_packaged(path)
        return ModelFiles(path, file.parent, file.name)
    local = Path(path).expanduser()
    if local.is_file():
        if local.suffix != ".gguf":
            raise BackboneError(f"model.path {path}: a single file must be a .gguf file; else give its folder")
        return ModelFiles(path, local.resolve().parent, local.name)
    if not local.is_dir():
        local = _download(path)
    return _checked_folder(path, local.resolve())


def absolute_if_local(path: str) -> str:
    """A path or name that means the same in another working directory (Ray gives each worker its own)."""
    local = Path(path).expanduser()
    return path if path in PACKAGED or not local.exists() else str(local.resolve())


def _download(name: str) -> Path:
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise BackboneError(f"model.path {name}: there is no such folder or file")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "model.safetensors"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=patterns))
        if named := weights_to_fetch(folder, name):
            # The folder is named after its commit: both parts are of the same one.
            snapshot_download(name, revision=folder.name, allow_patterns=named)
        return folder
    except BackboneError:
        raise
    except Exception as error:
        raise BackboneError(
            f"model.path {name}: no such folder here, and the hub did not serve it "
            f"({type(error).__name__}); known packaged models: {', '.join(PACKAGED)}"
        ) from error


def _checked_folder(name: str, folder: Path) -> ModelFiles:
    if not (folder / "config.json").is_file():
        raise BackboneError(f"model.path {name}: the folder has no config.json, so it is no model folder")
    if (folder / "adapter_config.json").is_file():  # transformers would load it on top
        raise BackboneError(
            f"model.path {name}: the folder holds an adapter (adapter_config.json) beside the model; merge it into the "
            "weights (merge_and_unload) and save them, or take it out of the folder"
        )
    weight_files(folder, name)
    return ModelFiles(name, folder, None)


def read_config(files: ModelFiles) -> PretrainedConfig:
    """The model's configuration; of a model that also sees or hears, that of its text model.

    Raises: BackboneError for a family that is no language model.
    """
    path = str(files.folder / files.gguf) if files.gguf else None
    try:
        if path:
            check_metadata(path)
        with quick_gguf_reader() if path else nullcontext():
            config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False, **_gguf(files))
    except BackboneError:
        raise
    except Exception as error:
        raise BackboneError(f"model.path {files.name}: its configuration cannot be read: {_reason(error)}") from error
    if path:
        complete_config(config, path)
    else:
        _check_quantised(config, files.name)
    text = config if config.is_encoder_decoder else config.get_text_config()
    if architecture_of(text, files.name) == "encoder-decoder":
        _complete_start(text, files)
    _check_experts(text, files.name)
    for key in _QUANTIZATION_KEYS:  # from here on weights are floats
        if hasattr(text, key):
            delattr(text, key)
    return text


def _check_experts(config: PretrainedConfig, name: str) -> None:
    # NLLB's experts take so much of a whole batch. Switch counts each row for itself, so there is nothing to check.
    share = getattr(config, "moe_eval_capacity_token_fraction", 1.0)
    if share < 1:
        raise BackboneError(
            f"model.path {name}: its experts drop tokens where they are full of other rows' "
            f"(moe_eval_capacity_token_fraction {share}), so rows of one batch would change each other's results; "
            "set it to 1.0 in config.json, which drops none"
        )


def _complete_start(config: PretrainedConfig, files: ModelFiles) -> None:
    """Note in the configuration what the decoder begins behind, where only `generation_config.json` says it."""
    if getattr(config, "decoder_start_token_id", None) is None:
        known = read_generation(files, config)
        config.decoder_start_token_id = (
            known.bos_token_id if known.decoder_start_token_id is None else known.decoder_start_token_id
        )
    if config.decoder_start_token_id is None:
        raise BackboneError(
            f"model.path {files.name}: nothing says which token its decoder begins behind; write "
            "decoder_start_token_id into generation_config.json (for a translator such as mBART, the token of the "
            "language that it answers in)"
        )


def read_generation(files: ModelFiles, config: PretrainedConfig) -> GenerationConfig:
    """What the model says of decoding, from where transformers' `from_pretrained` takes it.

    Raises: BackboneError when it cannot be read.
    """
    if files.gguf:
        return GenerationConfig.from_model_config(config)
    own = (files.folder / "generation_config.json").is_file()
    try:
        return GenerationConfig.from_pretrained(
            files.folder,
            config_file_name="generation_config.json" if own else "config.json",
            _from_model_config=not own,
        )
    except Exception as error:
        raise BackboneError(
            f"model.path {files.name}: its generation_config.json cannot be read: {_reason(error)}"
        ) from error


def _check_quantised(config: PretrainedConfig, name: str) -> None:
    """Raises: BackboneError for weights that are quantised in a way that is not read."""
    settings = _quantization(config)
    if not settings or readable_method(settings):
        return
    method = method_of(settings)
    if method == "gguf":  # saved from a GGUF file; its weights are floats again
        return
    bits = settings.get("bits") or settings.get("w_bit") or ""
    kind = f"{_QUANTISATIONS.get(method, method) or 'of an unnamed kind'}{f', {bits} bit' if bits else ''}"
    raise BackboneError(f"model.path {name}: its weights are quantised ({kind}: quantization_config); {UNQUANTISED}")


def _quantization(config: PretrainedConfig) -> dict[str, Any]:
    """How a checkpoint is quantised, from its own or its text model's configuration; empty if it is not."""
    for part in (config, config.get_text_config()):
        for key in _QUANTIZATION_KEYS:
            if found := getattr(part, key, None):
                return found if isinstance(found, dict) else dict(found.to_dict())
    return {}


def quantization_of(files: ModelFiles) -> dict[str, Any]:
    """The `quantization_config` of a model folder that is read here; empty if its weights are floats."""
    path = files.folder / "config.json"
    if files.gguf or not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    parts = (content, content.get("text_config") or {})
    found: Any = next((part[key] for part in parts for key in _QUANTIZATION_KEYS if part.get(key)), {})
    return found if isinstance(found, dict) and readable_method(found) else {}


def readable_method(settings: dict[str, Any]) -> str | None:
    """The format of a `quantization_config`, if weights of it are read here (see `quantised`)."""
    method = method_of(settings)
    readable = {
        "mxfp4": True,
        "fp8": True,
        "fbgemm_fp8": True,
        "bitsandbytes": True,
        "compressed-tensors": settings.get("format") in ("float-quantized", "int-quantized", "naive-quantized"),
        "gptq": settings.get("bits") in (2, 4, 8),
        "awq": settings.get("bits", settings.get("w_bit")) == 4 and str(settings.get("version", "gemm")) == "gemm",
    }
    return method if readable.get(method) else None


def method_of(settings: dict[str, Any]) -> str:
    """The name of a `quantization_config`'s format, in small letters; empty for an unnamed one."""
    of_bitsandbytes = "load_in_4bit" in settings or "load_in_8bit" in settings
    return str(settings.get("quant_method") or ("bitsandbytes" if of_bitsandbytes else "")).lower()


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):  # transformers' advice is to run it
        return "it needs code of its own, which is never run here; use a model of a supported family without it"
    return str(error)


def architecture_of(config: PretrainedConfig, name: str = "") -> Architecture:
    """Raises: BackboneError for a family of which transformers has no language model."""
    if config.is_encoder_decoder and config.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return "encoder-decoder"
    if not config.is_encoder_decoder and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder-only"
    raise BackboneError(
        f"model.path {name}: transformers has no language model of the family '{config.model_type}' "
        "(AutoModelForCausalLM or AutoModelForSeq2SeqLM); give a model of another family"
    )


def context_length(config: PretrainedConfig) -> int | None:
    """Most positions that a sequence may have, prompt included; None where positions are relative or a state.

    A window of attention is no limit: it moves along with the text. Phi-3's long rotations end at their original
    length.
    """
    # The stacks of an encoder-decoder may each have a configuration, and a limit, of their own.
    stacks = [config, config.get_text_config(encoder=True), config.get_text_config(decoder=True)]
    keys = ("max_position_embeddings", "max_encoder_position_embeddings", "max_decoder_position_embeddings")
    limits = [int(limit) for stack in stacks for key in keys if (limit := getattr(stack, key, None))]
    if config.is_encoder_decoder and getattr(config, "attention_type", None) == "block_sparse":
        # BigBird reads longer rows by blocks, of which it draws some at random and counts a row's padding.
        limits.append((5 + 2 * config.num_random_blocks) * config.block_size)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Beyond the original length all rows of a pass get other factors, as soon as one of them is longer.
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        limits.append(int(original))
    return min(limits, default=None)


def read_tokenizer(files: ModelFiles) -> Any:
    """The model's fast tokenizer. Raises: BackboneError when it has none."""
    try:
        with quick_gguf_reader() if files.gguf else nullcontext():
            tokenizer = AutoTokenizer.from_pretrained(files.folder, trust_remote_code=False, **_gguf(files))
    except Exception as error:
        raise BackboneError(f"model.path {files.name}: its tokenizer cannot be read: {_reason(error)}") from error
    if not tokenizer.is_fast:
        raise BackboneError(f"model.path {files.name}: it has no fast tokenizer (tokenizer.json)")
    if files.gguf:
        warn_of_unknown_split(str(files.folder / files.gguf))
    return tokenizer


def embedding_rows(config: PretrainedConfig) -> int:
    """Rows of the model's table of embeddings."""
    return int(config.get_text_config().vocab_size)


def short_embedding_table(config: PretrainedConfig, tokenizer: Any) -> int | None:
    """Rows of the table of embeddings if the tokenizer has ids beyond them, else None.

    Such models are common (a padding token was added and never occurs), so only a text with such a token is refused.
    """
    rows = embedding_rows(config)
    added = tokenizer("a").input_ids  # tokens that a template adds need not be in the vocabulary
    return rows if max([*tokenizer.get_vocab().values(), *added], default=-1) >= rows else None


def check_eos(name: str, config: PretrainedConfig, tokenizer: Any) -> None:
    """Raises: BackboneError when the token that ends every target has no embedding."""
    rows, eos = embedding_rows(config), tokenizer.eos_token_id
    if eos is not None and eos >= rows:
        raise BackboneError(
            f"model.path {name}: the tokenizer's eos {tokenizer.eos_token!r} is id {eos}, for which the table of "
            f"{rows} embeddings has no row; give the tokenizer that the model was trained with"
        )


def save_config_and_tokenizer(config: PretrainedConfig, tokenizer: Any, folder: Path) -> None:
    """Write config and tokenizer where every worker reads them, whatever the weights' format."""
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def canonical_config(config: PretrainedConfig) -> str:
    """The configuration as JSON, without what differs between machines and library versions."""
    volatile = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
    kept = {key: value for key, value in config.to_dict().items() if key not in volatile}
    return json.dumps(kept, sort_keys=True, default=str)


def _gguf(files: ModelFiles) -> dict[str, str]:
    return {"gguf_file": files.gguf} if files.gguf else {}
