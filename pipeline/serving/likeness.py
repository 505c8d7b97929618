"""Whether two models are one backbone: the same tokens, and the same log-likelihood of every row of text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.bank import BackboneId
from pipeline.errors import BackboneError
from pipeline.serving.served_backbone import ServedBackbone, load_backbone

ALLOWED = 0.01
"""Nats by which the log-likelihood of a row may differ: rounding, and no other weights."""

# Digits, spaces, marks and scripts are where tokenizers that are nearly the same differ.
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


@dataclass(frozen=True)
class Compared:
    """What two models made of the same rows."""

    first: BackboneId
    second: BackboneId
    rows: int
    largest_difference: float
    """Between the log-likelihoods of a row, in nats."""


def compare_models(first: str, second: str, weights: str = "int8", rows: Sequence[str] = ROWS) -> Compared:
    """Run both models, one after the other, over rows of text; each is held as `weights` says.

    Raises: BackboneError naming the first row whose tokens or log-likelihood differ, or when a model cannot be loaded.
    """
    if not rows:
        raise BackboneError("two models can only be compared on rows of text, and there are none: give some lines")
    one, other = _scored(first, weights, rows), _scored(second, weights, rows)
    largest = 0.0
    for row, (ids, likelihood), (other_ids, other_likelihood) in zip(rows, one.rows, other.rows, strict=True):
        if ids != other_ids:
            raise BackboneError(
                f"{first} and {second} are not the same: they cut {row!r} into {len(ids)} and {len(other_ids)} tokens "
                "that differ; compare rows of your own (--text FILE) if no such text is ever put to them"
            )
        difference = abs(likelihood - other_likelihood)
        if not difference <= ALLOWED:  # not-a-number is no likeness
            raise BackboneError(
                f"{first} and {second} are not the same: the log-likelihood of {row!r} is {likelihood:.4f} "
                f"and {other_likelihood:.4f}, and {ALLOWED} apart is allowed"
            )
        largest = max(largest, difference)
    return Compared(one.identity, other.identity, len(rows), largest)


@dataclass(frozen=True)
class _Scored:
    identity: BackboneId
    rows: list[tuple[list[int], float]]
    """Tokens and log-likelihood of each row."""


def _scored(model: str, weights: str, rows: Sequence[str]) -> _Scored:
    served = load_backbone(model, weights)
    return _Scored(served.identity, [_score(served, row) for row in rows])


def _score(served: ServedBackbone, row: str) -> tuple[list[int], float]:
    ids = served.tokenizer(row).input_ids[: served.context]
    if len(ids) < 2:
        raise BackboneError(f"the row {row!r} has fewer than two tokens, and shows nothing; give longer ones")
    likelihood = served.backbone.run(_log_likelihood, torch.tensor([ids]), served.architecture == "encoder-decoder")
    return ids, float(likelihood)


@torch.no_grad()
def _log_likelihood(model: nn.Module, ids: Tensor, encoder_decoder: bool) -> Tensor:
    """Of ids [1, T]: each token after those before it; of an encoder-decoder, after them and the whole row."""
    if encoder_decoder:
        logits = model(input_ids=ids, decoder_input_ids=ids[:, :-1]).logits
    else:
        logits = model(input_ids=ids[:, :-1]).logits
    return logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).sum()
