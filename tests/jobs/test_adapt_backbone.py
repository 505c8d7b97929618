"""`jobs/adapt_backbone.py` as a process of its own: on two ranks, killed, stopped, its models used by the main job."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.bank import PromptBank
from tests.job_process import assert_nothing_is_left, events, finish, kill_what_is_left, start, wait_for_step
from tests.jobs_data import make_project, write_settings
from tests.lab.adapt.text import documents, write_text
from tests.tiny import make_tokenizer

JOB = "adapt_backbone.py"
CONFIG = {"model_type": "t5", "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}


@pytest.fixture(autouse=True)
def no_process_is_left():
    yield
    kill_what_is_left()


def project(folder: Path, **changes) -> Path:
    """Settings that pre-train a small T5 with span corruption, over two ranks."""
    folder.mkdir()
    make_tokenizer(eos_template=True).save_pretrained(folder / "tokenizer")
    corpus = write_text(folder / "text.parquet", documents(200))
    settings = {
        "run": {"name": "small", "storage": str(folder / "runs"), "checkpoint_every": 5},
        "model": {"config": CONFIG, "tokenizer": str(folder / "tokenizer"), "sentinels": 10},
        "corpus": {"train": str(corpus)},
        "objective": {"name": "span_corruption"},
        "cluster": {"num_workers": 2},
        "optimizer": {"lr": 0.02},
        "tokens": 16,
        "batch_size": 8,
        "steps": 30,
        "save_at": [0, 10],
        **changes,
    }
    return write_settings(folder, settings)


def run(settings: Path, *arguments: str, code: int = 0, job: str = JOB) -> str:
    process = start(settings, *arguments, job=job)
    output = finish(process)
    assert process.returncode == code, output
    return output


def model(settings: Path, step: int) -> Path:
    return settings.parent / "runs/small/models" / f"step-{step:06d}"


@pytest.mark.slow
def test_a_model_pre_trained_here_is_adapted_and_prompts_are_tuned_on_it(tmp_path):
    pre_training = project(tmp_path / "first")
    output = run(pre_training)
    assert str(model(pre_training, 30)) in output
    adaptation = project(tmp_path / "second", model={"path": str(model(pre_training, 30))}, objective={})
    assert "prefix_lm" in run(adaptation, "--plan") and not model(adaptation, 0).exists()
    run(adaptation)
    first, last = (load_file(model(adaptation, step) / "model.safetensors") for step in (0, 30))
    before = load_file(model(pre_training, 30) / "model.safetensors")
    assert all(np.array_equal(first[name], before[name]) for name in before)
    assert not np.array_equal(first["shared.weight"], last["shared.weight"])
    (tmp_path / "third").mkdir()
    tuning = make_project(tmp_path / "third", max_steps=5, eval_every=5)
    # What T5 without LM adaptation is given: "Span Corruption + Sentinel" (Lester et al. 2021, section 3.2).
    tuning["defaults"]["target"] = "<extra_id_0> {label}"
    tuning["tasks"]["book"].pop("labels")
    tuning["model"] = {"path": str(model(adaptation, 30)), "weights": "full"}
    run(write_settings(tmp_path / "third", tuning), job="tune_prompts.py")
    assert PromptBank.open(tmp_path / "third/bank").load("film").array.shape == (4, 32)
    assert run(adaptation).count("step 30") >= 1, "a finished run says again what it made"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_killed_or_told_to_stop_it_ends_with_the_models_of_one_left_alone(tmp_path, how):
    steps = {"steps": 200, "save_at": [100]}
    undisturbed, settings = project(tmp_path / "whole", **steps), project(tmp_path / "stopped", **steps)
    run(undisturbed)
    process = start(settings, job=JOB)
    wait_for_step(settings.parent / "runs/small", 20, process)
    process.send_signal(how)
    finish(process)
    assert process.returncode == (5 if how == signal.SIGTERM else -signal.SIGKILL)
    assert_nothing_is_left(process)
    run(settings)
    assert [event for event in events(settings.parent / "runs/small") if event["event"] == "resume"]
    for step in (100, 200):
        ours, theirs = (load_file(model(each, step) / "model.safetensors") for each in (settings, undisturbed))
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    series = (settings.parent / "runs/small/metrics/small.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in series] == list(range(1, 201))


@pytest.mark.slow
def test_what_cannot_be_done_is_said_before_ray_starts(tmp_path):
    settings = project(tmp_path / "project")
    assert "there is no file or folder" in run(settings, "--set", "corpus.train=nowhere.parquet", code=2)
    assert "did you mean 'steps'" in run(settings, "--set", "stesp=3", code=2)
