"""Prompt ensembles: several prompts of one task answer together, in one batch (Lester et al. 2021, section 6).

Unlike an ensemble of models it needs one copy of the model. Shapes: N texts, E prompts, L labels.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Literal, TypeVar

import numpy as np

from pipeline.errors import BankError
from pipeline.serving.prompted_model import PromptedModel
from pipeline.serving.requests import Text

T = TypeVar("T")


def classify_ensemble(
    model: PromptedModel,
    texts: Sequence[Text],
    prompts: Sequence[str],
    combine: Literal["majority", "mean"] = "majority",
) -> list[dict[str, float]]:
    """For each text, every label's share of 1, best label first.

    "majority": the share of prompts for which the label is the most likely; ties are ordered by mean
    probability. "mean": the mean over prompts of the label's probability, which sums to 1 over the labels.
    Raises: BankError when the prompts do not have the same labels, and as `PromptedModel.classify`.
    """
    scores = _of_each_prompt(model.classify(*_everything(texts, prompts)), len(texts))
    return [_combined(list(of_text), prompts, combine) for of_text in scores]


def generate_ensemble(
    model: PromptedModel, texts: Sequence[Text], prompts: Sequence[str], max_new_tokens: int = 64
) -> list[str]:
    """For each text, the answer that most prompts give; of a tie, the one of the foremost prompt.

    Raises: as `PromptedModel.generate`.
    """
    answers = _of_each_prompt(model.generate(*_everything(texts, prompts), max_new_tokens), len(texts))
    # Of equal counts, Counter tells the one that was met first.
    return [Counter(of_text).most_common(1)[0][0] for of_text in answers]


def _everything(texts: Sequence[Text], prompts: Sequence[str]) -> tuple[list[Text], list[str]]:
    """Every text behind every prompt: N * E rows."""
    if not prompts:
        raise BankError("an ensemble needs at least one prompt; name those that answer together")
    return [text for _ in prompts for text in texts], [prompt for prompt in prompts for _ in texts]


def _of_each_prompt(answers: Sequence[T], texts: int) -> list[tuple[T, ...]]:
    """N * E answers -> for each text, those of the E prompts."""
    return list(zip(*(answers[i : i + texts] for i in range(0, len(answers), texts)), strict=True)) if texts else []


def _combined(scores: list[dict[str, float]], prompts: Sequence[str], combine: str) -> dict[str, float]:
    labels = list(scores[0])
    for prompt, of_prompt in zip(prompts, scores, strict=True):
        if set(of_prompt) != set(labels):
            raise BankError(
                f"prompts '{prompts[0]}' and '{prompt}' cannot answer together: their labels are "
                f"{', '.join(labels)} and {', '.join(of_prompt)}"
            )
    likelihoods = np.array([[of_prompt[label] for label in labels] for of_prompt in scores])  # [E, L]
    odds = np.exp(likelihoods - likelihoods.max(axis=1, keepdims=True))
    probabilities = (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)  # [L]
    votes = np.bincount(likelihoods.argmax(axis=1), minlength=len(labels)) / len(scores)  # [L]
    shares = votes if combine == "majority" else probabilities
    best_first = sorted(range(len(labels)), key=lambda i: (-shares[i], -probabilities[i]))
    return {labels[i]: float(shares[i]) for i in best_first}
