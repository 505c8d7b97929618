"""The whole job as its users start it: from the command line, killed and resumed, and submitted to a cluster."""

import json
import re
import shlex
import signal
import subprocess
import sys

import numpy as np
import psutil
import pytest

from pipeline.bank import PromptBank
from tests.job_cluster import job_cluster
from tests.job_process import (
    ROOT,
    assert_no_temporary_files,
    assert_nothing_is_left,
    assert_same,
    events,
    finish,
    project_in,
    run,
    start,
    wait_for_step,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "project"
    output = run(project_in(folder))
    return folder, output


def test_the_job_publishes_every_prompt_and_prints_what_became_of_each(undisturbed):
    folder, output = undisturbed
    bank = PromptBank.open(folder / "bank")
    assert bank.version == 1 and bank.names() == ("book", "film")
    film = bank.load("film@latest")
    assert film.array.shape == (4, 32) and film.record.status == "tuned"
    assert film.record.template.input == "{text}" and set(film.record.labels) == {"positive", "negative"}
    assert film.record.metrics.dev_after > film.record.metrics.dev_before
    assert film.record.metrics.test is not None
    for part in ("film", "book", "dev before", "dev after", "tuned", "version 1", str(folder / "bank"), "jobs/ask.py"):
        assert part in output
    series = [json.loads(line) for line in (folder / "runs/small/metrics/film.jsonl").read_text().splitlines()]
    assert [line["step"] for line in series if "loss" in line] == list(range(1, 401))


@pytest.mark.slow
def test_json_logs_are_json_up_to_the_last_line_and_printed_commands_can_be_pasted(undisturbed, tmp_path):
    folder, _ = undisturbed
    bank = tmp_path / "my bank"
    job = [sys.executable, str(ROOT / "jobs/tune_prompts.py"), "--config", str(folder / "settings.yaml")]
    settings = ["--set", f"bank.uri='{bank}'", "--set", "tracking.log=json"]
    done = subprocess.run([*job, *settings], capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()][-1] == "end"
    assert "dev before" in done.stderr and "gemm_4bit" not in done.stderr
    command = next(line for line in done.stderr.splitlines() if "jobs/ask.py" in line)
    assert shlex.split(command)[2:4] == ["--bank", str(bank)]


def test_a_published_prompt_loaded_back_answers_as_well_as_it_was_measured(undisturbed):
    folder, _ = undisturbed
    import pyarrow.parquet as pq

    from pipeline.serving import PromptedModel, load_backbone

    model = PromptedModel(load_backbone(str(folder / "model")), PromptBank.open(folder / "bank"))
    rows = pq.read_table(folder / "corpora/film/test.parquet").to_pylist()
    scores = model.classify(rows, ["film"] * len(rows))
    right = [max(score, key=score.get) == row["label"] for score, row in zip(scores, rows, strict=True)]
    record = model.bank.load("film").record
    assert np.mean(right) == pytest.approx(record.metrics.test)


def test_the_same_run_started_again_trains_and_publishes_nothing_new(undisturbed):
    folder, _ = undisturbed
    before = len([event for event in events(folder / "runs/small") if event["event"] == "step"])
    output = run(folder / "settings.yaml")
    assert "version 1" in output
    assert PromptBank.open(folder / "bank").versions() == (1,)
    assert len([event for event in events(folder / "runs/small") if event["event"] == "step"]) == before


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_prompts_are_those_of_an_undisturbed_run(undisturbed, tmp_path):
    settings = project_in(tmp_path / "project")
    process = start(settings)
    wait_for_step(tmp_path / "project/runs/small", 60, process)
    below = psutil.Process(process.pid).children(recursive=True)
    workers = [child for child in below if "RayTrainWorker" in " ".join(child.cmdline())]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    output = finish(process)
    assert process.returncode == 0, output
    assert [e for e in events(tmp_path / "project/runs/small") if e["event"] == "resume"], "nothing was resumed"
    assert_same(tmp_path / "project/bank", undisturbed[0] / "bank")
    assert_nothing_is_left(process)
    assert_no_temporary_files(tmp_path / "project")


@pytest.mark.slow
def test_a_killed_driver_started_again_ends_with_the_prompts_of_an_undisturbed_run(undisturbed, tmp_path):
    settings = project_in(tmp_path / "project")
    process = start(settings)
    wait_for_step(tmp_path / "project/runs/small", 60, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert_nothing_is_left(process)
    assert not list(tmp_path.glob("project/bank/versions/*"))
    run(settings)
    resumed = [e["step"] for e in events(tmp_path / "project/runs/small") if e["event"] == "resume"]
    assert resumed and resumed[0] > 0
    series = [
        json.loads(line) for line in (tmp_path / "project/runs/small/metrics/film.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in series if "loss" in line] == list(range(1, 401)), "a step is there twice, or never"
    assert_same(tmp_path / "project/bank", undisturbed[0] / "bank")
    assert_no_temporary_files(tmp_path / "project")


def test_the_plan_shows_rows_steps_and_memory_and_trains_nothing(undisturbed):
    folder, _ = undisturbed
    output = run(folder / "settings.yaml", "--plan", "--set", "run.name=planned")
    for part in ("film", "book", "60", "30% of train", "2 ranks", "activations"):
        assert part in output
    assert not (folder / "runs/planned").exists()


def test_a_mistyped_setting_is_one_sentence_and_exit_code_2(undisturbed):
    output = run(undisturbed[0] / "settings.yaml", "--set", "tasks.film.max_stepz=3", code=2)
    assert output.strip().endswith("unknown key 'tasks.film.max_stepz'; did you mean 'max_steps'?")
    assert "Traceback" not in output


@pytest.mark.slow
def test_workers_killed_for_memory_are_a_sentence_each_and_code_5(tmp_path, monkeypatch):
    """A real kill: more than a hundredth of any machine's memory is in use."""
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "100")
    job = [sys.executable, str(ROOT / "jobs/tune_prompts.py"), "--config", str(project_in(tmp_path / "project"))]
    done = subprocess.run([*job, "--set", "tracking.log=json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 5, done.stderr
    assert all(json.loads(line)["event"] for line in done.stdout.splitlines())
    *kills, told = done.stderr.splitlines()
    assert kills and all(re.match(r"Ray ended process \d+ .* GB were in use on node .*", line) for line in kills)
    assert told.startswith("error: ") and "RAY_memory_usage_threshold" in told and "start the same run again" in told


@pytest.fixture
def cluster(tmp_path):
    with job_cluster(tmp_path, workers=2) as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_job_submitted_to_a_running_cluster_publishes_the_same_prompts(undisturbed, cluster, tmp_path):
    settings = project_in(tmp_path / "project")
    command = ("python", "jobs/tune_prompts.py", "--config", str(settings))
    output = cluster.finish(cluster.submit("tuning", *command, folder=ROOT))
    assert "Published version 1" in output
    assert_same(tmp_path / "project/bank", undisturbed[0] / "bank")
    # The script is executable, and without --config it is the quickstart, which writes where it lasts.
    assert "sentiment" in cluster.finish(cluster.submit("quickstart", "jobs/tune_prompts.py", "--plan", folder=ROOT))
    assert (tmp_path / "quickstart/corpora/sentiment/train.parquet").exists()


@pytest.mark.skipif(not (ROOT.parent / "shared" / "data").exists(), reason="../shared/data is not there")
def test_the_config_of_the_readme_can_be_planned_as_it_stands():
    output = subprocess.run(
        [sys.executable, "jobs/tune_prompts.py", "--config", "jobs/configs/sentiment.yaml", "--plan"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    ).stdout
    for part in ("6,920", "872", "10% of train", "500", "135 M parameters", "sst2", "trec", "cr"):
        assert part in output, output
