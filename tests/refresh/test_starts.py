"""Warm starts beside cold ones: the same trials twice, from the bank's prompt and from where the settings start."""

import pytest

from pipeline.errors import SettingsError
from pipeline.refresh.plan import PlannedTask
from pipeline.refresh.starts import is_warm, with_warm_starts
from pipeline.settings import parse_settings
from pipeline.tuning.trials import inputs_digest, make_trials
from tests.refresh.records import make_record

WARM = PlannedTask("film", "warm", "its corpus changed", make_record())


def make_settings(*overrides: str, **film):
    raw = {
        "model": {"path": "x"},
        "tasks": {
            "film": {"train": "a", "dev": "b", "prompt": {"length": 4}, **film},
            "book": {"train": "a", "dev": "b"},
        },
    }
    return parse_settings(raw, overrides)


def trials(settings, task="film"):
    made = make_trials(settings, {"film": "corpus", "book": "corpus"}, "backbone", {})
    return [trial for trial in made if trial.task == task]


def test_a_task_without_a_sweep_gets_one_trial_of_each_side_on_the_same_rows():
    settings = make_settings()
    own = trials(with_warm_starts(settings, [WARM], 3))
    assert [is_warm(trial, 3) for trial in own] == [False, True]
    cold, warm = own
    assert warm.settings.prompt.source == "film@3" and cold.settings.prompt.init == "sampled_vocab"
    assert warm.seed == cold.seed and warm.settings.batch_size == cold.settings.batch_size
    assert with_warm_starts(settings, [WARM], 3).tasks["book"] == settings.tasks["book"]


def test_of_a_prompt_with_several_starts_the_warm_side_has_the_banks_alone():
    cold, warm = trials(with_warm_starts(make_settings(prompt={"length": 4, "starts": 8}), [WARM], 3))
    assert cold.settings.prompt.draws == 8 and warm.settings.prompt.draws == 1


def test_the_cold_side_can_be_switched_off():
    (only,) = trials(with_warm_starts(make_settings("refresh.cold_side=false"), [WARM], 3))
    assert is_warm(only, 3) and only.name == "film"


@pytest.mark.parametrize("cold_side", [True, False])
@pytest.mark.parametrize(
    ("sweep", "prompt"),
    [
        ({"prompt.length": [4, 8], "optimizer.lr": [0.1, 0.2]}, {}),
        ({"prompt.init": ["random", "sampled_vocab"]}, {}),
        ({"prompt.init": ["bank", "random"]}, {"source": "book@1"}),
        ({"prompt.init": ["bank"], "prompt.source": ["book@1", "film@3"]}, {}),
        ({"seed": [0, 1]}, {"init": "bank", "source": "book@1"}),
        ({"seed": [0, 1]}, {"starts": 8}),
        ({"prompt.starts": [1, 8]}, {}),
    ],
)
def test_every_choice_of_a_sweep_gets_its_warm_side(sweep, prompt, cold_side):
    settings = make_settings(f"refresh.cold_side={str(cold_side).lower()}", sweep=sweep, prompt={"length": 4, **prompt})
    before, after = trials(settings), trials(with_warm_starts(settings, [WARM], 3))
    warm = [trial for trial in after if is_warm(trial, 3)]
    rest = {(t.settings.prompt.length, t.settings.optimizer.lr, t.seed) for t in before}
    assert {(t.settings.prompt.length, t.settings.optimizer.lr, t.seed) for t in warm} == rest
    assert len({trial.digest for trial in after}) == len(after)
    assert (len(warm) == len(after)) == (not cold_side)


def test_halving_stays_where_there_is_a_sweep_and_leaves_with_it():
    halved = make_settings(
        "refresh.cold_side=false", sweep={"prompt.init": ["random", "text"]}, prompt={"length": 4, "text": "good"},
        halving={"first": 1}, eval_every=10, max_steps=100,
    )  # fmt: skip
    assert with_warm_starts(halved, [WARM], 3).tasks["film"].halving is None
    swept = make_settings(sweep={"seed": [0, 1]}, halving={"first": 1}, eval_every=10, max_steps=100)
    assert with_warm_starts(swept, [WARM], 3).tasks["film"].halving is not None


def test_more_trials_than_there_may_be_are_refused_with_the_mend():
    settings = make_settings(sweep={"seed": list(range(900))})
    with pytest.raises(SettingsError, match=r"1,800 trials.*refresh.cold_side: false"):
        with_warm_starts(settings, [WARM], 3)


def test_what_a_task_is_tuned_from_does_not_depend_on_where_it_starts_tonight():
    settings = make_settings()
    digest = inputs_digest(settings, "film", "corpus")
    assert digest == inputs_digest(make_settings(max_bad_rows=0.5, train="elsewhere"), "film", "corpus")
    assert digest == inputs_digest(make_settings("refresh.alpha=0.01", "run.name=other"), "film", "corpus")
    changes = [
        {"input": "review: {text}"}, {"max_steps": 7}, {"sweep": {"seed": [0, 1]}}, {"sweep": {"seed": [0, 2]}},
        {"prompt": {"length": 5}}, {"seed": 9}, {"eval_rows": 3}, {"labels": ["a", "b"]},
    ]  # fmt: skip
    others = [inputs_digest(make_settings(**change), "film", "corpus") for change in changes]
    others.append(inputs_digest(settings, "film", "more rows"))
    others.append(inputs_digest(make_settings("model.products=exact"), "film", "corpus"))
    assert len({digest, *others}) == len(others) + 1
