"""A sweep with halving as its users start it: killed and started again, it decides and publishes as if left alone."""

import json
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from pipeline.bank import PromptBank
from tests.jobs.test_tune_prompts import events, run, start
from tests.jobs_data import make_project, write_settings


def project_in(folder: Path) -> Path:
    folder.mkdir()
    settings = make_project(folder, max_steps=240, eval_every=20, patience=None)
    settings["run"]["max_live_trials"] = 4
    settings["tasks"]["film"] |= {
        "sweep": {"prompt.length": [2, 4], "optimizer.lr": [0.02, 0.1, 0.5]},
        "halving": {"first": 1, "factor": 2},
    }
    return write_settings(folder, settings)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "project"
    return folder, run(project_in(folder))


def wait_for_a_halved_trial(run_folder: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 180
    while not any(event["event"] == "finished" for event in events(run_folder)):
        assert process.poll() is None and time.monotonic() < deadline, "no trial was halved in time"
        time.sleep(0.02)


def trials(folder: Path) -> list[dict]:
    return json.loads((folder / "runs/small/trials.json").read_text())


@pytest.mark.slow
def test_the_job_says_which_trials_the_winner_was_chosen_from(undisturbed):
    folder, output = undisturbed
    halved = sum(trial["status"] == "halved" for trial in trials(folder))
    assert halved >= 3 and f"best of 6 ({halved} halved)" in " ".join(output.split())
    assert "--task film" in output and PromptBank.open(folder / "bank").names() == ("book", "film")
    assert "7" in run(folder / "settings.yaml", "--plan").split("total")[1].split(), "the plan counts trials"


@pytest.mark.slow
def test_a_killed_sweep_started_again_ends_as_an_undisturbed_one(undisturbed, tmp_path):
    settings = project_in(tmp_path / "project")
    process = start(settings)
    wait_for_a_halved_trial(tmp_path / "project/runs/small", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run(settings)
    assert [e for e in events(tmp_path / "project/runs/small") if e["event"] == "resume"], "nothing was resumed"
    assert trials(tmp_path / "project") == trials(undisturbed[0])
    banks = [PromptBank.open(folder / "bank") for folder in (tmp_path / "project", undisturbed[0])]
    for name in ("film", "book"):
        ours, theirs = (bank.load(name).array for bank in banks)
        np.testing.assert_array_equal(ours, theirs)
