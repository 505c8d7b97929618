"""A checkpoint is taken up as it was written or not at all, whichever of its bits has flipped."""

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from pipeline.tuning.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from pipeline.tuning.evaluate import Score
from pipeline.tuning.loop import tune
from tests.tuning.test_loop import make_run, prompts_of


def same(one: Checkpoint, other: Checkpoint) -> bool:
    alike = one.step == other.step and json.dumps(one.records) == json.dumps(other.records)
    names = {(name, key) for name, own in one.tensors.items() for key in own}
    return (
        alike
        and names == {(name, key) for name, own in other.tensors.items() for key in own}
        and all(torch.equal(one.tensors[name][key], other.tensors[name][key]) for name, key in names)
    )


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)


def fates_of_flips(folder: Path, flips: int, seed: int) -> dict[str, int]:
    """Each single bit flip of the newest of a folder's two checkpoints: passed over, without effect, or undetected."""
    before, newest = sorted(folder.glob("*.safetensors"))
    data, whole = newest.read_bytes(), load_checkpoint(folder)
    header = 8 * (8 + int.from_bytes(data[:8], "little"))
    draw, fates = random.Random(seed), {"passed over": 0, "no effect": 0, "undetected": 0}
    try:
        for _ in range(flips):  # half of them in the header, which is small
            bit = draw.randrange(header) if draw.random() < 0.5 else draw.randrange(8 * len(data))
            newest.write_bytes(flip(data, bit))
            found = load_checkpoint(folder)
            passed = found is not None and found.step == int(before.stem.removeprefix("step-"))
            fates["passed over" if passed else "no effect" if same(found, whole) else "undetected"] += 1
    finally:
        newest.write_bytes(data)
    return fates


@pytest.fixture
def folder(model, tmp_path) -> Path:
    backbone, tokenizer, _ = model
    tune(make_run(tmp_path, tokenizer, backbone.architecture, ("first", "second")), backbone, tokenizer)
    return tmp_path / "run/checkpoints"


def test_no_flipped_bit_of_a_checkpoint_is_taken_up(folder):
    fates = fates_of_flips(folder, 200, seed=3)
    assert not fates["undetected"] and fates["passed over"] > 190, fates


def test_a_digest_that_lost_its_name_does_not_pass_for_a_checkpoint_of_an_older_version(folder):
    before, newest = sorted(folder.glob("*.safetensors"))
    data = newest.read_bytes()
    assert data.count(b'"sha256"') == 1
    for bit in range(8 * (data.index(b'"sha256"') + 1), 8 * (data.index(b'"sha256"') + 7)):
        newest.write_bytes(flip(data, bit))
        assert load_checkpoint(folder).step == int(before.stem.removeprefix("step-"))


def test_a_checkpoint_of_a_version_that_wrote_no_digest_is_taken_up(folder):
    whole, (*_, newest) = load_checkpoint(folder), sorted(folder.glob("*.safetensors"))
    with safe_open(newest, framework="pt") as file:
        metadata = file.metadata()
    newest.write_bytes(save(load_file(newest), {key: metadata[key] for key in ("step", "trials")}))
    assert same(load_checkpoint(folder), whole)


def test_a_damaged_line_of_a_series_is_passed_over_when_a_run_goes_on(model, tmp_path):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture, ("first",))
    whole = prompts_of(tune(run, backbone, tokenizer))
    series = tmp_path / "run/metrics/first.jsonl"
    lines = series.read_text().splitlines()
    for damaged in ('{"stop": 3, "loss": 1.0}', '{"step": 3, "loss: 1.0}', "{]}", '{"step": "x", "loss": 1.0}', "[3]"):
        series.write_bytes("\n".join([damaged, *lines]).encode() + b"\n\xff\n")
        assert (prompts_of(tune(run, backbone, tokenizer))["first"] == whole["first"]).all()
        assert series.read_text().splitlines() == lines


def test_a_checkpoint_with_a_trial_that_never_measured_anything_is_read_again(model, tmp_path):
    """NaN in its history, a test score and a reason: all that JSON has to carry."""
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture, ("first",))
    (state,) = tune(run, backbone, tokenizer)
    state.lose("ä reason with a snowman \u2603")
    state.history.append(type(state.history[0])(21, float("nan"), float("inf")))
    state.test = Score(0.5, 1.5)
    save_checkpoint(tmp_path / "again", 7, [state])
    (kept,) = [load_checkpoint(tmp_path / "again").state_of(one, backbone.device) for one in run.trials]
    assert (kept.reason, kept.test, str(kept.history)) == (state.reason, state.test, str(state.history))


def test_a_checkpoint_costs_what_is_live_and_a_trial_that_has_ended_is_written_once(model, tmp_path):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture, ("first", "second", "third", "fourth"))
    tune(replace(run, max_live_trials=1), backbone, tokenizer)
    folder = tmp_path / "run/checkpoints"
    files = {path.stem: path.stat() for path in (folder / "ended").iterdir()}
    assert sorted(files) == sorted(trial.name for trial in run.trials)
    newest = max(folder.glob("*.safetensors"))
    with safe_open(newest, framework="pt") as file:
        assert not list(file.keys()), "no trial is live at the end"
    assert len({status.st_mtime_ns for status in files.values()}) == 4, "each was written when it ended"


def test_of_a_trial_whose_file_is_damaged_it_alone_is_tuned_again_and_ends_with_the_same_prompt(model, tmp_path):
    backbone, tokenizer, _ = model
    run = make_run(tmp_path, tokenizer, backbone.architecture, ("first", "second"))
    whole = prompts_of(tune(run, backbone, tokenizer))
    damaged = tmp_path / "run/checkpoints/ended/second.safetensors"
    damaged.write_bytes(flip(damaged.read_bytes(), 8 * damaged.stat().st_size - 100))
    again = prompts_of(tune(run, backbone, tokenizer))
    np.testing.assert_allclose(again["second"], whole["second"], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(again["first"], whole["first"])
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (resumed,) = [event for event in events if event["event"] == "resume"]
    assert list(resumed["trials"]) == ["first"]
