"""The model that an adaptation starts from: a given model folder, or one with fresh weights that is made here once."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import AutoConfig, AutoModelForSeq2SeqLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

from pipeline.backbone.files import (
    ModelFiles,
    architecture_of,
    canonical_config,
    check_eos,
    embedding_rows,
    find_model,
    read_config,
    read_tokenizer,
)
from pipeline.backbone.fingerprint import tokenizer_digest
from pipeline.errors import BackboneError, SettingsError
from pipeline.lab.adapt.objectives import Markers, span_count
from pipeline.settings import AdaptationSettings, AdaptedModelSettings
from pipeline.whole_files import put_in_place


@dataclass(frozen=True)
class StartModel:
    """A checked model and the path to its weights."""

    path: str
    config: PretrainedConfig
    tokenizer: Any

    @property
    def markers(self) -> Markers:
        return markers_of(self.tokenizer)


def open_start_model(settings: AdaptationSettings, run_folder: Path | None) -> StartModel:
    """Find the model to train, or make a fresh one in the run's folder; without a folder it is only checked.

    Raises: BackboneError for a model that cannot be adapted; SettingsError; StorageError.
    """
    model = settings.model
    if model.is_fresh:
        config, tokenizer = _fresh_config(model)
        path = "" if run_folder is None else str(_make_fresh(run_folder, config, tokenizer, settings.run.seed))
        start = StartModel(path, config, tokenizer)
    else:
        assert model.path is not None
        files = find_model(model.path)
        start = StartModel(model.path, read_config(files), read_tokenizer(files))
    _check(start, settings)
    return start


def markers_of(tokenizer: Any) -> Markers:
    """The tokenizer's eos, and its sentinels in their order."""
    vocabulary = tokenizer.get_vocab()
    sentinels: list[int] = []
    while (token := _sentinel(len(sentinels))) in vocabulary:
        sentinels.append(vocabulary[token])
    return Markers(tokenizer.eos_token_id, sentinels)


def _sentinel(number: int) -> str:
    return f"<extra_id_{number}>"


def _check(start: StartModel, settings: AdaptationSettings) -> None:
    where, objective = f"model {settings.model.path or 'config'}", settings.objective
    if architecture_of(start.config, where) != "encoder-decoder":
        raise BackboneError(
            f"{where}: family '{start.config.model_type}' is decoder-only; adaptation is for encoder-decoders, such as "
            "T5: a decoder-only model has been trained as a language model already"
        )
    if start.tokenizer.eos_token_id is None:
        raise BackboneError(f"{where}: its tokenizer has no eos token, so no target could end; set its eos_token")
    check_eos(str(settings.model.path or "config"), start.config, start.tokenizer)
    spans, there = span_count(settings.tokens, objective.noise_density, objective.mean_span), start.markers.sentinels
    if objective.name == "span_corruption" and len(there) < spans:
        raise SettingsError(
            f"{where}: its tokenizer has {len(there)} sentinels (<extra_id_0>, …) where {settings.tokens} tokens have "
            f"{spans} corrupted spans; lower 'tokens', or use the objective prefix_lm"
        )
    rows = embedding_rows(start.config)
    if objective.name == "span_corruption" and max(there[:spans], default=-1) >= rows:
        raise BackboneError(
            f"{where}: its tokenizer's sentinels (<extra_id_0>, …) go beyond the table of {rows} embeddings; give the "
            "tokenizer that the model was trained with, or use the objective prefix_lm"
        )


def _fresh_config(model: AdaptedModelSettings) -> tuple[PretrainedConfig, Any]:
    if model.config is None:
        files = find_model(str(model.path))
        tokenizer, config = read_tokenizer(files), read_config(files)
    else:
        tokenizer = _read_tokenizer(str(model.tokenizer))
        config = _config_of(model.config)
    if not hasattr(config, "vocab_size"):
        raise SettingsError(
            f"model: the halves of '{config.model_type}' have a configuration each, and a fresh model is made of a "
            "family with one for both, such as t5"
        )
    there = len(markers_of(tokenizer).sentinels)
    missing = [_sentinel(number) for number in range(there, model.sentinels)]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in missing], special_tokens=True)
    config.vocab_size = max(len(tokenizer), 0 if model.config is not None else config.vocab_size)
    config.eos_token_id = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    config.pad_token_id = config.decoder_start_token_id = tokenizer.pad_token_id
    return config, tokenizer


def _read_tokenizer(path: str) -> Any:
    folder = Path(path).expanduser()
    alone = (folder / "tokenizer.json").is_file()  # the folder need not hold a model
    return read_tokenizer(ModelFiles(path, folder.resolve(), None) if alone else find_model(path))


def _config_of(values: dict[str, Any]) -> PretrainedConfig:
    kind = values.get("model_type")
    if kind not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise SettingsError(f"model.config.model_type: {kind!r} is no encoder-decoder; give one, such as t5")
    try:
        return AutoConfig.for_model(**values)
    except (TypeError, ValueError) as error:
        raise SettingsError(f"model.config: {' '.join(str(error).split())}") from error


def _make_fresh(run_folder: Path, config: PretrainedConfig, tokenizer: Any, seed: int) -> Path:
    """Make the fresh model's folder, unless it is there. Its name holds a digest of the settings that decide it."""
    named_by = f"{canonical_config(config)} {tokenizer_digest(tokenizer)} {seed}"
    folder = run_folder / f"start-{hashlib.sha256(named_by.encode()).hexdigest()[:12]}"
    if not folder.exists():
        put_in_place(folder, lambda path: _write_fresh(path, config, tokenizer, seed))
    return folder


def _write_fresh(path: Path, config: PretrainedConfig, tokenizer: Any, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForSeq2SeqLM.from_config(config, trust_remote_code=False)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
