"""What a task's training has seen of another's rows is found whatever stands around it, and counts for no method."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.comparison import tables
from pipeline.comparison.candidates import Candidate, Measured
from pipeline.comparison.choice import choose, grouped
from pipeline.comparison.overlap import own_words, seen_rows_of
from pipeline.comparison.questions import Answered
from pipeline.corpus.reader import open_split
from tests.corpora import make_task, reviews, task_corpus
from tests.tiny import make_tokenizer

ROWS = 8
SEEN = np.array([True, False] * (ROWS // 2))
"""Of the task `other`, by the training of `own`."""


@pytest.mark.parametrize(
    ("text", "template", "words"),
    [
        ("It is GOOD , isn't it ?", "{text}", "it is good isn t it"),
        ("Review: so-so.\nIs it good?", "Review: {text}\nIs it good?", "so so"),
        ("review is a word: review", "{text}", "review is a word review"),
        ("premise: a hypothesis: b", "premise: {p} hypothesis: {h}", "a hypothesis b"),
    ],
)
def test_a_rows_own_words_are_those_that_the_template_did_not_put_there(text, template, words):
    assert own_words(text, template) == words


def test_rows_that_train_or_dev_of_another_task_hold_are_seen_and_no_others(tmp_path):
    tokenizer = make_tokenizer(eos_template=False)
    pairs = list(dict.fromkeys(reviews(120, 0)))
    texts: dict[str, str] = dict(pairs)
    assert len(texts) == len(pairs) > 90
    own = {"train": pairs[:30], "dev": pairs[30:40], "test": pairs[40:60]}
    there = {"train": pairs[60:70], "dev": pairs[70:80], "test": [*pairs[25:45], *pairs[80:90]]}
    corpora = {
        name: task_corpus(tmp_path, tokenizer, "decoder-only", name, splits)
        for name, splits in (("own", own), ("other", there))
    }
    checked = SimpleNamespace(tokenizer=tokenizer, architecture="decoder-only")
    study = SimpleNamespace(
        checked=checked,
        corpora=corpora,
        settings=SimpleNamespace(tasks=dict.fromkeys(corpora, make_task())),
        rows=lambda task, split: 25,
    )
    seen = seen_rows_of(study)("own", "other", "test")
    learnt = {text for text, _ in pairs[:40]}
    split = open_split(corpora["other"].splits["test"], 25)
    held = [tokenizer.decode(split.input_ids(row)) in learnt for row in range(len(split))]
    assert len(seen) == 25 and seen.tolist() == held and 0 < seen.sum() < 25
    assert not seen_rows_of(study)("other", "own", "test")[: len(seen)].all()


def answered(right: np.ndarray) -> Answered:
    """Answers that are right where it says so."""
    texts = ["yes" if one else "no" for one in right]
    scores = np.stack([np.log(np.where(right, 0.9, 0.1)), np.log(np.where(right, 0.1, 0.9))], axis=1)
    return Answered(np.where(right, 0.1, 2.3), np.ones(ROWS), ["yes"] * ROWS, texts, scores, ("yes", "no"))


def learnt_by_heart(seen):
    """Prompts, LoRA and hard prompts of `own`: right about the rows of `other` that were seen, wrong about the rest."""
    made = [
        Measured(Candidate(f"{method}.{seed}", method, "own", {}, seed), 0.9, 0.1)
        for method in ("hard prompt", "prompt tuning", "LoRA")
        for seed in (0, 1)
    ]
    plain = [Measured(Candidate(f"plain.{seed}", "prompt tuning", "other", {}, seed), 0.5, 0.7) for seed in (0, 1)]
    moved = [
        Measured(Candidate(f"moved.{seed}", "transferred prompt", "other", {"prompt.source": "own"}, seed), 0.9, 0.1)
        for seed in (0, 1)
    ]
    right = {(one.candidate.name, "other", "test"): answered(SEEN) for one in (*made, *moved)}
    right |= {(one.candidate.name, "other", "test"): answered(~SEEN) for one in plain}
    right |= {(one.candidate.name, "own", "test"): answered(np.ones(ROWS, bool)) for one in made}
    groups = grouped([*made, *plain, *moved])
    metrics = {"own": "accuracy", "other": "accuracy"}
    return groups, choose(groups, metrics), tables.Judged(right, metrics, seen)


def seen(source, on, split):
    assert (source, on) == ("own", "other"), "a task's own rows are asked of no one"
    return SEEN


def test_what_was_learnt_by_heart_is_no_transfer_for_any_method():
    _, chosen, judged = learnt_by_heart(seen)
    shifts = tables.shift_rows({"own": ("other",)}, chosen, judged)
    assert {(row.method, row.on): (row.test.mean, row.rows, row.seen) for row in shifts} == {
        (method, on): (1.0, ROWS, 0) if on == "own" else (0.0, ROWS // 2, ROWS // 2)
        for method in ("hard prompt", "prompt tuning", "LoRA")
        for on in ("own", "other")
    }


def test_a_start_from_another_task_is_held_against_no_start_on_the_same_rows():
    groups, chosen, judged = learnt_by_heart(seen)
    (row,) = tables.start_rows(groups, chosen, judged)
    assert (row.task, row.source, row.rows, row.seen) == ("other", "own", ROWS // 2, ROWS // 2)
    assert (row.started.mean, row.plain.mean) == (0.0, 1.0)
    of = {row.method: row for row in tables.rows(groups, chosen, judged) if row.task == "other"}
    assert of["transferred prompt"].test.mean == 0.0 and of["transferred prompt"].seen == ROWS // 2
    assert of["prompt tuning"].test.mean == 0.5 and of["prompt tuning"].seen == 0


def test_where_every_row_was_seen_there_is_no_figure():
    groups, chosen, judged = learnt_by_heart(lambda *_: np.ones(ROWS, bool))
    assert [row.on for row in tables.shift_rows({"own": ("other",)}, chosen, judged)] == ["own"] * 3
    assert tables.start_rows(groups, chosen, judged) == []
