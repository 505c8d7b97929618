"""An adaptation on its ranks: it learns, leaves ordinary model folders, and resumes as if it had never stopped."""

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from pipeline.errors import DivergedError, SettingsError
from pipeline.lab.adapt.rank_job import read_adaptation
from pipeline.lab.full_weights import training
from pipeline.tuning.interruption import stop_signal
from pipeline.tuning.interruption.stop_signal import allow_to_run, ask_to_stop
from tests.killed import killed_at_call
from tests.lab.adapt.conftest import CONFIG
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SPANS = {"name": "span_corruption", "noise_density": 0.3, "mean_span": 2.0}
OBJECTIVES = {
    "prefix_lm": {},
    "spans": {"objective": SPANS},
    "spans without sentinels": {"objective": {**SPANS, "sentinels_in_targets": False}},
}


def carry_out(job):
    job.carry_out(CPU, lambda: False)
    return read_adaptation(job)


def losses(job):
    lines = (job.place.folder / "metrics/adapted.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def weights(job, step):
    return load_file(job.model_at(step) / "model.safetensors")


def assert_same(ours, theirs, tolerance=0.0):
    assert set(ours) == set(theirs)
    for name, weight in ours.items():
        assert np.linalg.norm(weight - theirs[name]) <= tolerance * np.linalg.norm(theirs[name]), name


@pytest.mark.parametrize("changes", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_fresh_model_learns_each_objective_and_its_folders_are_what_transformers_loads(make_job, tmp_path, changes):
    fresh = {"config": CONFIG, "tokenizer": str(tmp_path / "tokenizer"), "sentinels": 8}
    job = make_job(tmp_path / "run", model=fresh, steps=60, **changes)
    adapted = carry_out(job)
    assert np.mean(losses(job)[-5:]) < np.mean(losses(job)[:5]) - 0.3
    assert set(adapted.models) == {"0", "8", "60"}
    for folder in adapted.models.values():
        model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert tokenizer.convert_tokens_to_ids("<extra_id_7>") < model.config.vocab_size
        assert model.config.decoder_start_token_id == model.config.pad_token_id == 0
    assert adapted.trained_parameters == sum(weight.numel() for weight in model.parameters())


def test_a_loss_that_is_no_number_ends_it_with_a_sentence_that_names_the_mend(make_job, tmp_path):
    job = make_job(tmp_path / "run", optimizer={"lr": 1e30, "weight_decay": 0})
    with pytest.raises(DivergedError, match=r"^the loss was .* at step .*; lower optimizer\.lr .* another run\.name"):
        carry_out(job)


def test_step_0_is_the_model_that_was_started_from(make_job, tmp_path):
    job = make_job(tmp_path / "run")
    carry_out(job)
    assert_same(weights(job, 0), load_file(tmp_path / "t5/model.safetensors"))


def test_a_fresh_model_of_an_existing_folders_shape_has_other_weights_and_the_same_for_one_seed(make_job, tmp_path):
    fresh = {"path": str(tmp_path / "t5"), "fresh": True, "sentinels": 4}
    first, again = (make_job(tmp_path / name, model=fresh) for name in ("first", "again"))
    other = make_job(tmp_path / "other", model=fresh, run={"seed": 1})
    ours, same, different = (load_file(f"{job.place.model}/model.safetensors") for job in (first, again, other))
    assert_same(ours, same)
    assert not np.array_equal(ours["shared.weight"], different["shared.weight"])
    assert len(ours["shared.weight"]) == len(load_file(tmp_path / "t5/model.safetensors")["shared.weight"]) + 4


@pytest.mark.parametrize("at", [1, 6, 9, 11])
def test_killed_and_started_again_it_keeps_the_models_of_one_left_alone(make_job, tmp_path, at):
    undisturbed = make_job(tmp_path / "whole")
    carry_out(undisturbed)
    job = make_job(tmp_path / "killed")
    with killed_at_call(training, "loss_and_gradient", at):
        job.carry_out(CPU, lambda: False)
    assert read_adaptation(job) is None
    assert carry_out(job) is not None
    for step in (0, 8, 12):
        assert_same(weights(job, step), weights(undisturbed, step))
    assert losses(job) == losses(undisturbed)


def test_told_to_stop_it_leaves_a_checkpoint_of_that_very_step_and_goes_on_from_it(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(stop_signal, "_LOOK_S", 0.0)
    undisturbed = make_job(tmp_path / "whole")
    carry_out(undisturbed)
    job, real, seen = make_job(tmp_path / "stopped"), training.loss_and_gradient, []
    allow_to_run(job.place.folder)

    def told(*arguments):
        seen.append(1)
        if len(seen) == 7:
            ask_to_stop(job.place.folder)
        return real(*arguments)

    monkeypatch.setattr(training, "loss_and_gradient", told)
    assert carry_out(job) is None and len(losses(job)) == 7
    allow_to_run(job.place.folder)
    assert carry_out(job) is not None and len(seen) == 12, "a step was taken twice"
    assert_same(weights(job, 12), weights(undisturbed, 12))


def on_rank(job):
    job.carry_out(CPU, lambda: False)


@pytest.mark.parametrize("changes", [OBJECTIVES["prefix_lm"], OBJECTIVES["spans"]], ids=["prefix_lm", "spans"])
@pytest.mark.processes
def test_two_ranks_reach_the_weights_of_one(make_job, tmp_path, changes):
    fresh = {"config": CONFIG, "tokenizer": str(tmp_path / "tokenizer"), "sentinels": 8}
    alone = make_job(tmp_path / "one", model=fresh, **changes)
    carry_out(alone)
    both = make_job(tmp_path / "two", model=fresh, **changes)
    run_ranks(2, on_rank, both)
    np.testing.assert_allclose(losses(both), losses(alone), rtol=1e-4)
    for step in (0, 8, 12):
        assert_same(weights(both, step), weights(alone, step), tolerance=1e-3)


def test_more_steps_go_on_from_the_last_ones(make_job, tmp_path):
    whole = make_job(tmp_path / "whole", steps=20)
    carry_out(whole)
    run = tmp_path / "run"
    carry_out(make_job(run))
    longer = make_job(run, steps=20)
    assert read_adaptation(longer) is None
    adapted = carry_out(longer)
    assert set(adapted.models) == {"0", "8", "12", "20"}
    assert_same(weights(longer, 20), weights(whole, 20))


def test_a_step_to_keep_that_is_past_is_refused(make_job, tmp_path):
    run = tmp_path / "run"
    carry_out(make_job(run))
    with pytest.raises(SettingsError, match=r"at step 12, beyond step 3; start another run\.name"):
        carry_out(make_job(run, save_at=[3]))
