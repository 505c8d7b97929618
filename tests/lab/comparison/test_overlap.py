"""Rows of a task that another task's training has seen are found in any template, and count for no method."""

from types import SimpleNamespace

import numpy as np
import pytest

from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import task_chat, task_input
from pipeline.corpus.template import parse_template
from pipeline.errors import SettingsError
from pipeline.lab.comparison import tables
from pipeline.lab.comparison.candidates import Candidate, MeasuredCandidate
from pipeline.lab.comparison.checks import check_model
from pipeline.lab.comparison.choice import choose_best, group_over_seeds
from pipeline.lab.comparison.overlap import find_seen_rows, row_letters
from pipeline.lab.comparison.questions import SplitAnswers
from pipeline.settings import parse_settings
from tests.chats import TEMPLATES, chat_tokenizer
from tests.corpora import make_task, reviews, task_corpus
from tests.tiny import make_tokenizer

ROWS = 8
SEEN = np.array([True, False] * (ROWS // 2))
"""Of the task `other`, by the training of `own`."""


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("it is n't GOOD , is it ?", "It isn't good, is it?"),
        ("a -lrb- very -rrb- bad café", "A (very) bad cafe\u0301!"),
    ],
)
def test_two_spellings_of_a_text_are_one(text, other):
    own = row_letters(["", ""])
    assert own(text) == own(other)


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        ("{p} {h}", "a man sleeps . nobody sleeps"),
        ("premise: {p} hypothesis: {h}", "premise: a man sleeps . hypothesis: nobody sleeps"),
        ("{p}\n{h}\nDoes it follow?", "a man sleeps .\nnobody sleeps\nDoes it follow?"),
    ],
)
def test_what_a_template_puts_around_and_between_is_not_the_rows_own(template, rendered):
    assert row_letters(parse_template(template, "").literals)(rendered) == row_letters(["", ""])(
        "A man sleeps. Nobody sleeps."
    )


def test_texts_without_a_letter_are_not_all_one():
    own = row_letters(["review: ", ""])
    assert own("review: !!") != own("review: ...")


def test_rows_that_train_or_dev_of_another_task_hold_are_seen_and_no_others(tmp_path):
    tokenizer = make_tokenizer(eos_template=False)
    pairs = list(dict.fromkeys(reviews(120, 0)))
    assert len(dict(pairs)) == len(pairs) > 90
    own = {"train": pairs[:30], "dev": pairs[30:40], "test": pairs[40:60]}
    there = {"train": pairs[60:70], "dev": pairs[70:80], "test": [*pairs[25:45], *pairs[80:90]]}
    around = {split: [(f"film {text} film", label) for text, label in rows] for split, rows in there.items()}
    corpora = {
        name: task_corpus(tmp_path, tokenizer, "decoder-only", name, splits)
        for name, splits in (("own", own), ("other", around))
    }
    tasks = {"own": make_task(), "other": make_task(input="film {text} film")}
    study = SimpleNamespace(
        checked=SimpleNamespace(tokenizer=tokenizer, architecture="decoder-only"),
        corpora=corpora,
        settings=SimpleNamespace(tasks=tasks),
        rows=lambda task, split: 25,
    )
    seen = find_seen_rows(study)("own", "other", "test")
    learnt = {f"film {text} film" for text, _ in pairs[:40]}
    split = open_split(corpora["other"].splits["test"], 25)
    held = [tokenizer.decode(split.input_ids(row)) in learnt for row in range(len(split))]
    assert len(seen) == 25 and seen.tolist() == held and 0 < seen.sum() < 25
    assert not find_seen_rows(study)("other", "own", "test").any()


@pytest.mark.parametrize("template", ["chatml", "gemma", "llama3"])
def test_rows_of_a_chat_are_compared_by_what_their_columns_say(tmp_path, template):
    tokenizer = chat_tokenizer(TEMPLATES[template])
    pairs = list(dict.fromkeys(reviews(60, 0)))
    task = make_task(input=[{"role": "user", "content": "Is it good? {text}"}])
    asked = task_chat("chat", task, task_input("chat", task), "decoder-only", tokenizer)
    texts = task_corpus(tmp_path, tokenizer, "decoder-only", "text", {"train": pairs[:20], "dev": pairs[20:30]})
    splits = {"train": pairs[40:45], "dev": pairs[45:50], "test": pairs[25:40]}
    chats = task_corpus(tmp_path, tokenizer, "decoder-only", "chat", splits, asked)
    study = SimpleNamespace(
        checked=SimpleNamespace(tokenizer=tokenizer, architecture="decoder-only"),
        corpora={"text": texts, "chat": chats},
        settings=SimpleNamespace(tasks={"text": make_task(), "chat": task}),
        rows=lambda task, split: 25,
    )
    seen = find_seen_rows(study)("text", "chat", "test")
    assert (len(seen), seen.sum()) == (15, 5)


def test_hard_prompts_are_refused_for_chats_before_anything_is_tuned():
    task = {"train": "t", "dev": "d", "input": [{"role": "user", "content": "{text}"}]}
    settings = parse_settings({"model": {"path": "x"}, "tasks": {"film": task}})
    with pytest.raises(SettingsError, match=r"compare\.hard_prompts: the input of 'film' is a chat"):
        check_model(SimpleNamespace(settings=settings))


def answered(right: np.ndarray) -> SplitAnswers:
    """Answers that are right where it says so."""
    texts = ["yes" if one else "no" for one in right]
    scores = np.stack([np.log(np.where(right, 0.9, 0.1)), np.log(np.where(right, 0.1, 0.9))], axis=1)
    return SplitAnswers(np.where(right, 0.1, 2.3), np.ones(ROWS), ["yes"] * ROWS, texts, scores, ("yes", "no"))


def learnt_by_heart(seen):
    """Prompts, LoRA and hard prompts of `own`: right about the rows of `other` that were seen, wrong about the rest."""
    made = [
        MeasuredCandidate(Candidate(f"{method}.{seed}", method, "own", {}, seed), 0.9, 0.1)
        for method in ("hard prompt", "prompt tuning", "LoRA")
        for seed in (0, 1)
    ]
    plain = [
        MeasuredCandidate(Candidate(f"plain.{seed}", "prompt tuning", "other", {}, seed), 0.5, 0.7) for seed in (0, 1)
    ]
    moved = [
        MeasuredCandidate(
            Candidate(f"moved.{seed}", "transferred prompt", "other", {"prompt.source": "own"}, seed), 0.9, 0.1
        )
        for seed in (0, 1)
    ]
    right = {(one.candidate.name, "other", "test"): answered(SEEN) for one in (*made, *moved)}
    right |= {(one.candidate.name, "other", "test"): answered(~SEEN) for one in plain}
    right |= {(one.candidate.name, "own", "test"): answered(np.ones(ROWS, bool)) for one in made}
    groups = group_over_seeds([*made, *plain, *moved])
    metrics = {"own": "accuracy", "other": "accuracy"}
    return groups, choose_best(groups, metrics), tables.CountedAnswers(right, metrics, seen)


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
    of = {row.method: row for row in tables.method_rows(groups, chosen, judged) if row.task == "other"}
    assert of["transferred prompt"].test.mean == 0.0 and of["transferred prompt"].seen == ROWS // 2
    assert of["prompt tuning"].test.mean == 0.5 and of["prompt tuning"].seen == 0


def test_where_every_row_was_seen_there_is_no_figure():
    groups, chosen, judged = learnt_by_heart(lambda *_: np.ones(ROWS, bool))
    assert [row.on for row in tables.shift_rows({"own": ("other",)}, chosen, judged)] == ["own"] * 3
    assert tables.start_rows(groups, chosen, judged) == []


def test_all_methods_of_a_shift_table_are_judged_on_the_same_rows():
    started = MeasuredCandidate(Candidate("s", "transferred prompt", "other", {"prompt.source": "own"}, 0), 0.9, 0.1)
    plain = MeasuredCandidate(Candidate("p", "prompt tuning", "other", {}, 0), 0.9, 0.1)
    answers = {(one.candidate.name, "third", "test"): answered(SEEN) for one in (started, plain)}

    def of_own(source, on, split):
        return SEEN if source == "own" else np.zeros(ROWS, bool)

    chosen = choose_best(group_over_seeds([started, plain]), {"other": "accuracy"})
    judged = tables.CountedAnswers(answers, {"other": "accuracy", "third": "accuracy"}, of_own)
    rows = tables.shift_rows({"other": ("third",)}, chosen, judged)
    assert {(row.method, row.test.mean, row.rows, row.seen) for row in rows} == {
        ("prompt tuning", 0.0, ROWS // 2, ROWS // 2), ("transferred prompt", 0.0, ROWS // 2, ROWS // 2),
    }  # fmt: skip
