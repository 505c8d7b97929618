"""Dev metrics by name, through well-kept libraries; all lie in 0 to 1 and more is better, but for loss.

The libraries take seconds to import, and a driver measures nothing: they are imported when first used.
"""

import re
from collections.abc import Sequence

import numpy as np


class _Words:
    """rouge_score's own tokenizer drops every letter outside a-z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


def label_metric(name: str, predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """`accuracy`, or `f1` averaged over the labels without regard to their size (macro)."""
    from sklearn.metrics import accuracy_score, f1_score

    if name == "f1":
        return float(f1_score(wanted, predicted, average="macro", zero_division=0.0))
    assert name == "accuracy"
    return float(accuracy_score(wanted, predicted))


def text_metric(name: str, predicted: Sequence[str], wanted: Sequence[str]) -> float:
    """`exact_match` of whole texts (white space folded), or `rouge_l` F-measure, averaged over rows."""
    if name == "rouge_l":
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"], tokenizer=_Words())
        scores = [scorer.score(want, got)["rougeL"].fmeasure for got, want in zip(predicted, wanted, strict=True)]
        return float(np.mean(scores))
    assert name == "exact_match"
    equal = [got.split() == want.split() for got, want in zip(predicted, wanted, strict=True)]
    return float(np.mean(equal))


def goodness(metric: str, value: float, loss: float) -> tuple[float, float]:
    """A dev metric so that more is better; equal metrics are told apart by dev loss."""
    return (-value if metric == "loss" else value), -loss
