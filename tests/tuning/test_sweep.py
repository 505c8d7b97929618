"""Sweeps in the loop: slots are always filled, and neither that nor halving changes what a trial becomes."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.settings import parse_settings
from pipeline.tuning import loop
from pipeline.tuning import slots as slots_module
from pipeline.tuning.loop import tune
from pipeline.tuning.progress import TuningRun
from pipeline.tuning.state import winner
from pipeline.tuning.trials import make_trials
from tests.corpora import make_corpus, make_task, trial
from tests.killed import killed_at_call
from tests.ranks import run_ranks

pytestmark = pytest.mark.parametrize("model", ["llama"], indirect=True)
SWEEP = {"prompt.length": [2, 5], "optimizer.lr": [0.01, 0.3], "seed": [0, 1]}
HALVING = {"first": 1, "factor": 2}


def make_run(folder, tokenizer, slots=64, halving=None, **second) -> TuningRun:
    """A task swept over eight trials with rungs after 1, 2 and 4 of 6 evaluations, and a task of one trial."""
    tasks = {
        "film": make_task(max_steps=18, eval_every=3, sweep=SWEEP, halving=halving),
        "book": make_task(max_steps=13, eval_every=5, **second),
    }
    plain = {name: task.model_dump(mode="json") for name, task in tasks.items()}
    corpora = {
        name: make_corpus(folder / "corpora", tokenizer, "decoder-only", name, seed) for seed, name in enumerate(tasks)
    }
    digests = {name: corpus.digest for name, corpus in corpora.items()}
    trials = make_trials(parse_settings({"model": {"path": "x"}, "tasks": plain}), digests, "backbone", {})
    return TuningRun(trials, corpora, folder / "run", max_live_trials=slots, checkpoint_every=4, token_budget=256)


def run(model, folder, slots=64, halving=None, **second):
    backbone, tokenizer, _ = model
    return tune(make_run(folder, tokenizer, slots, halving, **second), backbone, tokenizer)


def distance(a, b) -> float:
    a, b = a.prompt.detach(), b.prompt.detach()
    return float((a - b).norm() / b.norm())


def lives(monkeypatch) -> list[set[str]]:
    """The trials of every step from now on."""
    steps: list[set[str]] = []
    real = loop.losses_and_gradients

    def watched(backbone, work, budget):
        steps.append({part.trial.name for part in work})
        return real(backbone, work, budget)

    monkeypatch.setattr(loop, "losses_and_gradients", watched)
    return steps


@pytest.mark.parametrize("slots", [1, 3, 4])
def test_every_slot_is_taken_in_every_step_until_no_trial_waits(model, tmp_path, monkeypatch, slots):
    steps = lives(monkeypatch)
    states = run(model, tmp_path, slots)
    seen: set[str] = set()
    for live in steps:
        seen |= live
        assert len(live) == slots or len(seen) == len(states), "a slot is empty while a trial waits"
    assert len(seen) == 9 and sum(map(len, steps)) == sum(state.step for state in states) == 8 * 18 + 13


def test_a_trial_that_fails_where_it_starts_gives_its_slot_away_before_the_next_step(model, tmp_path, monkeypatch):
    real = slots_module.initial_prompt

    def broken(trial, *rest):
        prompt = real(trial, *rest)
        return prompt * float("nan") if "seed-1" in trial.name else prompt

    monkeypatch.setattr(slots_module, "initial_prompt", broken)
    steps = lives(monkeypatch)
    states = run(model, tmp_path, slots=5)
    assert len(steps[0]) == 5 and sum(state.status == "failed" for state in states) == 4


def test_a_trial_of_a_sweep_ends_with_the_prompt_of_a_task_given_its_choice_alone(model, tmp_path):
    backbone, tokenizer, _ = model
    states = run(model, tmp_path / "sweep", slots=3)
    corpus = make_corpus(tmp_path / "corpora", tokenizer, "decoder-only", "film")
    for state in states[:8:3]:
        name, own = state.trial.name, state.trial.settings
        alone = trial("film", corpus, prompt=own.prompt, optimizer=own.optimizer, max_steps=18, eval_every=3)
        alone = type(alone)("film", "film", alone.settings, state.trial.seed, alone.digest)
        folder = tmp_path / name
        (other,) = tune(TuningRun([alone], {"film": corpus}, folder, 1, 50, 256), backbone, tokenizer)
        assert distance(state, other) < 1e-4
        assert [e.value for e in state.history] == [e.value for e in other.history]


@pytest.mark.parametrize("slots", [3, 64])
def test_halving_stops_trials_early_and_leaves_the_survivors_as_they_are_without_it(model, tmp_path, slots):
    whole = run(model, tmp_path / "whole")
    states = run(model, tmp_path / "halved", slots, HALVING)
    film = [state for state in states if state.trial.task == "film"]
    halved = [state for state in film if state.status == "halved"]
    assert {state.step for state in halved} <= {3, 6, 12} and "in place" in halved[0].reason
    assert 1 <= len(film) - len(halved) <= 4
    assert sum(state.step for state in film) < 0.6 * 8 * 18
    for state, other in zip(states, whole, strict=True):
        if state.status != "halved":
            assert distance(state, other) < 1e-4 and state.step == other.step
        n = min(len(state.history), len(other.history))
        assert [e.value for e in state.history][:n] == [e.value for e in other.history][:n]
    assert states[-1].step == 13, "a task without halving is left alone"


@pytest.mark.parametrize("at", [5, 9, *(pytest.param(at, marks=pytest.mark.slow) for at in (2, 14, 20))])
def test_a_run_killed_at_any_step_takes_the_same_decisions_as_one_left_alone(model, tmp_path, at):
    backbone, tokenizer, _ = model
    undisturbed = run(model, tmp_path / "whole", 3, HALVING)
    killed = make_run(tmp_path / "killed", tokenizer, 3, HALVING)
    with killed_at_call(loop, "losses_and_gradients", at):
        tune(killed, backbone, tokenizer)
    for state, other in zip(tune(killed, backbone, tokenizer), undisturbed, strict=True):
        assert (state.status, state.step, state.reason) == (other.status, other.step, other.reason)
        assert state.history == other.history and state.test == other.test
        np.testing.assert_array_equal(state.prompt.detach(), other.prompt.detach())


def test_only_the_prompt_that_a_task_publishes_is_measured_on_test(model, tmp_path):
    states = run(model, tmp_path, 3, HALVING)
    for task in ("film", "book"):
        own = [state for state in states if state.trial.task == task]
        assert [state for state in own if state.test is not None] == [winner(own)]


def test_the_best_dev_metric_wins_and_of_equal_ones_the_lower_loss_then_the_earlier_trial(model, tmp_path):
    film = [state for state in run(model, tmp_path, 64, HALVING) if state.trial.task == "film"]
    best = {state.trial.name: state.history[state.best_at] for state in film}
    first = max(film, key=lambda state: (best[state.trial.name].value, -best[state.trial.name].loss))
    assert winner(film) is first
    assert winner([None, first, first]) is first
    first.status = "failed"
    assert winner(film) is not first and winner([first, None]) is None


def tune_on_rank(folder, model_folder):
    files = find_model(str(model_folder))
    backbone = host_backbone(
        files, read_config(files), int8=True, dtype=torch.float32, device=torch.device("cpu"), sharded=True
    )
    tokenizer = read_tokenizer(files)
    whole = make_run(folder / f"rank{dist.get_rank()}", tokenizer, 3, HALVING)
    states = tune(TuningRun(whole.trials, whole.corpora, folder / "run", 3, 4, 256), backbone, tokenizer)
    return [(state.status, state.step, state.prompt.detach().numpy()) for state in states]


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_take_the_decisions_of_one_process(model, tmp_path):
    alone = run(model, tmp_path / "one", 3, HALVING)
    for rank in run_ranks(2, tune_on_rank, tmp_path / "two", model[2]):
        for (status, step, prompt), state in zip(rank, alone, strict=True):
            assert (status, step) == (state.status, state.step)
            np.testing.assert_allclose(prompt, state.prompt.detach().numpy(), rtol=1e-3, atol=1e-5)
