"""Find rows of one task that another task's training has seen: corpora of one origin share texts.

What was trained on a row may have memorised its answer. Counted on another task, that would look like transfer.
"""

import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import cache

import numpy as np

from pipeline.corpus.encoding import decode_inputs
from pipeline.corpus.reader import SplitRef, open_split
from pipeline.corpus.task_corpus import task_chat, task_input
from pipeline.corpus.template import TextTemplate
from pipeline.lab.comparison.questions import Split, SplitAnswers
from pipeline.lab.comparison.study import Study

SeenRows = Callable[[str, str, Split], np.ndarray]
"""(task trained on, task answered, split) -> `[N]`, whether train or dev of the first holds a row of the second."""

_AT_ONCE = 4096
_BRACKET = re.compile(r"-[lr][rsc]b-")
_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")


def find_seen_rows(study: Study) -> SeenRows:
    """A function that tells the seen rows of a comparison. Two texts count as one if their letters are equal."""

    def letters(task: str, ref: SplitRef, limit: int | None = None) -> Iterator[str]:
        split, tokenizer, architecture = open_split(ref, limit), study.checked.tokenizer, study.checked.architecture
        settings = study.settings.tasks[task]
        asked = task_input(task, settings)
        chat = task_chat(task, settings, asked, architecture, tokenizer)
        own = row_letters(asked.literals if isinstance(asked, TextTemplate) else chat.literals if chat else [])
        for first in range(0, len(split), _AT_ONCE):
            rows = [split.input_ids(row).tolist() for row in range(first, min(first + _AT_ONCE, len(split)))]
            yield from map(own, decode_inputs(tokenizer, architecture, rows, chat))

    @cache
    def learnt(task: str) -> np.ndarray:
        splits = study.corpora[task].splits
        return np.unique(np.concatenate([_digests(letters(task, splits[name])) for name in ("train", "dev")]))

    @cache
    def answered(task: str, split: Split) -> np.ndarray:
        return _digests(letters(task, study.corpora[task].splits[split], study.rows(task, split)))

    @cache  # asked once a candidate
    def seen(source: str, on: str, split: Split) -> np.ndarray:
        return np.isin(answered(on, split), learnt(source))

    return seen


def row_letters(literals: Sequence[str]) -> Callable[[str], str]:
    """A function that returns a row's own letters, without those of the literals around and between its columns."""
    pattern = re.compile("(.*?)".join(re.escape(_letters(literal)) for literal in literals))

    def own(text: str) -> str:
        found = _letters(text)
        match = pattern.fullmatch(found)
        return ("".join(match.groups()) if match else found) or text

    return own


def _letters(text: str) -> str:
    """Letters and digits only, without case and accents: `is n't` equals `isn't`, and `-lrb- a -rrb-` equals `(a)`."""
    plain = unicodedata.normalize("NFKD", _BRACKET.sub(" ", text.casefold()))
    plain = "".join(letter for letter in plain if not unicodedata.combining(letter))
    return _NEITHER_LETTER_NOR_DIGIT.sub("", plain)


def unseen_answers(
    answered: SplitAnswers, sources: Collection[str], on: str, split: Split, seen: SeenRows
) -> SplitAnswers | None:
    """The answers to rows that no task of `sources` except `on` was trained on; None if no row is left."""
    held = [seen(source, on, split) for source in sources if source != on]
    if not held:
        return answered
    left = ~np.any(held, axis=0)
    assert len(left) == len(answered.nll), "answers to other rows"
    return answered.only(left) if left.any() else None


def _digests(texts: Iterable[str]) -> np.ndarray:
    """Eight bytes for each text. They differ from process to process, so they are never stored."""
    return np.fromiter(map(hash, texts), np.int64)
