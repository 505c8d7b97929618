"""The bank's prompts beside the new ones: the same rows, and outcomes from which each metric follows exactly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import save

from pipeline.backbone.files import find_model, read_config, read_tokenizer
from pipeline.backbone.host import host_backbone
from pipeline.corpus.reader import open_split
from pipeline.refresh.gate import compare
from pipeline.tuning import incumbents
from pipeline.tuning.evaluate import EvalRequest, evaluate
from pipeline.tuning.incumbents import (
    Incumbents,
    RecordedScoring,
    best_states,
    decode_incumbent,
    encode_incumbent,
    measure_against,
    pair_keys,
    read_pairs,
)
from pipeline.tuning.loop import tune
from pipeline.tuning.progress import TuningRun
from tests.corpora import make_corpus, trial
from tests.ranks import run_ranks
from tests.refresh.records import make_record

METRICS = ("accuracy", "f1", "exact_match", "rouge_l", "loss")


def make_run(folder: Path, tokenizer, architecture) -> TuningRun:
    corpora = {m: make_corpus(folder / "corpora", tokenizer, architecture, m, i) for i, m in enumerate(METRICS)}
    trials = [trial(m, corpora[m], metric=m, max_steps=4, eval_every=2) for m in METRICS]
    return TuningRun(trials, corpora, folder / "run", max_live_trials=8, checkpoint_every=50, token_budget=256)


def made_up() -> Incumbents:
    """A prompt for each task but the last, none of the new ones' length."""
    rng = np.random.default_rng(0)
    prompts = {m: rng.normal(size=(3 + i, 32)).astype(np.float32) for i, m in enumerate(METRICS[:-1])}
    return Incumbents({m: f"digest of {m}" for m in prompts}, prompts)


def keys(states, old: Incumbents):
    return pair_keys(best_states(states), old.digests)


def test_both_sides_answer_the_same_rows_and_their_metrics_are_those_of_an_evaluation(model, tmp_path):
    backbone, tokenizer, _ = model
    run, old = make_run(tmp_path, tokenizer, backbone.architecture), made_up()
    states = tune(run, backbone, tokenizer)
    measure_against(old, run, states, backbone, tokenizer)
    pairs = read_pairs(run.folder, keys(states, old))
    assert set(pairs) == set(METRICS[:-1])
    for state in states[:-1]:
        metric, corpus = state.trial.task, run.corpora[state.trial.task]
        rows = open_split(corpus.splits["dev"], state.trial.settings.eval_rows)
        incumbent = torch.as_tensor(old.prompts[metric])
        request = EvalRequest(incumbent, rows, metric, corpus.labels, corpus.label_ids, 6)
        (score,) = evaluate(backbone, tokenizer, [request], 10_000)
        values = compare(metric, pairs[metric])[:2]
        best = state.history[state.best_at].value
        assert values == pytest.approx((score.value, best), rel=1e-4) and len(pairs[metric].new) == len(rows) == 12


@pytest.mark.parametrize(
    "offsets", [None, {"negative": 1.5, "positive": -0.5, "gone": 3.0}, {"negative": 1.5}], ids=str
)
def test_the_banks_prompt_is_scored_as_its_record_says_and_the_new_one_as_tonights_settings_say(
    model, tmp_path, offsets
):
    backbone, tokenizer, _ = model
    corpus = make_corpus(tmp_path / "corpora", tokenizer, backbone.architecture, "film")
    tonight = trial("film", corpus, metric="f1", max_steps=4, eval_every=2, calibrate=True, eval_rows=40)
    run = TuningRun([tonight], {"film": corpus}, tmp_path / "run", 8, 50, 256)
    prompt = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    scoring = RecordedScoring("mean", offsets)
    old = Incumbents({"film": "digest"}, {"film": prompt}, {"film": scoring})
    (state,) = tune(run, backbone, tokenizer)
    measure_against(old, run, [state], backbone, tokenizer)
    pair = read_pairs(run.folder, keys([state], old))["film"]

    rows, train = open_split(corpus.splits["dev"]), open_split(corpus.splits["train"])
    request = EvalRequest(torch.as_tensor(prompt), rows, "f1", corpus.labels, corpus.label_ids, 6, "mean")
    if offsets is not None:  # a record that lacks a label's offset has all measured anew
        known = tuple(offsets[label] for label in corpus.labels) if len(offsets) == 3 else None
        request = replace(request, label_offsets=known, unlabelled=None if known else train)
    (score,) = evaluate(backbone, tokenizer, [request], 10_000)
    values = compare("f1", pair)[:2]
    assert values == pytest.approx((score.value, state.history[state.best_at].value), rel=1e-4)


def test_the_file_of_a_banks_prompt_is_as_it_was_where_labels_are_scored_by_sum():
    prompt = np.ones((2, 4), np.float32)
    record = make_record("film")
    assert encode_incumbent(prompt, record) == save({"prompt": prompt})
    labels = ("negative", "positive")
    for scoring in (
        RecordedScoring(),
        RecordedScoring("mean"),
        RecordedScoring("sum", {"negative": 0.5, "positive": 2}),
    ):
        told = None if scoring.label_offsets is None else tuple(scoring.label_offsets[label] for label in labels)
        changed = record.model_copy(
            update={"labels": labels, "label_score": scoring.label_score, "label_offsets": told}
        )
        array, read = decode_incumbent(encode_incumbent(prompt, changed))
        np.testing.assert_array_equal(array, prompt)
        assert read == scoring


def test_what_was_measured_is_not_measured_again_unless_it_is_for_another_prompt(model, tmp_path, monkeypatch):
    backbone, tokenizer, _ = model
    run, old = make_run(tmp_path, tokenizer, backbone.architecture), made_up()
    states = tune(run, backbone, tokenizer)
    assert read_pairs(run.folder, keys(states, old)) is None and read_pairs(run.folder, {}) == {}
    measure_against(old, run, states, backbone, tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(incumbents, "answer", lambda *rest: pytest.fail("measured twice"))
        measure_against(old, run, states, backbone, tokenizer)
    other = replace(old, digests={**old.digests, "f1": "another prompt"})
    assert read_pairs(run.folder, keys(states, other)) is None
    measure_against(other, run, states, backbone, tokenizer)
    assert read_pairs(run.folder, keys(states, other)) is not None
    damaged = run.folder / "dev_outcomes.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert read_pairs(run.folder, keys(states, other)) is None


def test_a_task_whose_every_trial_failed_is_not_compared(model, tmp_path):
    backbone, tokenizer, _ = model
    run, old = make_run(tmp_path, tokenizer, backbone.architecture), made_up()
    states = tune(run, backbone, tokenizer)
    states[0].status = "failed"
    measure_against(old, run, states, backbone, tokenizer)
    assert set(read_pairs(run.folder, keys(states, old))) == set(METRICS[1:-1])


def measure_on_rank(folder: Path, model_folder: Path):
    files = find_model(str(model_folder))
    backbone = host_backbone(
        files, read_config(files), int8=True, dtype=torch.float32, device=torch.device("cpu"), sharded=True
    )
    tokenizer, old = read_tokenizer(files), made_up()
    own = make_run(folder / f"rank{dist.get_rank()}", tokenizer, backbone.architecture)
    run = replace(own, folder=folder / "run")
    states = tune(run, backbone, tokenizer)
    measure_against(old, run, states, backbone, tokenizer)
    dist.barrier()
    return read_pairs(run.folder, keys(states, old))


@pytest.mark.slow
@pytest.mark.processes
def test_two_ranks_measure_what_one_does(model, tmp_path):
    backbone, tokenizer, folder = model
    run, old = make_run(tmp_path / "one", tokenizer, backbone.architecture), made_up()
    states = tune(run, backbone, tokenizer)
    measure_against(old, run, states, backbone, tokenizer)
    alone = read_pairs(run.folder, keys(states, old))
    first, second = run_ranks(2, measure_on_rank, tmp_path / "two", folder)
    for task, pair in alone.items():
        np.testing.assert_array_equal(first[task].new, second[task].new)
        np.testing.assert_allclose(first[task].incumbent, pair.incumbent, rtol=1e-3, atol=1e-3)
