"""Told to stop between any two steps, a run leaves a checkpoint of that step and goes on from it bit by bit."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.tuning import loop, progress
from pipeline.tuning.checkpoint import load_checkpoint
from pipeline.tuning.interruption import stop_signal
from pipeline.tuning.interruption.signals import heed_sigterm
from pipeline.tuning.interruption.stop_signal import StopSignal, allow_to_run, ask_to_stop
from pipeline.tuning.loop import tune
from tests.ranks import run_ranks
from tests.tuning.test_loop import CHANGES, make_run, prompts_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def undisturbed(model, tmp_path_factory):
    backbone, tokenizer, _ = model
    folder = tmp_path_factory.mktemp("whole")
    return prompts_of(tune(make_run(folder, tokenizer, backbone.architecture), backbone, tokenizer))


# 4 is that of a checkpoint, 10 and 13 of an evaluation, at 20 trials end.
@pytest.mark.parametrize("at", [4, 13, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 7, 10, 20))])
def test_a_run_told_to_stop_at_any_step_goes_on_from_it_bit_by_bit(model, undisturbed, tmp_path, monkeypatch, at):
    backbone, tokenizer, _ = model
    monkeypatch.setattr(stop_signal, "_LOOK_S", 0.0)
    run = make_run(tmp_path, tokenizer, backbone.architecture)
    allow_to_run(run.folder)
    real = loop.losses_and_gradients

    def told(backbone, work, budget):
        if work[0].step == at - 1:
            ask_to_stop(run.folder)
        return real(backbone, work, budget)

    monkeypatch.setattr(loop, "losses_and_gradients", told)
    tune(run, backbone, tokenizer, StopSignal(run.folder))
    monkeypatch.setattr(loop, "losses_and_gradients", real)
    checkpoint = load_checkpoint(run.folder / "checkpoints")
    assert checkpoint.step == at
    assert tune(run, backbone, tokenizer, StopSignal(run.folder)) and checkpoint.step == at, "the request still stands"
    allow_to_run(run.folder)
    for name, prompt in prompts_of(tune(run, backbone, tokenizer, StopSignal(run.folder))).items():
        np.testing.assert_array_equal(prompt, undisturbed[name])
    series = (run.folder / "metrics/first.jsonl").read_text().splitlines()
    assert len([line for line in series if "dev_metric" in line]) == 3, "an evaluation is there twice, or never"


def test_a_run_told_to_stop_before_its_first_step_takes_none(model, tmp_path):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture)
    allow_to_run(run.folder)
    ask_to_stop(run.folder)
    assert tune(run, backbone, tokenizer, StopSignal(run.folder)) == []


def test_a_node_about_to_leave_has_one_checkpoint_written_and_stops_nothing(model, undisturbed, tmp_path, monkeypatch):
    backbone, tokenizer, _ = model
    monkeypatch.setattr(stop_signal, "_NODES_S", 0.0)
    run = make_run(tmp_path, tokenizer, backbone.architecture, checkpoint_every=1000)
    saved = []
    real = progress.save_checkpoint

    def watched(folder, step, *states):
        saved.append(step)
        real(folder, step, *states)

    monkeypatch.setattr(progress, "save_checkpoint", watched)
    asked = iter([False, False, False, *[True] * 100])
    states = tune(run, backbone, tokenizer, StopSignal(run.folder, lambda: next(asked)))
    assert 3 in saved and saved.count(3) == 1 and 4 not in saved
    for name, prompt in prompts_of(states).items():
        np.testing.assert_array_equal(prompt, undisturbed[name])


def tune_until_one_rank_is_told(folder, model_folder):
    import torch
    import torch.distributed as dist

    from pipeline.backbone.host import host_backbone

    files = find_model(str(model_folder))
    backbone = host_backbone(
        files, read_config(files), int8=True, dtype=torch.float32, device=torch.device("cpu"), sharded=False
    )
    run = make_run(folder / f"rank{dist.get_rank()}", read_tokenizer(files), backbone.architecture)
    heed_sigterm()
    real = loop.losses_and_gradients

    def told(backbone, work, budget):
        if work[0].step == 4 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(backbone, work, budget)

    loop.losses_and_gradients = told
    return [state.step for state in tune(run, backbone, read_tokenizer(files), StopSignal(run.folder))]


@pytest.mark.slow
@pytest.mark.processes
def test_a_sigterm_of_one_rank_stops_all_after_the_same_step(model, tmp_path):
    _, _, folder = model
    assert run_ranks(2, tune_until_one_rank_is_told, tmp_path, folder) == [[5] * len(CHANGES)] * 2


def test_a_trial_whose_token_shards_are_gone_fails_alone(model, undisturbed, tmp_path):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture)
    for path in (tmp_path / "corpora/second").rglob("*.arrow"):
        path.unlink()
    states = {state.trial.name: state for state in tune(run, backbone, tokenizer)}
    assert states["second"].status == "failed" and "could not be read" in states["second"].reason
    for name in ("first", "third", "fourth"):
        assert states[name].status != "failed"
        distance = np.linalg.norm(states[name].prompt.detach().numpy() - undisturbed[name])
        assert distance <= 1e-4 * np.linalg.norm(undisturbed[name])
    again = {state.trial.name: state for state in tune(run, backbone, tokenizer)}
    assert again["second"].reason == states["second"].reason


HANGING = """
import ctypes, sys
from pathlib import Path
from pipeline.tuning.interruption.watchdog import watched
with watched(0.5, Path(sys.argv[1])) as alive:
    alive()
    ctypes.PyDLL(None).sleep(60)  # PyDLL: no thread of Python runs meanwhile
"""


@pytest.mark.processes
def test_a_process_that_hangs_is_ended_and_its_stack_is_kept(tmp_path):
    started = time.monotonic()
    command = [sys.executable, "-c", HANGING, str(tmp_path / "hangs/rank.txt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and time.monotonic() - started < 50
    assert "line 7 in <module>" in (tmp_path / "hangs/rank.txt").read_text()
