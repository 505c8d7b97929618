"""A rank that hangs is found and replaced; a run that is told to stop leaves with a checkpoint of that very step."""

import signal
import time
from pathlib import Path

import pytest

from tests.job_process import (
    STEPS,
    assert_no_temporary_files,
    assert_nothing_is_left,
    assert_same,
    events,
    finish,
    project_in,
    ranks_of,
    run,
    start,
    steps_written,
    wait_for_step,
)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.slow
def test_a_rank_that_hangs_is_killed_and_the_prompts_are_those_of_an_undisturbed_run(undisturbed, tmp_path, which):
    settings = project_in(tmp_path / "project")
    folder = tmp_path / "project/runs/small"
    process = start(settings, "--set", "run.hang_timeout=8")
    wait_for_step(folder, 60, process)
    ranks = ranks_of(process)
    assert len(ranks) == 2
    ranks[which].send_signal(signal.SIGSTOP)
    output = finish(process)
    assert process.returncode == 0, output
    assert events(folder, "resume"), "nothing was resumed"
    assert steps_written(folder) == list(range(1, STEPS + 1)), "a step is there twice, or never"
    assert_same(tmp_path / "project/bank", undisturbed / "bank")
    assert_nothing_is_left(process)
    assert_no_temporary_files(tmp_path / "project")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "whom"),
    [
        ("SIGTERM", "driver"),
        pytest.param("SIGINT", "driver", marks=pytest.mark.slow),
        pytest.param("SIGTERM", "rank", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_told_to_stop_goes_on_from_that_very_step(undisturbed, tmp_path, number, whom):
    settings = project_in(tmp_path / "project")
    folder = tmp_path / "project/runs/small"
    process = start(settings)
    wait_for_step(folder, 60, process)
    told = process if whom == "driver" else ranks_of(process)[1]
    told.send_signal(getattr(signal, number))
    output = finish(process)
    assert process.returncode == 5, output
    last = steps_written(folder)[-1]
    assert f"error: run 'small' was told to stop and did, at step {last}, with a checkpoint of it; " in output
    assert "Traceback" not in output
    assert last < STEPS and (folder / f"checkpoints/step-{last:09d}.safetensors").exists()
    assert not list((tmp_path / "project").glob("bank/versions/*")), "something was published"
    assert_nothing_is_left(process)
    run(settings)
    assert [event["step"] for event in events(folder, "resume")] == [last]
    assert_same(tmp_path / "project/bank", undisturbed / "bank")
    assert_no_temporary_files(tmp_path / "project")


@pytest.mark.slow
def test_a_job_told_to_stop_before_it_trains_is_one_sentence(tmp_path):
    settings = project_in(tmp_path / "project")
    process = start(settings)
    while not (tmp_path / "project/runs/small/events.jsonl").exists():
        assert process.poll() is None, finish(process)
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = finish(process)
    assert process.returncode == 5, output
    assert "start" in output and "again" in output and "Traceback" not in output
    assert_nothing_is_left(process)


@pytest.mark.slow
def test_ranks_that_hang_again_and_again_are_one_sentence_that_says_where(tmp_path):
    settings = project_in(tmp_path / "project")
    folder = tmp_path / "project/runs/small"
    process = start(settings, "--set", "run.hang_timeout=5", "--set", "run.max_failures=0")
    wait_for_step(folder, 60, process)
    ranks_of(process)[0].send_signal(signal.SIGSTOP)
    output = finish(process)
    assert process.returncode == 5, output
    sentence = output.strip().splitlines()[-1]
    assert "the ranks were lost or failed more than 0 time(s)" in sentence and "run.hang_timeout" in sentence, output
    # The stopped one may write too, when it is let go to be ended.
    reports = [path.read_text() for path in Path(folder / "hangs").glob("*.txt")]
    assert any("all_reduce" in report for report in reports), "the rank that waited did so in a collective"
    assert_nothing_is_left(process)
