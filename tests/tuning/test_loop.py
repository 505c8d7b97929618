"""Many trials tuned together: alone or together, killed or not, on one rank or two, the same prompts."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.tuning import loop
from pipeline.tuning.batches import rows_of_step
from pipeline.tuning.checkpoint import load_checkpoint
from pipeline.tuning.loop import tune
from pipeline.tuning.progress import TuningRun
from tests.corpora import make_corpus, trial
from tests.ranks import run_ranks

CHANGES = {
    "first": {"prompt": {"length": 4}},
    "second": {"prompt": {"length": 9, "init": "random"}, "batch_size": 3, "optimizer": {"name": "adamw", "lr": 0.05}},
    "third": {
        "prompt": {"length": 1, "init": "class_labels"},
        "optimizer": {"lr": 0.3, "clip_norm": 1.0},
        "max_steps": 13,
    },
    "fourth": {"prompt": {"length": 6, "init": "text", "text": "is it good or bad"}, "metric": "rouge_l"},
    "fifth": {"prompt": {"length": 12, "init": "examples", "starts": 3}},
    "sixth": {
        "prompt": {"length": 3},
        "teacher": {
            "text": "is this film good or bad",
            "examples": 4,
            "between": " ",
            "weight": 0.7,
            "unlabelled": "unused",
        },
        "batch_size": 4,
    },
    "seventh": {"metric": "f1", "label_score": "mean", "calibrate": True, "balance": True},
}


def make_run(folder, tokenizer, architecture, names=None, of=CHANGES, **changes) -> TuningRun:
    """A run of the trials of these names, or of all, of the table `of`."""
    names = tuple(of) if names is None else names
    corpora = {
        name: make_corpus(
            folder / "corpora", tokenizer, architecture, name, seed, unlabelled=9 if "teacher" in of[name] else 0
        )
        for seed, name in enumerate(of)
        if name in names
    }
    trials = [trial(name, corpora[name], **of[name]) for name in names]
    run = TuningRun(trials, corpora, folder / "run", max_live_trials=64, checkpoint_every=4, token_budget=256)
    return replace(run, **changes)


def prompts_of(states) -> dict[str, np.ndarray]:
    return {state.trial.name: state.prompt.detach().numpy() for state in states}


def assert_same_prompts(ours, reference, tolerance=1e-4):
    for name, prompt in ours.items():
        distance = np.linalg.norm(prompt - reference[name]) / np.linalg.norm(reference[name])
        assert distance <= tolerance, f"{name} differs by {distance}"


def test_a_trial_alone_ends_with_the_prompt_that_it_reaches_among_others(model, tmp_path):
    backbone, tokenizer, _ = model
    together = tune(make_run(tmp_path / "all", tokenizer, backbone.architecture), backbone, tokenizer)
    for state in together:
        name = state.trial.name
        run = make_run(tmp_path / name, tokenizer, backbone.architecture, (name,))
        (alone,) = tune(run, backbone, tokenizer)
        assert_same_prompts(prompts_of([alone]), prompts_of(together))
        assert alone.step == state.step and alone.status == state.status
        assert [e.value for e in alone.history] == [e.value for e in state.history]
        assert (alone.label_offsets is None) == (name != "seventh")
        np.testing.assert_allclose(alone.label_offsets or (), state.label_offsets or (), rtol=1e-3)


def test_few_slots_give_the_prompts_that_many_slots_give(model, tmp_path):
    backbone, tokenizer, _ = model
    wide = tune(make_run(tmp_path / "wide", tokenizer, backbone.architecture), backbone, tokenizer)
    narrow = make_run(tmp_path / "narrow", tokenizer, backbone.architecture, max_live_trials=2)
    assert_same_prompts(prompts_of(tune(narrow, backbone, tokenizer)), prompts_of(wide))


def test_trials_learn_their_tasks(model, tmp_path):
    backbone, tokenizer, _ = model
    (state,) = tune(make_run(tmp_path, tokenizer, backbone.architecture, ("first",)), backbone, tokenizer)
    assert state.history[state.best_at].loss < state.history[0].loss


def test_a_run_whose_every_trial_changed_starts_them_anew_and_can_be_resumed(model, tmp_path):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture, ("first",))
    tune(run, backbone, tokenizer)
    shorter = replace(run, trials=[trial("first", run.corpora["first"], max_steps=6, eval_every=3)])
    (state,) = tune(shorter, backbone, tokenizer)
    assert state.step == 6
    checkpoint = load_checkpoint(tmp_path / "run/checkpoints")
    assert checkpoint.state_of(shorter.trials[0], backbone.device).status != "live", "its end was not kept"


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [7, 17, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 11))])
def test_a_run_killed_at_any_step_and_started_again_ends_with_the_same_prompts_bit_by_bit(
    model, tmp_path, monkeypatch, at
):
    backbone, tokenizer, _ = model
    taken: dict[tuple[str, int], set] = {}
    real = loop.losses_and_gradients

    def watched(backbone, work, budget):
        if killing and work[0].step >= at:
            raise _Killed
        for part in work:
            rows = rows_of_step(part.trial, part.train, part.step)
            taken.setdefault((part.trial.name, part.step), set()).add(tuple(rows))
        return real(backbone, work, budget)

    monkeypatch.setattr(loop, "losses_and_gradients", watched)
    killing = True
    run = make_run(tmp_path / "killed", tokenizer, backbone.architecture)
    with pytest.raises(_Killed):
        tune(run, backbone, tokenizer)
    killing = False
    resumed = tune(run, backbone, tokenizer)
    undisturbed = tune(make_run(tmp_path / "whole", tokenizer, backbone.architecture), backbone, tokenizer)
    for name, prompt in prompts_of(resumed).items():
        np.testing.assert_array_equal(prompt, prompts_of(undisturbed)[name])
    assert [state.label_offsets for state in resumed] == [state.label_offsets for state in undisturbed]
    assert [state.test for state in resumed] == [state.test for state in undisturbed]
    assert all(len(rows) == 1 for rows in taken.values()), "a step took other rows after the restart"
    series = (tmp_path / "killed/run/metrics/first.jsonl").read_text().splitlines()
    assert len([line for line in series if '"loss"' in line]) == 20, "a step is written down once, however often it ran"


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(model, tmp_path):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture, ("first",))
    whole = prompts_of(tune(run, backbone, tokenizer))
    newest, before = sorted((tmp_path / "run/checkpoints").glob("*.safetensors"), reverse=True)
    newest.write_bytes(newest.read_bytes()[:100])
    assert load_checkpoint(tmp_path / "run/checkpoints").step == int(before.stem.removeprefix("step-"))
    again = prompts_of(tune(run, backbone, tokenizer))
    np.testing.assert_array_equal(again["first"], whole["first"])


def test_a_trial_that_goes_nan_fails_alone(model, tmp_path, monkeypatch):
    backbone, tokenizer, _ = model
    real = loop.losses_and_gradients

    def poisoned(backbone, work, budget):
        for part in work:
            if part.trial.name == "second" and part.step == 5:
                part.prompt.data[0, 0] = float("nan")
        return real(backbone, work, budget)

    healthy = tune(make_run(tmp_path / "healthy", tokenizer, backbone.architecture), backbone, tokenizer)
    monkeypatch.setattr(loop, "losses_and_gradients", poisoned)
    states = tune(make_run(tmp_path / "poisoned", tokenizer, backbone.architecture), backbone, tokenizer)
    by_name = {state.trial.name: state for state in states}
    assert by_name["second"].status == "failed" and "at step 5; lower optimizer.lr" in by_name["second"].reason
    others = [state for state in states if state.trial.name != "second"]
    assert_same_prompts(prompts_of(others), prompts_of(healthy))


def test_a_changed_task_starts_anew_and_the_others_are_kept(model, tmp_path):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture, ("first", "third"))
    before = tune(run, backbone, tokenizer)
    changed = trial("first", run.corpora["first"], prompt={"length": 7})
    after = tune(replace(run, trials=[changed, run.trials[1]]), backbone, tokenizer)
    assert after[0].prompt.shape[0] == 7 and after[0].step == 20
    np.testing.assert_array_equal(prompts_of(after)["third"], prompts_of(before)["third"])


def tune_on_rank(folder, model_folder, sharded):
    files = find_model(str(model_folder))
    backbone = host_backbone(
        files, read_config(files), int8=True, dtype=torch.float32, device=torch.device("cpu"), sharded=sharded
    )
    tokenizer = read_tokenizer(files)
    # Each rank writes the same corpora for itself; the run's folder is shared.
    run = make_run(folder / f"rank{dist.get_rank()}", tokenizer, backbone.architecture)
    states = tune(replace(run, folder=folder / "run"), backbone, tokenizer)
    return [(s.trial.name, s.prompt.detach().numpy(), s.history, s.test, s.label_offsets) for s in states]


@pytest.mark.parametrize("sharded", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["partitioned", "whole"])
@pytest.mark.processes
def test_two_ranks_reach_the_prompts_and_metrics_of_one_process(model, tmp_path, sharded):
    backbone, tokenizer, folder = model
    alone = tune(make_run(tmp_path / "one", tokenizer, backbone.architecture), backbone, tokenizer)
    for rank in run_ranks(2, tune_on_rank, tmp_path / "two", folder, sharded):
        for (name, prompt, history, test, offsets), state in zip(rank, alone, strict=True):
            assert_same_prompts({name: prompt}, prompts_of(alone))
            assert [e.value for e in history] == [e.value for e in state.history]
            np.testing.assert_allclose([e.loss for e in history], [e.loss for e in state.history], rtol=1e-4)
            assert test.value == state.test.value
            np.testing.assert_allclose(offsets or (), state.label_offsets or (), rtol=1e-3)
