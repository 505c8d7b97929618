"""Several prompts of one task answer together (Lester et al. 2021, section 6), computed from their single answers.

`serving.ensemble` gives the same for prompts of a bank. Shapes: E prompts, N rows, L labels.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.lab.comparison.questions import SplitAnswers


def average(members: Sequence[SplitAnswers]) -> list[str] | None:
    """For each row the label with the highest mean probability over the prompts; None where answers are texts."""
    shares = _probabilities(members)
    return None if shares is None else _labels(members, shares.mean(axis=0))


def majority(members: Sequence[SplitAnswers]) -> list[str] | None:
    """For each row the answer of most prompts; None for the metric `loss`.

    A tie goes to the label with the higher mean probability, or to the text of the first prompt.
    """
    shares = _probabilities(members)
    if shares is not None:
        votes = (shares.argmax(axis=2)[..., None] == np.arange(shares.shape[2])).mean(axis=0)  # [N, L]
        # Votes differ by at least 1 / E. Probabilities, divided by 2 E, are smaller than that: they only break ties.
        return _labels(members, votes + shares.mean(axis=0) / (2 * len(members)))
    texts = [member.texts for member in members if member.texts is not None]
    if len(texts) < len(members):
        return None
    # For equal counts, Counter returns the text that it met first.
    return [Counter(of_row).most_common(1)[0][0] for of_row in zip(*texts, strict=True)]


def _probabilities(members: Sequence[SplitAnswers]) -> np.ndarray | None:
    """Probabilities `[E, N, L]`, which sum to 1 over the labels."""
    scores = [member.label_scores for member in members if member.label_scores is not None]
    if len(scores) < len(members):
        return None
    table = np.stack(scores)
    odds = np.exp(table - table.max(axis=2, keepdims=True))
    shares: np.ndarray = odds / odds.sum(axis=2, keepdims=True)
    return shares


def _labels(members: Sequence[SplitAnswers], table: np.ndarray) -> list[str]:
    labels = members[0].labels
    assert labels is not None
    return [labels[place] for place in table.argmax(axis=1)]
