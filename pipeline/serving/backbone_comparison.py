"""Finds out whether two models are one backbone: the same tokens, limits and log-likelihoods for every row of text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.backbone.encoder_decoder import decoder_inputs
from pipeline.bank import BackboneId
from pipeline.corpus.encoding import encode_targets
from pipeline.errors import BackboneError
from pipeline.serving.served_backbone import ServedBackbone, load_backbone

TOLERANCE = 0.01
"""Largest difference of a row's log-likelihoods, in nats: rounding stays below it, other weights do not."""

# Tokenizers that are nearly the same differ in digits, spaces, punctuation and scripts.
ROWS = (
    "A fine film with a plain story, and two actors who carry it.",
    "The committee didn't meet on 14 March 2019; it met at 09:45 on the 21st.",
    "In 1876, 3,141 people paid $2.50 each (or 12.5% more than in 1875).",
    "  Two spaces before, three   between 12 and   345, and a tab\tbefore 6.",
    "First line\nsecond line\n\n  7. an indented item\n",
    "Was ist das für eine Musik? Où est la gare ? ¿Qué hora es? Здравствуйте, мир. 你好，世界。",
    'def add(a, b):\n    return a + b  # "sum" of x1, x2\n',
    "https://example.org/a_b?c=1&d=%20 – e-mail: someone@example.org … 🙂",
)


_SEPARATOR = " "
"""Between input and target, the default of a template; a decoder's targets have none."""


@dataclass(frozen=True)
class BackboneComparison:
    """Two models that agree on the same rows, and how closely."""

    first: BackboneId
    second: BackboneId
    rows: int
    largest_difference: float
    """Between the log-likelihoods of a row, in nats."""


def compare_models(first: str, second: str, weights: str = "int8", rows: Sequence[str] = ROWS) -> BackboneComparison:
    """Run both models, one after the other, over rows of text; each is held as `weights` says.

    Raises: BackboneError naming what differs: the token that ends an answer or starts a decoder, the context, or the
    first row whose tokens, as input or as target, or log-likelihood do; also when a model cannot be loaded.
    """
    if not rows:
        raise BackboneError("two models can only be compared on rows of text, and there are none: give some lines")
    one, other = _scored(first, weights, rows), _scored(second, weights, rows)
    for row, ours, theirs in zip(rows, one.rows, other.rows, strict=True):
        if ours.ids != theirs.ids:
            raise BackboneError(
                f"{first} and {second} are not the same: they split {row!r} into {len(ours.ids)} and {len(theirs.ids)} "
                "tokens that differ; compare rows of your own (--text FILE) if they never get such text"
            )
    for what, value in one.facts.items():
        if value != other.facts[what]:
            raise BackboneError(
                f"{first} and {second} are not the same: {what} is {value} of the first and {other.facts[what]} of "
                "the second, so answers would differ; fix the configuration or tokenizer that is wrong"
            )
    largest = 0.0
    for row, ours, theirs in zip(rows, one.rows, other.rows, strict=True):
        if ours.target != theirs.target:
            raise BackboneError(f"{first} and {second} are not the same: they split {row!r} differently as a target")
        difference = abs(ours.likelihood - theirs.likelihood)
        if not difference <= TOLERANCE:  # also refuses NaN
            raise BackboneError(
                f"{first} and {second} are not the same: the log-likelihood of {row!r} is {ours.likelihood:.4f} "
                f"and {theirs.likelihood:.4f}, and {TOLERANCE} apart is allowed"
            )
        largest = max(largest, difference)
    return BackboneComparison(one.identity, other.identity, len(rows), largest)


@dataclass(frozen=True)
class _ModelScores:
    identity: BackboneId
    facts: dict[str, int | None]
    """By name, what decides where answers begin and end."""
    rows: list["_RowScore"]


@dataclass(frozen=True)
class _RowScore:
    ids: list[int]
    """Tokens, as an input."""
    target: list[int]
    """Tokens, as a target."""
    likelihood: float


def _scored(model: str, weights: str, rows: Sequence[str]) -> _ModelScores:
    served = load_backbone(model, weights, products="exact")
    facts = {
        "the tokenizer's end of a text (eos_token_id)": served.tokenizer.eos_token_id,
        "the decoder's first token (decoder_start_token_id)": _start(served),
        "the context in tokens": served.context,
    }
    return _ModelScores(served.identity, facts, [_score(served, row) for row in rows])


def _start(served: ServedBackbone) -> int | None:
    """The decoder's first token; None for a decoder-only model."""
    decoder = served.architecture == "encoder-decoder"
    return served.backbone.config.decoder_start_token_id if decoder else None


def _score(served: ServedBackbone, row: str) -> _RowScore:
    ids = served.tokenizer(row).input_ids[: served.context]
    if len(ids) < 2:
        raise BackboneError(f"the row {row!r} has fewer than two tokens, which shows nothing; give longer rows")
    (target,) = encode_targets(served.tokenizer, served.architecture, _SEPARATOR, [row])
    likelihood = served.backbone.run(_log_likelihood, torch.tensor([ids]))
    return _RowScore(ids, target, float(likelihood))


@torch.no_grad()
def _log_likelihood(model: Any, ids: Tensor) -> Tensor:
    """Log-likelihood of ids `[1, T]`, in nats: each token given those before it; for an encoder-decoder, as the
    decoder's target for the same row."""
    if model.config.is_encoder_decoder:
        before = decoder_inputs(model, list(ids.numpy()), ids.device)
        logits, told = model(input_ids=ids, decoder_input_ids=before).logits, ids
    else:
        logits, told = model(input_ids=ids[:, :-1]).logits, ids[:, 1:]
    return logits.float().log_softmax(-1).gather(-1, told[:, :, None]).sum()
