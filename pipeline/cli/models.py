"""Commands' questions to a model. Its libraries take seconds to import, so only these functions import them."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.bank import BackboneId, Prompt
from pipeline.errors import BackboneError

if TYPE_CHECKING:
    from pipeline.serving.backbone_comparison import BackboneComparison

Words = list[list[tuple[str, float]]]
"""For each vector of a prompt its nearest tokens and their cosines."""
Weights = Literal["int8", "full"]


def nearest_words(model: str, array: np.ndarray, count: int) -> Words:
    """The `count` nearest tokens of each vector. Raises: BankError when the model has another width, BackboneError."""
    with _libraries():
        from pipeline.backbone.nearest import nearest_tokens
    return nearest_tokens(model, array, count)


def mismatch_warning(model: str, prompt: Prompt, same: Callable[[], Sequence[BackboneId]]) -> str | None:
    """A warning when the prompt was tuned on another model, as far as that shows without its weights; else None.

    `same` gives the prompt's backbone and those stated to be the same; it is called only when parts differ.
    Raises: BackboneError, and what `same` raises.
    """
    with _libraries():
        from pipeline.backbone.files import canonical_config, find_model, read_config, read_tokenizer
        from pipeline.backbone.fingerprint import tokenizer_digest
    files = find_model(model)
    tokenizer = read_tokenizer(files)
    found = {
        "config": hashlib.sha256(canonical_config(read_config(files)).encode()).hexdigest(),
        "tokenizer": tokenizer_digest(tokenizer),
    }
    differing = [part for part, digest in found.items() if digest != getattr(prompt.backbone, part)]
    if not differing or any(all(digest == getattr(each, part) for part, digest in found.items()) for each in same()):
        return _chat_warning(model, prompt, tokenizer)
    return (
        f"'{prompt.record.name}' was tuned on {prompt.backbone.model}, and {model} is another model: "
        f"they differ in {' and '.join(differing)}"
    )


def _chat_warning(model: str, prompt: Prompt, tokenizer: Any) -> str | None:
    """A warning when a service on this model would refuse the prompt for its chat template; else None."""
    form = prompt.record.template.chat
    if form is None:
        return None
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError:
        return f"'{prompt.record.name}' was tuned on a chat, and {model} has no chat template"
    if hashlib.sha256(template.encode()).hexdigest() == form.template:
        return None
    return f"'{prompt.record.name}' was tuned with another chat template than that of {model}"


def identity_of(model: str, weights: Weights | None, like: BackboneId | None) -> BackboneId:
    """The backbone that prompts made on this model belong to; reads all of its weights.

    Weights are held as `weights` says, else as those of `like`, else in int8. Raises: BackboneError.
    """
    with _libraries():
        from pipeline.backbone.files import find_model, read_config, read_tokenizer
        from pipeline.backbone.fingerprint import identify, weights_setting
        from pipeline.backbone.loading import build_skeleton
        from pipeline.backbone.weights import open_weights
    files = find_model(model)
    config = read_config(files)
    source = open_weights(files, build_skeleton(config, int8=False))
    held = weights or (weights_setting(like) if like else "int8")
    return identify(model, config, read_tokenizer(files), source, held)


def compare_on_rows(
    first: str, second: str, weights: Weights | None, like: BackboneId, rows: Sequence[str] | None
) -> "BackboneComparison":
    """Run two models over rows of text. Raises: BackboneError unless they are the same there."""
    with _libraries():
        from pipeline.backbone.fingerprint import weights_setting
        from pipeline.serving.backbone_comparison import ROWS, compare_models
    return compare_models(first, second, weights or weights_setting(like), ROWS if rows is None else rows)


def save_model_folder(model: str, folder: Path, weights: Weights) -> None:
    """Write a model as other servers load it. Raises: BackboneError, StorageError."""
    with _libraries():
        from pipeline.backbone.model_folder import write_model_folder
    write_model_folder(model, folder, int8=weights == "int8")


@contextmanager
def _libraries() -> Iterator[None]:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        yield
    except ModuleNotFoundError as missing:
        raise BackboneError(f"--model needs the package {missing.name}: pip install 'promptbank[job]'") from missing
