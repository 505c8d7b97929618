"""Choices are made on dev alone: nothing that is tuned or chosen has seen a test row."""

from dataclasses import fields, replace

import numpy as np
import pytest

from pipeline.corpus.reader import SplitRef
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import SettingsError
from pipeline.lab.comparison.candidates import Candidate, MeasuredCandidate
from pipeline.lab.comparison.choice import choose_best, group_over_seeds, spread
from pipeline.lab.comparison.derived_settings import comparison_settings
from pipeline.lab.comparison.study import without_test_splits
from pipeline.settings import parse_settings
from tests.lab.comparison.found import candidates, results


def measured(length: int, seed: int, value: float, loss: float = 1.0, failed: str | None = None) -> MeasuredCandidate:
    candidate = Candidate(f"a.{length}.{seed}", "prompt tuning", "a", {"prompt.length": length}, seed)
    return MeasuredCandidate(candidate, value, loss, failed=failed)


def chosen_length(*members: MeasuredCandidate, metric: str = "accuracy") -> int:
    (group,) = choose_best(group_over_seeds(members), {"a": metric}).values()
    return group.choice["prompt.length"]


@pytest.mark.parametrize("on_test", [lambda dev: 1 - dev, lambda dev: 0.5, lambda dev: (dev * 7919) % 1])
def test_whatever_the_test_rows_say_the_same_is_chosen(on_test):
    own = candidates()
    usual = {(row.method, row.task): row.choice for row in results(own).rows if row.chosen}
    found = results(own, on_test)
    assert {(row.method, row.task): row.choice for row in found.rows if row.chosen} == usual
    for row in found.rows:  # though what is reported is what they say
        dev = [n.dev for n in found.numbers if (n.method, n.task, n.choice) == (row.method, row.task, row.choice)]
        assert row.test.mean == pytest.approx(np.mean([on_test(value) for value in dev]), abs=0.005)


def test_what_is_chosen_from_has_no_test_metric():
    assert not [field.name for field in fields(MeasuredCandidate) if "test" in field.name]


def test_ranks_that_tune_are_given_no_test_split():
    splits = {name: SplitRef(name) for name in ("train", "dev", "test")}
    corpus = TaskCorpus("a", splits, None, None, {}, "digest")
    (seen,) = without_test_splits({"a": corpus}).values()
    assert set(seen.splits) == {"train", "dev"} and replace(seen, splits=splits) == corpus


def test_the_best_mean_over_seeds_is_chosen_not_the_best_seed():
    lucky = [measured(1, 0, 0.95), measured(1, 1, 0.4)]
    steady = [measured(2, 0, 0.8), measured(2, 1, 0.8)]
    assert chosen_length(*lucky, *steady) == 2
    assert chosen_length(*lucky, *steady, metric="loss") == 1


def test_equal_means_fall_to_the_lower_loss_and_then_to_the_first():
    assert chosen_length(measured(1, 0, 0.8, 1.0), measured(2, 0, 0.8, 0.5)) == 2
    assert chosen_length(measured(1, 0, 0.8), measured(2, 0, 0.8)) == 1


def test_a_choice_of_which_a_seed_failed_is_taken_only_where_every_choice_has_one():
    broken = [measured(1, 0, 0.9), measured(1, 1, 0.0, failed="NaN")]
    assert chosen_length(*broken, measured(2, 0, 0.5)) == 2
    assert chosen_length(*broken, measured(2, 0, 0.5, failed="NaN")) == 1
    assert choose_best(group_over_seeds([measured(1, 0, 0.9, failed="NaN")]), {"a": "accuracy"}) == {}


def test_spread_is_the_samples_and_of_one_seed_there_is_none():
    found = spread([0.1, 0.3, 0.5])
    assert found.mean == pytest.approx(0.3) and found.deviation == pytest.approx(0.2)
    assert spread([0.1]).deviation is None and spread([]) is None


def plain(**tasks):
    own = {name: {"train": "x", **task} for name, task in tasks.items()}
    return {"model": {"path": "x"}, "defaults": {"dev_fraction": 0.1}, "tasks": own}


def test_a_comparison_tunes_every_trial_to_its_end():
    halved = {"sweep": {"prompt.length": [1, 2]}, "halving": {"first": 1}, "max_steps": 20, "eval_every": 5}
    settings = comparison_settings(parse_settings(plain(a=halved)))
    assert settings.tasks["a"].halving is None and len(settings.tasks["a"].trials("a")) == 6


def test_too_many_trials_by_the_comparisons_seeds_is_one_sentence_that_names_them():
    sweep = {"prompt.length": list(range(1, 401))}
    with pytest.raises(SettingsError, match=r"^with compare.seeds 3: .*1,200 trials, more than 1,000"):
        comparison_settings(parse_settings(plain(a={"sweep": sweep})))


def test_every_task_gets_the_comparisons_seeds_unless_it_names_its_own():
    settings = comparison_settings(
        parse_settings(
            {
                "model": {"path": "x"},
                "defaults": {"dev_fraction": 0.1},
                "tasks": {
                    "a": {"train": "x"},
                    "b": {"train": "x", "seed": 4},
                    "c": {"train": "x", "sweep": {"seeds": 2, "prompt.length": [1, 2]}},
                },
                "compare": {"seeds": 5},
            }
        )
    )
    seeds = {name: [t.seed for t in task.trials(name).values()] for name, task in settings.tasks.items()}
    assert seeds == {"a": [0, 1, 2, 3, 4], "b": [4], "c": [0, 1, 0, 1]}
