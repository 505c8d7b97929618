"""Trials: what makes two of them the same."""

import pytest

from pipeline.settings import parse_settings
from pipeline.settings.tasks import TaskDefaults
from pipeline.tuning.trials import inputs_digest, make_trials


def test_a_trial_begun_with_other_products_is_not_taken_up_again():
    task = {"train": "in memory", "dev": "in memory"}
    made = {
        products: make_trials(
            parse_settings({"model": {"path": "x", "products": products}, "tasks": {"film": task}}),
            {"film": "corpus"},
            "backbone",
            {},
        )[0]
        for products in ("auto", "int8", "exact")
    }
    assert len({trial.digest for trial in made.values()}) == 3


def test_runs_and_nights_begun_before_there_were_chats_are_taken_up_again():
    defaults_then = {
        "optimizer": {"lr": 0.3, "schedule": "constant"},
        "max_steps": 30_000,
        "eval_every": 500,
        "patience": 10,
    }
    task = {"train": "t", "dev": "d", "separator": "\n", "sweep": {"prompt.length": [4, 8]}, **defaults_then}
    settings = parse_settings({"model": {"path": "x"}, "tasks": {"film": task}})
    digests = [trial.digest for trial in make_trials(settings, {"film": "corpus"}, "backbone", {})]
    assert digests == [
        "3ef4abb13bb5833b29202ac4b82b8a3dfe8a1a6b0bfd2cc30e4124e42543eaa8",
        "72cc35c52545205b93fe23984c64e15ce23ec4934480fa9426946da35a28a50f",
    ]
    assert inputs_digest(settings, "film", "corpus") == (
        "38367b2fe6b091f1962d73f368899730f7e9deb843671fc84ce1548192929048"
    )


def test_what_a_recipe_chose_and_the_same_written_out_are_one_trial():
    def digest(**task):
        settings = parse_settings({"model": {"path": "x"}, "tasks": {"film": {"train": "t", "dev": "d", **task}}})
        (trial,) = make_trials(settings, {"film": "corpus"}, "backbone", {})
        return trial.digest

    optimizer = {"name": "adafactor", "lr": 0.3, "weight_decay": 1e-5, "schedule": "constant"}
    prompt = {"length": 100, "init": "class_labels"}
    written = digest(prompt=prompt, optimizer=optimizer, batch_size=32, max_steps=30_000, eval_every=500, patience=10)
    assert digest(recipe="lester2021") == written != digest(recipe="lester2021", optimizer={"lr": 0.2})


@pytest.mark.parametrize("changed", [{"label_score": "mean"}, {"calibrate": True}, {"balance": True}], ids=str)
def test_how_labels_are_scored_and_rows_are_drawn_decides_a_trial_only_where_it_is_not_as_it_always_was(changed):
    def digests(**task):
        settings = parse_settings({"model": {"path": "x"}, "tasks": {"film": {"train": "t", "dev": "d", **task}}})
        (trial,) = make_trials(settings, {"film": "corpus"}, "backbone", {})
        return trial.digest, inputs_digest(settings, "film", "corpus")

    at_its_default = {key: TaskDefaults.model_fields[key].default for key in changed}
    assert digests(**at_its_default) == digests()
    assert len({*digests(), *digests(**changed)}) == 4


def test_a_chats_options_decide_its_prompt_and_a_texts_do_not():
    def digests(**task):
        given = {"train": "t", "dev": "d", **task}
        settings = parse_settings({"model": {"path": "x"}, "tasks": {"film": given}})
        (trial,) = make_trials(settings, {"film": "corpus"}, "backbone", {})
        return trial.digest, inputs_digest(settings, "film", "corpus")

    options = {"chat_options": {"enable_thinking": True}}
    assert digests() == digests(**options)
    chat = {"input": [{"role": "user", "content": "{text}"}]}
    assert len({*digests(), *digests(**chat), *digests(**chat, **options)}) == 6
