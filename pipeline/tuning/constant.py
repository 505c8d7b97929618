"""What an answer that never looks at the row would score: below that, a prompt has learned nothing, wherever it began.

The answer is constant, the most frequent target of the train split (of equally frequent ones the first by its letters):
a service that always gave the same answer would give this one. Choosing it on dev would flatter it. It is scored by the
task's own metric on the very rows that the prompt is measured on.

For `f1` that bar would be too low: of two labels a constant answer has at most half of the macro F1, since it never
gives the other label, and guessing has about half in any case. So guesses are expected there, too, by train's shares of
the labels and by equal ones, and the highest of the three counts.

For the metric `loss` there is none: such an answer has no nats.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.corpus.reader import count_targets, open_split, target_tokens
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import CorpusError
from pipeline.tuning.evaluate import LABELLED, score_texts, spoken, wanted_texts
from pipeline.tuning.trials import random_numbers

_log = logging.getLogger(__name__)
_MOST_COUNTED = 100_000
"""Different targets that are counted at once; of more, which are free texts, the rarer half is forgotten."""
_DRAWS = 1000


def constant_scores(corpus: TaskCorpus, metric: str, eval_rows: int, tokenizer: Any) -> dict[str, float]:
    """What such an answer scores, by split (`dev`, and `test` where there is one); empty for the metric `loss`.

    Empty, too, when the token shards are gone, and told so: a prompt that is there shall not be lost for it.
    """
    if metric == "loss":
        return {}
    try:
        targets = summed(count_targets(corpus.splits["train"]))
        answer = most_common(targets.items())
        given = answer if metric in LABELLED else spoken(target_tokens(corpus.splits["train"], answer), tokenizer)
        scores = {}
        for split in (name for name in ("dev", "test") if name in corpus.splits):
            rows = open_split(corpus.splits[split], eval_rows)
            wanted = wanted_texts(metric, rows, tokenizer)
            scores[split] = score_texts(metric, [given] * len(wanted), wanted)
            if metric == "f1":
                guesses = targets, dict.fromkeys(targets, 1)
                scores[split] = max(scores[split], *(guessed_f1(shares, wanted) for shares in guesses))
        return scores
    except (CorpusError, OSError) as error:
        # The judgement is not known then, and what is to be withheld is published.
        _log.warning("task '%s': nobody can tell whether its prompt has learned: %s", corpus.task, error)
        return {}


def guessed_f1(shares: Mapping[str, float], wanted: Sequence[str]) -> float:
    """The macro F1 to expect of answers that are drawn for each row by these shares of the labels.

    A draw answers K of N rows with a label that n of them have. Which rows is chance, so K n / N of these answers are
    right on average, and the label's F1 is 2 K n / N / (K + n). That is exact; only over how many rows each label gets
    a mean is taken, of draws by a fixed seed. A label that no row has and no answer gives does not count, as ever.
    """
    labels, of_rows = sorted({*shares, *wanted}), Counter(wanted)
    having = np.array([of_rows[label] for label in labels])
    share = np.array([shares.get(label, 0.0) for label in labels])
    answered = random_numbers("guessed_f1").multinomial(len(wanted), share / share.sum(), _DRAWS)  # [draws, labels]
    either = answered + having
    f1 = 2.0 * answered * having / len(wanted) / np.maximum(either, 1)
    return float((f1.sum(1) / (either > 0).sum(1)).mean())


def most_common(counts: Iterable[tuple[str, int]]) -> str:
    """The text with the highest count in all, of equals the first by its letters."""
    total = summed(counts)
    return min(total, key=lambda text: (-total[text], text))


def summed(counts: Iterable[tuple[str, int]]) -> Counter[str]:
    """The count of each text in all; `counts` may name a text repeatedly.

    Exact up to 100,000 different texts; beyond that memory stays bounded, and among free texts any will do.
    """
    total: Counter[str] = Counter()
    for text, count in counts:
        total[text] += count
        if len(total) > _MOST_COUNTED:
            total = Counter(dict(total.most_common(_MOST_COUNTED // 2)))
    return total
