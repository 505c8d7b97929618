"""Rows of one task that the training of another has seen: corpora of one origin share their texts.

What was trained on a row may know its answer by heart; judged on another task, that would pass for transfer.
"""

import re
from collections.abc import Callable, Collection
from functools import cache

import numpy as np

from pipeline.comparison.questions import Answered, Split
from pipeline.comparison.study import Study
from pipeline.corpus.encoding import decode_inputs
from pipeline.corpus.reader import SplitRef, open_split
from pipeline.corpus.template import parse_template

Seen = Callable[[str, str, Split], np.ndarray]
"""(task trained on, task answered, split) -> `[N]`, whether train or dev of the first holds a row of the second."""

_WORD = re.compile(r"\w+")


def seen_rows_of(study: Study) -> Seen:
    """Of a comparison's rows as they are answered; two texts are one if their words are, whatever else is between."""

    def words(task: str, ref: SplitRef, limit: int | None = None) -> list[str]:
        split, tokenizer = open_split(ref, limit), study.checked.tokenizer
        rows = [split.input_ids(row).tolist() for row in range(len(split))]
        template = study.settings.tasks[task].input
        return [own_words(text, template) for text in decode_inputs(tokenizer, study.checked.architecture, rows)]

    @cache
    def learnt(task: str) -> frozenset[str]:
        splits = study.corpora[task].splits
        return frozenset(text for name in ("train", "dev") for text in words(task, splits[name]))

    @cache
    def answered(task: str, split: Split) -> list[str]:
        return words(task, study.corpora[task].splits[split], study.rows(task, split))

    def seen(source: str, on: str, split: Split) -> np.ndarray:
        return np.array([text in learnt(source) for text in answered(on, split)], bool)

    return seen


def own_words(text: str, template: str) -> str:
    """A row's words without those that its template puts around every row."""
    pieces = parse_template(template, "input").pieces
    last, column = pieces[-1]
    before, behind = (" ".join(_words(literal)) for literal in (pieces[0][0], last if column is None else ""))
    return " ".join(_words(text)).removeprefix(before).removesuffix(behind).strip()


def unseen(answered: Answered, sources: Collection[str], on: str, split: Split, seen: Seen) -> Answered | None:
    """The answers to rows that no task of `sources` other than `on` was trained on; None where none is left."""
    held = [seen(source, on, split) for source in sources if source != on]
    if not held:
        return answered
    left = ~np.any(held, axis=0)
    return answered.only(left) if left.any() else None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
