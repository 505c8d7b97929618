"""The comparison as its users start it: a plan, a report, and an end like an undisturbed one's after a kill."""

import signal

import pytest

from pipeline.lab.comparison.results import read_results
from tests.job_process import finish, run, start, wait_for_step
from tests.jobs_data import write_settings
from tests.lab.comparison.test_job import make_comparison

pytestmark = pytest.mark.slow

JOB = "compare_methods.py"


def small(folder, **compare):
    """Prompts and hard prompts of two tasks."""
    settings = make_comparison(folder, lora=None, fine_tuning=None, transfer=None, **compare)
    settings["cluster"]["num_workers"] = 2
    return settings


def test_the_plan_tells_every_method_and_trains_nothing(tmp_path):
    output = run(write_settings(tmp_path, make_comparison(tmp_path)), "--plan", job=JOB)
    for words in (
        "hard prompts: 0, 2 solved rows",
        "LoRA: lr 0.001, 4 training(s)",
        "transfer: 2 start(s)",
        "tested on song",
        "seeds: 2",
    ):
        assert words in output
    assert not (tmp_path / "runs").exists()


def test_a_mistake_ends_with_code_2_and_one_sentence(tmp_path):
    settings = small(tmp_path, domain_shift={"film": ["songs"]})
    output = run(write_settings(tmp_path, settings), job=JOB, code=2)
    assert output.count("error:") == 1 and "there is no task 'songs'" in output


def test_layers_that_the_model_lacks_are_refused_by_the_plan(tmp_path):
    settings = make_comparison(tmp_path, lora={"targets": ["qproj"]})
    output = run(write_settings(tmp_path, settings), "--plan", job=JOB, code=2)
    assert output.count("error:") == 1 and "compare.lora.targets" in output and "q_proj" in output


def test_prompts_and_hard_prompts_over_two_ranks_leave_a_report_of_every_seed(tmp_path):
    output = run(write_settings(tmp_path, small(tmp_path)), job=JOB)
    folder = tmp_path / "runs/small"
    assert "report.html" in output and (folder / "report.html").exists() and (folder / "report.md").exists()
    found = read_results(folder / "results.json")
    of = {(n["method"], n["task"], n["seed"]): n for n in found["numbers"] if n["chosen"]}
    assert {key[2] for key in of if key[0] == "prompt tuning"} == {0, 1}
    assert all((number["test"] is None) == (task == "book") for (_, task, _), number in of.items())
    assert found["ranks"] == 2 and {row["on"] for row in found["shifts"]} == {"film", "song"}


def test_a_comparison_killed_while_it_tunes_and_started_again_ends_as_one_left_alone(tmp_path):
    found = []
    for name, kill in (("left-alone", False), ("killed", True)):
        folder = tmp_path / name
        folder.mkdir()
        settings = small(folder)
        settings["defaults"] |= {"max_steps": 200, "eval_every": 100}
        path = write_settings(folder, settings)
        if kill:
            process = start(path, job=JOB)
            wait_for_step(folder / "runs/small/prompts", 60, process)
            process.send_signal(signal.SIGKILL)
            finish(process)
        output = run(path, job=JOB)
        assert "report.html" in output and (folder / "runs/small/report.html").exists()
        found.append(read_results(folder / "runs/small/results.json"))
    keys = ("name", "dev", "test", "chosen")
    ours, theirs = ([{key: number[key] for key in keys} for number in one["numbers"]] for one in found)
    assert ours == theirs
