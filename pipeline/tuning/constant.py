"""What one constant answer would score: below that, a prompt has learned nothing, whatever it started from.

The answer is the most frequent target of the train split (of equally frequent ones the first by its letters): a service
that always gave the same answer would give this one. Choosing it on dev would flatter it. It is scored by the task's
own metric on the very rows that the prompt is measured on. For the metric `loss` there is none: a constant answer has
no nats.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

from pipeline.corpus.reader import SplitRef, count_targets, open_split, target_tokens
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import CorpusError
from pipeline.tuning.evaluate import LABELLED, score_texts, spoken, wanted_texts

_log = logging.getLogger(__name__)
_MOST_COUNTED = 100_000
"""Different targets that are counted at once; of more, which are free texts, the rarer half is forgotten."""


def constant_scores(corpus: TaskCorpus, metric: str, eval_rows: int, tokenizer: Any) -> dict[str, float]:
    """What the constant answer scores, by split (`dev`, and `test` where there is one); empty for the metric `loss`.

    Empty, too, when the token shards are gone, and told so: a prompt that is there shall not be lost for it.
    """
    if metric == "loss":
        return {}
    try:
        answer = most_frequent(corpus.splits["train"])
        given = answer if metric in LABELLED else spoken(target_tokens(corpus.splits["train"], answer), tokenizer)
        scores = {}
        for split in (name for name in ("dev", "test") if name in corpus.splits):
            rows = open_split(corpus.splits[split], eval_rows)
            wanted = wanted_texts(metric, rows, tokenizer)
            scores[split] = score_texts(metric, [given] * len(wanted), wanted)
        return scores
    except (CorpusError, OSError) as error:
        # The judgement is not known then, and what is to be withheld is published.
        _log.warning("task '%s': nobody can tell whether its prompt has learned: %s", corpus.task, error)
        return {}


def most_frequent(train: SplitRef) -> str:
    """The target that most usable rows have. Raises: CorpusError when the shards are missing."""
    return most_common(count_targets(train))


def most_common(counts: Iterable[tuple[str, int]]) -> str:
    """The text with the highest count in all, of equals the first by its letters; `counts` may name a text repeatedly.

    Exact up to 100,000 different texts; beyond that memory stays bounded, and among free texts any will do.
    """
    total: Counter[str] = Counter()
    for text, count in counts:
        total[text] += count
        if len(total) > _MOST_COUNTED:
            total = Counter(dict(total.most_common(_MOST_COUNTED // 2)))
    return min(total, key=lambda text: (-total[text], text))
