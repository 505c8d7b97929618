"""The nightly job as a scheduler starts it: twice at once, killed and started again, and with nothing to do."""

import json
import signal
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipeline.bank import PromptBank
from pipeline.refresh.record import read_record
from tests import job_process
from tests.corpora import reviews
from tests.job_process import events, ranks_of, wait_for_step
from tests.jobs_data import make_project, write_parquet, write_settings

start = partial(job_process.start, job="refresh_prompts.py")
run = partial(job_process.run, job="refresh_prompts.py")


def project_in(folder: Path) -> Path:
    folder.mkdir()
    settings = make_project(folder, max_steps=300, eval_every=150, patience=None)
    return write_settings(folder, {**settings, "refresh": {"lease_expiry": 4}})


@pytest.mark.timeout(600)
@pytest.mark.slow
def test_a_night_is_found_by_a_second_one_and_killed_goes_on_to_the_prompts_of_an_undisturbed_one(tmp_path):
    settings = project_in(tmp_path / "project")
    first = start(settings, "--date", "n1")
    wait_for_step(tmp_path / "project/runs/small-n1", 60, first)
    ranks = ranks_of(first)
    for rank in ranks:
        rank.suspend()  # so that the first night is still under way when the second one looks
    second = run(settings, "--date", "n2", code=7)
    assert "night 'small-n1'" in second and "Traceback" not in second
    first.send_signal(signal.SIGKILL)
    first.wait()
    for rank in ranks:
        with suppress(psutil.NoSuchProcess):
            rank.resume()
    folder = tmp_path / "project/runs/small-n1"
    assert read_record(folder).state == "running" and not list(tmp_path.glob("project/bank/versions/*"))
    # A dead night's lease expires: who waits for it, gets it.
    output = run(settings, "--date", "n1", "--set", "refresh.wait_for_lease=60")
    resumed = [event["step"] for event in events(folder) if event["event"] == "resume"]
    assert resumed and resumed[0] > 0
    record = read_record(folder)
    assert (record.state, record.version, record.attempts, record.exit_code) == ("finished", 1, 2, 0)
    assert "Version 1 is published" in output and "promoted" in output
    page = (folder / "report.html").read_text()
    assert "Night of n1" in page and "film" in page and page.count("<svg") >= 2
    run(project_in(tmp_path / "undisturbed"), "--date", "n1")
    ours, theirs = (PromptBank.open(tmp_path / name / "bank") for name in ("project", "undisturbed"))
    for name in ("film", "book"):
        np.testing.assert_array_equal(ours.load(name).array, theirs.load(name).array)
    unchanged_and_planned(settings)


def unchanged_and_planned(settings: Path) -> None:
    """The nights after it: nothing to do, and one in which a corpus has changed, planned only."""
    folder = settings.parent
    assert "Nothing had changed" in run(settings, "--date", "n2")
    assert PromptBank.open(folder / "bank").versions() == (1,)
    assert not events(folder / "runs/small-n2", "launch")
    assert "cluster" not in read_record(folder / "runs/small-n2").stages, "a Ray was started for nothing"
    write_parquet(folder / "corpora/film/train.parquet", reviews(70, 99))
    output = run(settings, "--date", "n3", "--plan")
    assert "warm" in output and "its corpus changed" in output and "carried" in output
    assert "1 of 2 task(s) would be tuned" in output and not (folder / "runs/small-n3").exists()


@pytest.mark.slow
def test_mistakes_are_one_sentence_and_exit_code_2(tmp_path):
    settings = project_in(tmp_path / "project")
    output = run(settings, "--set", "refresh.canaries=[films]", code=2)
    assert output.strip().endswith("refresh.canaries: there is no task 'films'; name tasks of this file")
    assert "can name no run" in run(settings, "--date", "2026/01/02", code=2)
    output = run(settings, "--date", "n1", "--set", "model.path=nowhere", code=2)
    record = json.loads((tmp_path / "project/runs/small-n1/night.json").read_text())
    assert (record["state"], record["exit_code"]) == ("failed", 2) and record["failure"] in output.replace("\n", " ")
    assert "nowhere" in (tmp_path / "project/runs/small-n1/report.html").read_text()
