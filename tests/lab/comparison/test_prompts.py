"""A comparison's prompts: which one is a task's best, and the time and memory of its trials."""

from types import SimpleNamespace

import pytest

from pipeline.lab.comparison.candidates import Candidate, MeasuredCandidate
from pipeline.lab.comparison.prompts import _spent, _task_results


def test_a_tasks_best_prompt_is_the_best_seed_of_its_best_choice_not_the_luckiest_of_all():
    figures = {(1, 0): 0.95, (1, 1): 0.4, (2, 0): 0.8, (2, 1): 0.85}
    states = [SimpleNamespace(trial=SimpleNamespace(task="a"), status="tuned") for _ in figures]
    measured = [
        MeasuredCandidate(
            Candidate(f"{length}.{seed}", "prompt tuning", "a", {"prompt.length": length}, seed), value, 1 - value
        )
        for (length, seed), value in figures.items()
    ]
    (entry,) = _task_results(states, measured, {"a": "accuracy"})
    assert entry.chosen is states[3] and list(entry.trials) == states


def attempt(begins, trials, tuned):
    """A start of a phase that tunes for some seconds; trials: digest -> steps."""
    launched = [
        {"trial": digest, "task": "a", "max_steps": steps, "digest": digest} for digest, steps in trials.items()
    ]
    events = [("begin", {}), ("launch", {"trials": launched})]
    if tuned:
        events.append(("stage", {"name": "tuning", "text": "", "seconds": 10}))
        events.append(("memory", {"stage": "tuning", "peak_bytes": tuned}))
    times = [begins, begins + 1, begins + 10, begins + 10 + tuned]
    told = [{"event": event, "time": time, **rest} for (event, rest), time in zip(events, times, strict=False)]
    return [*told, {"event": "stage", "name": "publish", "text": "", "time": begins + 10 + tuned}]


@pytest.mark.parametrize(
    ("attempts", "seconds", "peak"),
    [
        ([({"a": 10, "b": 10}, 100)], 100, 100),
        ([({"a": 10, "b": 10}, 100), ({"a": 10, "b": 10}, 50)], 150, 100),  # killed, and gone on with
        ([({"x": 10, "y": 10}, 300), ({"a": 10, "b": 10}, 50)], 50, 50),  # of other settings, the names alike
        ([({"a": 10, "b": 10, "x": 60}, 80), ({"a": 10, "b": 10}, 0)], 20, 80),  # a choice was dropped since
        ([({"a": 10}, 40), ({"a": 10, "b": 10}, 60)], 100, 60),  # a choice was added since
    ],
)
def test_trials_are_charged_the_time_that_they_were_tuned_in_over_all_attempts(attempts, seconds, peak):
    events = [event for place, (trials, tuned) in enumerate(attempts) for event in attempt(1000 * place, trials, tuned)]
    assert _spent(events, {"a", "b"}) == (pytest.approx(seconds), peak)
