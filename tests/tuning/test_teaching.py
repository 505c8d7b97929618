"""Trials with a teacher: what their words are, what each row's loss is, and that it comes down."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import processors
from torch.nn import Parameter

from pipeline.backbone import prompted
from pipeline.corpus.encoding import encode_inputs
from pipeline.corpus.reader import open_split
from pipeline.corpus.token_set import flat_column
from pipeline.settings import parse_settings
from pipeline.tuning.batches import rows_of_step, unlabelled_rows_of_step
from pipeline.tuning.initialise import initial_prompt
from pipeline.tuning.loop import tune
from pipeline.tuning.progress import TuningRun
from pipeline.tuning.step import TrialStep, batch_of_step, losses_and_gradients
from pipeline.tuning.teaching import asked_at_labels, drawn_examples, make_teacher, teacher_ids
from pipeline.tuning.trials import inputs_digest, make_trials
from tests.corpora import make_corpus, reviews, trial, write_unlabelled

TEXT = "the film is good or bad and the story was not very great"
TEACHERS = {
    "none": None,
    "text": {"text": TEXT, "between": " ", "weight": 1.0},
    "examples": {"examples": 10, "between": " ", "weight": 0.25},
    "both": {"text": TEXT, "examples": 5, "between": " ", "weight": 0.5},
    "more rows": {"examples": 10, "between": " ", "weight": 0.3, "unlabelled": "unused"},
}


def steps_of(model, folder, step=0, names=tuple(TEACHERS)):
    """One step's work of a trial for each kind of teacher."""
    backbone, tokenizer, _ = model
    work = []
    for name in names:
        corpus = make_corpus(folder / name, tokenizer, backbone.architecture, "film", unlabelled=9)
        own = trial("film", corpus, teacher=TEACHERS[name], batch_size=16)
        train = open_split(corpus.splits["train"])
        prompt = torch.randn(5, 32, generator=torch.Generator().manual_seed(len(name)))
        teacher = make_teacher(own, backbone, tokenizer, train) if own.settings.teacher else None
        more = None
        if own.settings.teacher and own.settings.teacher.unlabelled:
            more = asked_at_labels(open_split(corpus.splits["unlabelled"]), corpus.labels, corpus.label_ids)
        work.append(TrialStep(own, Parameter(prompt), step, train, teacher, more))
    return work


def test_a_trial_gets_among_trials_with_and_without_teachers_what_it_gets_alone(model, tmp_path):
    backbone, together = model[0], steps_of(model, tmp_path)
    losses, _ = losses_and_gradients(backbone, together, 10_000)
    for part, loss in zip(together, losses, strict=True):
        gradient = part.prompt.grad.clone()
        for budget in (10_000, 120):  # and in one pass or in many
            (alone,), _ = losses_and_gradients(backbone, [part], budget)
            assert alone == pytest.approx(loss, rel=1e-5)
            torch.testing.assert_close(part.prompt.grad, gradient, rtol=1e-4, atol=1e-6)


def test_who_has_no_teacher_gets_beside_those_who_have_one_the_same_numbers_bit_by_bit(model, tmp_path):
    backbone, (plain, *taught) = model[0], steps_of(model, tmp_path)
    losses, _ = losses_and_gradients(backbone, [plain], 10_000)
    gradient = plain.prompt.grad.clone()
    beside, _ = losses_and_gradients(backbone, [plain, *taught], 10_000)
    assert beside[0] == losses[0] and torch.equal(plain.prompt.grad, gradient)


@pytest.mark.parametrize("name", ["text", "examples", "both"])
def test_the_loss_is_the_rows_own_over_the_trials_target_tokens_and_shown_rows_have_their_labels_alone(
    model, tmp_path, name
):
    backbone, tokenizer, _ = model
    (part,) = steps_of(model, tmp_path, step=1, names=(name,))
    (found,), counts = losses_and_gradients(backbone, [part], 10_000)
    numbers, train, weight = rows_of_step(part.trial, part.train, 1), part.train, TEACHERS[name]["weight"]
    shown = {int(train.row_ids[n]) for n in drawn_examples(part.trial, len(train))}
    assert len(shown) == TEACHERS[name].get("examples", 0)
    words = backbone.embed(torch.as_tensor(expected_words(part, tokenizer, backbone.architecture)))
    total, taught = 0.0, 0
    for n in numbers:
        x, y = train.input_ids(n), train.target_ids(n)
        row = prompted.Rows([part.prompt], [0], [x])
        nll = float(backbone.run(prompted.target_nll, row, [y]).detach())
        if int(train.row_ids[n]) in shown:
            total += nll
            continue
        teacher = prompted.Rows([words], [0], [x])  # the tiny tokenizers put nothing before a text
        kl = float(backbone.run(prompted.target_distillation, row, [y], teacher, [1.0]).detach())
        total, taught = total + (1 - weight) * nll + weight * kl, taught + 1
    assert 0 < taught <= len(numbers) and (taught < len(numbers) or not shown), "both kinds of row are there"
    assert found == pytest.approx(total / sum(len(train.target_ids(n)) for n in numbers), rel=1e-4)
    assert counts.computed > counts.text + counts.padding + len(words)


def test_labels_and_teacher_have_their_shares_of_the_loss_however_many_rows_have_no_label(model, tmp_path):
    """Of 16 rows 8 are unlabelled: the labels' loss is a mean over labelled tokens, the teacher's one over all."""
    backbone = model[0]
    (part,) = steps_of(model, tmp_path, step=2, names=("more rows",))
    (found,), _ = losses_and_gradients(backbone, [part], 10_000)
    gradient, part.prompt.grad = part.prompt.grad, None
    numbers = rows_of_step(part.trial, part.train, 2, 8)
    rows = [(part.train, int(n), part.teacher.teaches(part.train, n)) for n in numbers]
    rows += [(part.unlabelled, int(n), True) for n in unlabelled_rows_of_step(part.trial, part.unlabelled, 2)]
    assert len(rows) == 16 and {taught for *_, taught in rows} == {True, False}

    def loss_of(share, split, n):
        row, behind = (prompted.Rows([p], [0], [split.input_ids(n)]) for p in (part.prompt, part.teacher.words))
        return backbone.run(prompted.target_distillation, row, [split.target_ids(n)], behind, [share]).sum()

    nll = sum(loss_of(0.0, split, n) for split, n, _ in rows[:8])
    # A row that the teacher sees solved has its label in the teacher's place.
    taught = sum(loss_of(float(taught), split, n) for split, n, taught in rows)
    tokens = [len(split.target_ids(n)) for split, n, _ in rows]
    expected = 0.7 * nll / sum(tokens[:8]) + 0.3 * taught / sum(tokens)
    expected.backward()
    assert found == pytest.approx(float(expected.detach()), rel=1e-4)
    torch.testing.assert_close(gradient, part.prompt.grad, rtol=1e-3, atol=1e-6)


def test_without_unlabelled_rows_a_tokens_weight_and_its_teachers_share_are_what_they_always_were(model, tmp_path):
    for name, weight in (("none", 0.0), ("text", 1.0), ("both", 0.5)):
        (part,) = steps_of(model, tmp_path, names=(name,))
        rows = batch_of_step([part])
        assert {row.weight for row in rows} == {1.0 / sum(len(row.split.target_ids(row.number)) for row in rows)}
        assert all(row.share == (weight if row.teacher else 0.0) for row in rows)


def test_the_label_at_which_the_teacher_is_asked_follows_from_the_row_alone(model, tmp_path):
    backbone, tokenizer, _ = model
    texts = [text for text, _ in reviews(40, 5)]
    labels, ids = ("bad", "good", "fine film"), ((3, 1), (4, 1), (5, 6, 1))
    drawn = {}
    for place, some in enumerate((texts, texts[::-3])):
        ref = write_unlabelled(tmp_path / str(place), tokenizer, backbone.architecture, some)
        asked = asked_at_labels(open_split(ref), labels, ids)
        assert len(asked) == len(some)
        for row in range(len(asked)):
            label = asked.target(row)
            assert tuple(asked.target_ids(row)) == ids[labels.index(label)]
            assert drawn.setdefault(int(asked.row_ids[row]), label) == label
    assert set(drawn.values()) == set(labels)


def expected_words(part, tokenizer, architecture):
    """The tokens of the text and of the solved rows, written out here."""
    settings, train = part.trial.settings, part.train
    texts = [TEXT] if settings.teacher.text else []
    end = -1 if architecture == "encoder-decoder" else None
    for n in drawn_examples(part.trial, len(train)):
        texts.append(tokenizer.decode(train.input_ids(int(n))[:end]) + " " + train.target(int(n)))
    return tokenizer(" ".join(texts), add_special_tokens=False).input_ids


def test_special_tokens_stand_once_around_words_and_row(model, tmp_path):
    """An encoder's eos stands behind the row alone; what a decoder's tokenizer begins with, before the words alone."""
    backbone, tokenizer, _ = model
    (part,) = steps_of(model, tmp_path, names=("text",))
    if backbone.architecture == "decoder-only":
        tokenizer = type(tokenizer).from_pretrained(model[2])
        begins = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
        tokenizer.backend_tokenizer.post_processor = begins
    whole = encode_inputs(tokenizer, backbone.architecture, [f"{TEXT} good film"])[0]
    (row,) = encode_inputs(tokenizer, backbone.architecture, ["good film"])
    train = part.train
    ids = teacher_ids(part.trial.settings, train, (), tokenizer, backbone.architecture)
    teacher = make_teacher(part.trial, backbone, tokenizer, train)
    flat = np.array(row, np.int32)
    one = replace(train, inputs=flat_column(flat, np.array([0, len(flat)])))
    assert [*ids, *teacher.input_ids(one, 0)] == whole
    empty = encode_inputs(tokenizer, backbone.architecture, [""])[0]
    if empty:
        none = replace(train, inputs=flat_column(np.array(empty, np.int32), np.array([0, len(empty)])))
        assert len(teacher.input_ids(none, 0)) > 0, "a row of no token could not run"


def test_a_teacher_brings_its_students_distribution_closer(model, tmp_path):
    backbone, tokenizer, _ = model
    corpus = make_corpus(tmp_path / "corpora", tokenizer, backbone.architecture, "film")
    own = trial("film", corpus, teacher=TEACHERS["text"], max_steps=20, optimizer={"lr": 0.05})
    run = TuningRun([own], {"film": corpus}, tmp_path / "run", 4, checkpoint_every=50, token_budget=500)
    train = open_split(corpus.splits["train"])
    teacher = make_teacher(own, backbone, tokenizer, train)
    (state,) = tune(run, backbone, tokenizer)

    def divergence(prompt):
        rows = range(len(train))
        student, behind = (
            prompted.Rows([before], [0] * len(train), [train.input_ids(n) for n in rows])
            for before in (prompt, teacher.words)
        )
        targets = [train.target_ids(n) for n in rows]
        with torch.no_grad():
            kl = backbone.run(prompted.target_distillation, student, targets, behind, [1.0] * len(train))
        return float(kl.mean())

    first = divergence(initial_prompt(own, backbone, tokenizer, corpus.labels, {}))
    assert state.step == 20 and divergence(state.prompt.detach()) < 0.7 * first


def digests(**task):
    settings = parse_settings({"model": {"path": "x"}, "tasks": {"film": {"train": "t", "dev": "d", **task}}})
    trials = make_trials(settings, {"film": "corpus"}, "backbone", {})
    return [trial.digest for trial in trials], inputs_digest(settings, "film", "corpus")


def test_what_a_text_file_says_decides_the_prompt_and_where_it_lies_does_not(tmp_path):
    for name, words in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(words)
    of_a, of_b, of_c = (digests(teacher={"text_file": str(tmp_path / name)}) for name in "abc")
    assert of_a == of_b == digests(teacher={"text": "one"})
    assert of_a[0] != of_c[0] and of_a[1] != of_c[1]
    assert digests()[0] != of_a[0] and digests(teacher=None) == digests()


def test_what_unlabelled_rows_hold_decides_the_prompt_and_where_they_lie_does_not():
    """What they hold is in the digest of the corpus."""
    of_a, of_b = (digests(teacher={"text": "one", "unlabelled": path}) for path in ("a.parquet", ["b", "c"]))
    assert of_a == of_b == digests(teacher={"text": "one"})


def test_a_sweep_over_the_teachers_share_has_a_trial_for_each():
    swept = {"teacher": {"text": "one"}, "sweep": {"teacher.weight": [0.25, 1.0]}}
    first, second = digests(**swept)[0]
    assert [first] == digests(teacher={"text": "one", "weight": 0.25})[0]
    assert [second] == digests(teacher={"text": "one", "weight": 1.0})[0]
