"""Full fine-tuning of a task: its prompts' rows and evaluator, with the best weights on dev kept and tested."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.optimization import Adafactor

from pipeline.backbone.files import find_model, read_config, read_tokenizer, save_config_and_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.corpus.reader import open_split
from pipeline.lab.full_weights import training
from pipeline.lab.full_weights.fine_tuning import Diverged, FineTuningJob, read_result
from pipeline.lab.full_weights.rank_setup import TrainingPlace
from pipeline.tuning.batches import rows_of_step
from pipeline.tuning.evaluate import eval_request, evaluate
from pipeline.tuning.machine import peak_bytes
from tests.corpora import make_corpus, make_task
from tests.killed import killed_at_call
from tests.ranks import run_ranks
from tests.tiny import make_model

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
FAMILIES = ["llama", "t5"]


@pytest.fixture(scope="module", params=FAMILIES)
def ready(request, tmp_path_factory):
    """A tiny model and a task's corpus: what makes an order of a run's folder and changed settings."""
    folder = tmp_path_factory.mktemp(request.param)
    files = find_model(str(make_model(folder / "model", request.param, scale=1.0)))
    config, tokenizer = read_config(files), read_tokenizer(files)
    save_config_and_tokenizer(config, tokenizer, folder / "description")
    architecture = "encoder-decoder" if config.is_encoder_decoder else "decoder-only"
    corpus = make_corpus(folder / "corpora", tokenizer, architecture, "film", rows=60)

    def job(run, **changes):
        place = TrainingPlace(
            str(run), "film", str(folder / "model"), str(folder / "description"), checkpoint_every=7,
            tokens_per_microbatch=128,
        )  # fmt: skip
        usual = {"optimizer": CALM, "max_steps": 30, "eval_every": 10, "eval_rows": 60}
        settings = make_task(**{**usual, **changes}).model_dump(mode="json")
        return FineTuningJob(place, "film", settings, corpus.to_dict(), seed=3, fingerprint="model")

    return job, corpus


CALM = {"lr": 0.02, "weight_decay": 0, "schedule": "constant"}


def carry_out(job):
    job.carry_out(CPU, lambda: False)
    result = read_result(job.run_folder)
    assert result is not None
    return result


def series(job, key):
    lines = (job.place.folder / "metrics/film.jsonl").read_text().splitlines()
    return [line[key] for line in map(json.loads, lines) if key in line]


def test_the_losses_are_those_of_a_plain_loop_over_the_rows_of_the_tasks_prompt(ready, tmp_path):
    make_job, corpus = ready
    job = make_job(tmp_path)
    carry_out(job)
    train, trial = open_split(corpus.splits["train"]), job.trial()
    seq2seq = "t5" in job.place.model
    model = (AutoModelForSeq2SeqLM if seq2seq else AutoModelForCausalLM).from_pretrained(job.place.model).eval()
    optimizer = Adafactor(model.parameters(), lr=0.02, scale_parameter=True, relative_step=False)
    plain = []
    for step in range(trial.settings.max_steps):
        rows = rows_of_step(trial, train, step)
        count = sum(len(train.target_ids(row)) for row in rows)
        total = torch.zeros(())
        for row in rows:
            x, y = (torch.tensor(ids.astype(np.int64)) for ids in (train.input_ids(row), train.target_ids(row)))
            if seq2seq:
                loss = model(input_ids=x[None], labels=y[None]).loss
            else:
                labels = torch.cat([torch.full_like(x, -100), y])
                loss = model(input_ids=torch.cat([x, y])[None], labels=labels[None]).loss
            total = total + loss * len(y) / count
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        plain.append(total.item())
    np.testing.assert_allclose(series(job, "loss"), plain, rtol=1e-3)


def test_the_result_is_what_the_prompts_evaluator_measures_of_the_saved_folder(ready, tmp_path):
    make_job, corpus = ready
    job = make_job(tmp_path)
    result = carry_out(job)
    assert result.status == "tuned" and result.dev > result.before and result.best_step in (10, 20, 30)
    assert result.dev == max(series(job, "dev_metric"))
    files = find_model(result.model)
    backbone = host_backbone(files, read_config(files), int8=False, dtype=torch.float32, device=CPU, sharded=False)
    nothing = torch.zeros(0, backbone.hidden_size)
    requests = [
        eval_request(job.trial().settings, nothing, open_split(corpus.splits[split], 60), corpus)
        for split in ("dev", "test")
    ]
    dev, test = evaluate(backbone, read_tokenizer(files), requests, 256)
    assert (dev.value, test.value) == (result.dev, result.test)
    np.testing.assert_allclose([dev.loss, test.loss], [result.dev_loss, result.test_loss], rtol=1e-4)


def test_the_result_tells_what_the_method_costs(ready, tmp_path):
    make_job, _ = ready
    job = make_job(tmp_path)
    result = carry_out(job)
    auto = AutoModelForSeq2SeqLM if "t5" in job.place.model else AutoModelForCausalLM
    parameters = sum(weight.numel() for weight in auto.from_pretrained(job.place.model).parameters())
    assert result.trained_parameters == parameters
    assert 4 * parameters <= result.stored_bytes < 4 * parameters + 20_000
    assert result.seconds > 0 and 0 < result.peak_memory_bytes <= peak_bytes()
    assert result.seed == 3 and result.metric == "accuracy"
    assert not job.place.checkpoints.exists()


def test_an_order_carried_out_again_does_nothing_and_another_one_in_its_folder_starts_anew(ready, tmp_path):
    make_job, _ = ready
    first = carry_out(make_job(tmp_path))
    assert carry_out(make_job(tmp_path)) == first
    assert carry_out(make_job(tmp_path, max_steps=10)).steps == 10


def test_generated_targets_are_measured_too_and_a_start_that_nothing_beats_stores_nothing(ready, tmp_path):
    make_job, _ = ready
    hopeless = {"optimizer": {"name": "adamw", "lr": 30.0, "weight_decay": 0}, "metric": "exact_match"}
    result = carry_out(make_job(tmp_path, **hopeless, eval_every=5, patience=2))
    assert result.status == "no gain" and result.steps == 10, "it went on beyond its patience"
    assert result.best_step == 0 and result.stored_bytes == 0 and result.model is None
    assert (result.dev, result.test is not None) == (result.before, True)


def test_a_training_that_leaves_the_range_of_numbers_says_so_and_is_not_trained_again(ready, tmp_path, monkeypatch):
    make_job, _ = ready
    job, steps = make_job(tmp_path, optimizer={"lr": 1e30, "weight_decay": 0}), []

    def infinite(*arguments):
        steps.append(1)
        return float("nan")

    monkeypatch.setattr(training, "loss_and_gradient", infinite)
    for _ in range(2):
        job.carry_out(CPU, lambda: False)
        assert read_result(job.run_folder) == Diverged("the loss was nan at step 0", job.digest)
    assert len(steps) == 1 and not job.place.checkpoints.exists()


@pytest.mark.parametrize("at", [3, 10, 19, 25])
def test_killed_and_started_again_it_ends_with_the_same_result(ready, tmp_path, at):
    make_job, _ = ready
    undisturbed = carry_out(make_job(tmp_path / "whole"))
    job = make_job(tmp_path / "killed")
    with killed_at_call(training, "loss_and_gradient", at):
        job.carry_out(CPU, lambda: False)
    again = carry_out(job)
    varying = {"seconds": 0.0, "peak_memory_bytes": 0, "model": None, "digest": ""}
    assert replace(again, **varying) == replace(undisturbed, **varying)
    for key in ("loss", "dev_metric"):
        assert series(job, key) == series(make_job(tmp_path / "whole"), key)


def on_rank(job):
    job.carry_out(CPU, lambda: False)


@pytest.mark.processes
def test_two_ranks_reach_the_result_of_one(ready, tmp_path):
    make_job, _ = ready
    alone = carry_out(make_job(tmp_path / "one"))
    job = make_job(tmp_path / "two")
    run_ranks(2, on_rank, job)
    both = read_result(job.run_folder)
    assert (both.dev, both.test, both.best_step) == (alone.dev, alone.test, alone.best_step)
    np.testing.assert_allclose(both.dev_loss, alone.dev_loss, rtol=1e-3)
    assert both.trained_parameters == alone.trained_parameters


def test_a_result_or_a_model_with_a_flipped_bit_is_not_taken_for_what_was_left(ready, tmp_path):
    make_job, _ = ready
    job = make_job(tmp_path)
    result = carry_out(job)
    assert result.model is not None and result.files and result.is_whole
    path = job.place.folder / "result.json"
    whole = path.read_bytes()
    for place in range(0, len(whole), 7):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        assert read_result(job.run_folder) in (None, result)
    path.write_bytes(whole)
    (weights,) = (job.place.folder / "tuned").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 16
    weights.write_bytes(data)
    assert not read_result(job.run_folder).is_whole
