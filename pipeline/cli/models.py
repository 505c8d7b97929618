"""The model at hand. Its libraries are imported only when a command is given one, for that takes seconds."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np

from pipeline.bank import BackboneId, Prompt
from pipeline.errors import BackboneError

if TYPE_CHECKING:
    from pipeline.serving.backbone_comparison import BackboneComparison

Words = list[list[tuple[str, float]]]
"""For each vector of a prompt its nearest tokens and their cosines."""
Weights = Literal["int8", "full"]


def nearest_words(model: str, array: np.ndarray, count: int) -> Words:
    """Raises: BankError when the prompt is of another width, BackboneError."""
    with _libraries():
        from pipeline.backbone.nearest import nearest_tokens
    return nearest_tokens(model, array, count)


def mismatch_warning(model: str, prompt: Prompt, same: Callable[[], Sequence[BackboneId]]) -> str | None:
    """Why the prompt is not of this model, as far as that can be told without reading its weights.

    `same` gives the prompt's backbone and those that the bank states to be the same; asked only where parts differ.
    Raises: BackboneError, and what `same` raises.
    """
    with _libraries():
        from pipeline.backbone.files import canonical_config, find_model, read_config, read_tokenizer
        from pipeline.backbone.fingerprint import tokenizer_digest
    files = find_model(model)
    found = {
        "config": hashlib.sha256(canonical_config(read_config(files)).encode()).hexdigest(),
        "tokenizer": tokenizer_digest(read_tokenizer(files)),
    }
    differing = [part for part, digest in found.items() if digest != getattr(prompt.backbone, part)]
    if not differing or any(all(digest == getattr(each, part) for part, digest in found.items()) for each in same()):
        return None
    return (
        f"'{prompt.record.name}' was tuned on {prompt.backbone.model}, and {model} is another model: "
        f"they differ in {' and '.join(differing)}"
    )


def identity_of(model: str, weights: Weights | None, like: BackboneId | None) -> BackboneId:
    """The backbone that prompts made on this model belong to; reads all of its weights.

    They are held as `weights` says, else as those of `like`, else in int8. Raises: BackboneError.
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


@contextmanager
def _libraries() -> Iterator[None]:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        yield
    except ModuleNotFoundError as missing:
        raise BackboneError(f"--model needs the package {missing.name}: pip install 'promptbank[job]'") from missing
