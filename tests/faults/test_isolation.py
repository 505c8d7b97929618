"""Bad tasks are reported; they neither stop nor change the others."""

import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.bank import PromptBank
from tests.job_process import assert_same, distance, finish, project_in, run, start
from tests.jobs_data import write_parquet

EXACT = ("--set", "model.products=exact")
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The project without a bad task."""
    folder = tmp_path_factory.mktemp("alone") / "project"
    run(project_in(folder, max_steps=100, eval_every=50), *EXACT)
    return folder


def add_task(settings, name, rows, **changes):
    """A copy of the task film over these rows, with changes."""
    whole = yaml.safe_load(settings.read_text())
    folder = settings.parent / "corpora" / name
    for split in ("train", "dev"):
        write_parquet(folder / f"{split}.parquet", rows)
    own = {"train": str(folder / "train.parquet"), "dev": str(folder / "dev.parquet"), **changes}
    whole["tasks"][name] = own
    settings.write_text(yaml.safe_dump(whole, sort_keys=False))
    return folder


GOOD = [("good film", "positive"), ("bad film", "negative")] * 30


def wait_for(log, word, process):
    while not log.exists() or word not in log.read_text():
        assert process.poll() is None, finish(process)
        time.sleep(0.005)


@pytest.mark.slow
def test_tasks_that_cannot_be_used_are_reported_and_change_no_bit_of_the_others(alone, tmp_path):
    settings = project_in(tmp_path / "project", max_steps=100, eval_every=50)
    add_task(settings, "long", [("good " * 60, "positive"), ("bad " * 60, "negative")] * 30)
    gone = add_task(settings, "gone", GOOD)
    process = start(settings, *EXACT, "--set", "run.on_bad_task=skip")
    # After the check, before the first corpus is tokenised.
    wait_for(tmp_path / "project/runs/small/events.jsonl", "", process)
    (gone / "train.parquet").unlink()
    output = finish(process)
    assert process.returncode == 3, output
    assert PromptBank.open(tmp_path / "project/bank").names() == ("book", "film")
    for reason in ("60 input over-long", "gone/train.parquet is gone"):
        assert reason in output, output
    assert_same(tmp_path / "project/bank", alone / "bank")


@pytest.mark.slow
def test_a_task_gone_nan_is_reported_and_the_others_end_with_their_prompts(alone, tmp_path):
    settings = project_in(tmp_path / "project", max_steps=100, eval_every=50)
    add_task(settings, "nan", GOOD, optimizer={"lr": 1e30})
    late = add_task(settings, "late", GOOD)
    log = tmp_path / "project/runs/small/events.jsonl"
    process = start(settings, *EXACT)
    wait_for(log, "launch", process)  # after the last corpus is tokenised
    (late / "train.parquet").unlink()
    output = finish(process)
    assert process.returncode == 3 and "the loss was" in output, output
    assert PromptBank.open(tmp_path / "project/bank").names() == ("book", "film", "late")
    (failed,) = [t for t in json.loads((log.parent / "trials.json").read_text()) if t["status"] == "failed"]
    assert failed["task"] == "nan"
    assert distance(tmp_path / "project/bank", alone / "bank") < TOLERANCE


@pytest.mark.slow
def test_a_task_whose_token_shards_vanish_fails_alone(alone, tmp_path):
    settings = project_in(tmp_path / "project", max_steps=100, eval_every=50)
    add_task(settings, "gone", [("great film", "positive"), ("awful film", "negative")] * 30)
    process = start(settings, *EXACT)
    wait_for(tmp_path / "project/runs/small/events.jsonl", "launch", process)
    for manifest in (tmp_path / "project/runs/token_shards").glob("*/manifest.json"):
        if str(tmp_path / "project/corpora/gone") in manifest.read_text():
            next(manifest.parent.glob("*.arrow")).unlink()
    output = finish(process)
    assert process.returncode == 3, output
    assert PromptBank.open(tmp_path / "project/bank").names() == ("book", "film")
    assert "its token shards could not be read" in output
    assert distance(tmp_path / "project/bank", alone / "bank") < TOLERANCE


@pytest.mark.slow
def test_a_task_ten_thousand_times_larger_does_not_change_the_others(alone, tmp_path):
    settings = project_in(tmp_path / "project", max_steps=100, eval_every=50)
    folder = add_task(settings, "large", GOOD)
    rows = pq.read_table(folder / "train.parquet")
    pq.write_table(pa.concat_tables([rows] * 10_000), folder / "train.parquet")
    output = run(settings, *EXACT)
    assert "600,000" in output or "600000" in output
    assert distance(tmp_path / "project/bank", alone / "bank") < TOLERANCE
    assert np.isfinite(PromptBank.open(tmp_path / "project/bank").load("large").array).all()
