"""A trial on its own curve: it starts again where its first steps explode, and ends where it does not learn."""

import numpy as np
import pytest
import torch

from pipeline.tuning.evaluate import Score
from pipeline.tuning.loop import tune
from pipeline.tuning.parameters import initial_parameters
from pipeline.tuning.progress import TuningRun
from pipeline.tuning.state import from_record, start, start_again, to_record
from pipeline.tuning.trials import make_trial
from tests.corpora import make_corpus, make_task, trial

CPU = torch.device("cpu")
RATE = 0.3


def begun(model, parameters="direct", rate=RATE, at_start=1.0, **changes):
    """A trial that has been measured at its start, before its first step."""
    backbone, tokenizer, _ = model
    settings = make_task(prompt={"length": 3, "parameters": parameters}, optimizer={"lr": rate}, **changes)
    own = make_trial("film", settings, 0, "corpus", "backbone")
    prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    state = start(own, prompt, initial_parameters(own, prompt, backbone, tokenizer))
    state.judge(Score(0.5, at_start))
    return state


def step(state, loss):
    state.prompt.grad = torch.randn(state.prompt.shape, generator=torch.Generator().manual_seed(state.step))
    state.update(loss)


@pytest.mark.parametrize("parameters", ["direct", "residual", "low_rank"])
def test_a_trial_that_explodes_starts_again_as_one_that_was_given_a_third_of_its_rate(model, parameters):
    backbone, tokenizer, _ = model
    state = begun(model, parameters)
    for loss in (1.0, 1.1, 1.4, 1.9, 2.5, 2.4):
        assert not state.exploded
        step(state, loss)
    assert state.exploded and state.step == 5, "the step after which it is seen is not taken"
    again = start_again(state, initial_parameters(state.trial, state.best, backbone, tokenizer))
    lower = begun(model, parameters, rate=RATE / 3)
    assert again.restarted.endswith("2.4 at step 5; it started again at 0.1")
    lower.restarted = "once"
    for loss in (1.0, 2.0, 2.0, 2.0, 2.0, 2.0):  # now it goes on, whatever its loss is
        step(again, loss)
        assert not again.exploded
    for loss in (1.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        step(lower, loss)
    assert torch.equal(again.prompt, lower.prompt) and again.step == lower.step == 6
    assert again.history == lower.history


@pytest.mark.parametrize(
    "losses",
    [[2.0, 9.0, 0.5, 0.5, 0.5, 0.5], [1.0] + [1.4] * 8, [2.0, 0.9, 0.8, 6.0, 0.7, 0.6], [0.1] + [0.5] * 8],
    ids=["one batch", "a little above", "later batch", "an easy first one"],
)
def test_a_few_bad_batches_are_no_explosion(model, losses):
    state = begun(model, at_start=0.05)  # of dev rows, which with `balance` or a teacher is another loss
    for loss in losses:
        step(state, loss)
        assert not state.exploded
    assert state.step == len(losses)


def test_a_trial_that_has_been_better_than_its_start_does_not_go_back_there(model):
    state = begun(model, eval_every=2)
    for loss in (1.0, 1.0):
        step(state, loss)
    state.judge(Score(0.9, 0.5))
    for _ in range(6):
        step(state, 50.0)
    assert not state.exploded and state.step == 8


def test_a_trial_that_a_rung_of_its_sweep_has_judged_does_not_come_to_it_again(model):
    sweep = {"sweep": {"seed": [0, 1]}, "halving": {"first": 1, "factor": 2}}
    for measured in (False, True):
        state = begun(model, eval_every=2, **sweep)
        for loss in (1.0, 1.0):
            step(state, loss)
        if measured:
            state.judge(Score(0.4, 1.5))
        for _ in range(5):
            step(state, 50.0)
        assert state.exploded == (not measured)


def test_a_checkpoint_amid_an_explosion_changes_nothing(model):
    state = begun(model)
    for loss in (1.0, 1.1, 1.4, 2.9):
        step(state, loss)
    record, tensors = to_record(state)
    kept = from_record(state.trial, record, {name: tensor.clone() for name, tensor in tensors.items()}, CPU)
    for one in (state, kept):
        step(one, 3.0)
        step(one, 3.0)
        assert one.exploded
    assert torch.equal(state.prompt, kept.prompt)


def test_a_trial_whose_loss_is_not_finite_starts_again_once_and_then_fails(model, tmp_path):
    backbone, tokenizer, _ = model
    corpus = make_corpus(tmp_path / "corpora", tokenizer, backbone.architecture, "film")
    wild = trial("film", corpus, optimizer={"lr": 6e38})  # beyond the largest float
    run = TuningRun([wild], {"film": corpus}, tmp_path / "run", 4, 100, 256)
    (state,) = tune(run, backbone, tokenizer)
    assert state.status == "failed" and state.restarted and state.rate == pytest.approx(2e38)
    events = (run.folder / "events.jsonl").read_text()
    assert events.count("it started again at 2e+38") == 1
    steps = [line for line in (run.folder / "metrics/film.jsonl").read_text().splitlines() if '"loss"' in line]
    assert len(steps) == state.step, "steps before the restart are still in its series"


def test_a_trial_that_diverges_ends_and_tells_how_many_steps_it_saved(model):
    for patience in (8, None):
        state = begun(model, max_steps=100, eval_every=10, patience=patience)
        for loss in (0.5, 3.0, 0.8, 3.0):  # one high evaluation is no divergence
            state.step += 10
            state.judge(Score(0.6 - loss / 10, loss))
            assert state.status == "live"
        state.step += 10
        state.judge(Score(0.1, 3.1))
        if patience is None:
            assert state.status == "live", "null: it never stops early"
        else:
            assert state.status == "stopped early" and "50 of 100 steps were saved" in state.reason
            assert np.isfinite(state.history[state.best_at].loss) and state.best_at == 1


def test_a_trial_whose_metric_still_rises_goes_on_whatever_its_loss_does(model):
    state = begun(model, at_start=0.1, max_steps=100, eval_every=10, patience=5)
    for value in (0.6, 0.7, 0.8, 0.9):
        state.step += 10
        state.judge(Score(value, 3.0))
        assert state.status == "live"


def test_a_trial_without_progress_tells_how_many_steps_it_saved(model):
    state = begun(model, max_steps=100, eval_every=10, patience=2)
    for value in (0.7, 0.6, 0.6):
        state.step += 10
        state.judge(Score(value, 0.9))
    assert state.status == "stopped early"
    assert state.reason == "no gain in 2 evaluations; 70 of 100 steps were saved"
