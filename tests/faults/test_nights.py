"""A night that is told to stop goes on, started again, where it was."""

import signal
from functools import partial

import pytest

from pipeline.refresh.record import read_record
from tests import job_process
from tests.job_process import (
    STEPS,
    assert_nothing_is_left,
    assert_same,
    events,
    finish,
    project_in,
    steps_written,
    wait_for_step,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
start = partial(job_process.start, job="refresh_prompts.py")
run = partial(job_process.run, job="refresh_prompts.py")


def test_a_night_that_is_told_to_stop_goes_on_from_that_very_step_to_the_prompts_of_a_run(undisturbed, tmp_path):
    settings = project_in(tmp_path / "project")
    folder = tmp_path / "project/runs/small-n1"
    process = start(settings, "--date", "n1")
    wait_for_step(folder, 60, process)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 5, output
    last = steps_written(folder)[-1]
    assert last < STEPS
    assert f"error: run 'small-n1' was told to stop and did, at step {last}, with a checkpoint of it; " in output
    assert "Traceback" not in output
    record = read_record(folder)
    assert (record.state, record.exit_code) == ("failed", 5) and record.failure in output
    assert not list((tmp_path / "project").glob("bank/versions/*")), "something was published"
    assert_nothing_is_left(process)
    run(settings, "--date", "n1")
    assert [event["step"] for event in events(folder, "resume")] == [last]
    assert read_record(folder).version == 1
    assert_same(tmp_path / "project/bank", undisturbed / "bank")
    assert not [*folder.rglob(".*"), *(tmp_path / "project/bank").rglob(".*")], "something half-written is left"
