"""Several prompts of one task answering together (Lester et al. 2021, section 6), from answers that are there already.

The same as `serving.ensemble` gives for prompts of a bank. Shapes: E prompts, N rows, L labels.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.lab.comparison.questions import SplitAnswers


def average(members: Sequence[SplitAnswers]) -> list[str] | None:
    """The label with the highest mean probability over the prompts, row by row; None where answers are texts."""
    shares = _probabilities(members)
    return None if shares is None else _labels(members, shares.mean(axis=0))


def majority(members: Sequence[SplitAnswers]) -> list[str] | None:
    """The answer of most prompts, row by row; None for the metric `loss`.

    Of equal votes, the label with the higher mean probability; of texts, that of the foremost prompt.
    """
    shares = _probabilities(members)
    if shares is not None:
        votes = (shares.argmax(axis=2)[..., None] == np.arange(shares.shape[2])).mean(axis=0)  # [N, L]
        # Probabilities are below 1, and votes apart by at least 1 / E.
        return _labels(members, votes + shares.mean(axis=0) / (2 * len(members)))
    texts = [member.texts for member in members if member.texts is not None]
    if len(texts) < len(members):
        return None
    # Of equal counts, Counter tells the one that was met first.
    return [Counter(of_row).most_common(1)[0][0] for of_row in zip(*texts, strict=True)]


def _probabilities(members: Sequence[SplitAnswers]) -> np.ndarray | None:
    """`[E, N, L]`, summing to 1 over the labels."""
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
