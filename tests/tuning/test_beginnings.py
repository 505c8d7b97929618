"""Rows of a template with an instruction: what they begin with runs once, and not once a row."""

from dataclasses import replace

import pytest
import torch
from torch.nn import Parameter

from pipeline.backbone import rows
from pipeline.corpus.reader import open_split
from pipeline.tuning.evaluate import EvalRequest, evaluate
from pipeline.tuning.initialise import initial_prompt
from pipeline.tuning.step import TrialStep, losses_and_gradients
from pipeline.tuning.teaching import make_teacher
from tests.corpora import reviews, task_corpus, trial

INSTRUCTION = "the film is good or bad and the story was not very great and the film is fine or awful and the story "
TEACHER = {"text": "good great fine bad awful poor", "between": " ", "weight": 0.5}


@pytest.fixture
def corpora(model, tmp_path):
    """Two tasks whose texts begin with an instruction, and one whose texts do not."""
    backbone, tokenizer, _ = model
    found = {}
    for seed, (name, before) in enumerate({"film": INSTRUCTION, "story": INSTRUCTION[9:], "plain": ""}.items()):
        splits = {
            split: [(before + text, label) for text, label in reviews(40, 10 * seed + i)]
            for i, split in enumerate(("train", "dev"))
        }
        found[name] = task_corpus(tmp_path, tokenizer, backbone.architecture, name, splits)
    return found


def steps_of(model, corpora):
    backbone, tokenizer, _ = model
    work = []
    for name, corpus in corpora.items():
        own = trial(name, corpus, batch_size=16, teacher=TEACHER if name == "story" else None)
        train = open_split(corpus.splits["train"])
        prompt = Parameter(initial_prompt(own, backbone, tokenizer, corpus.labels, warm_starts={}))
        teacher = make_teacher(own, backbone, tokenizer, train) if own.settings.teacher else None
        work.append(TrialStep(own, prompt, 0, train, teacher))
    return work


def without_beginnings(monkeypatch):
    monkeypatch.setattr(rows, "_FEWEST_SHARED", 10**6)


@pytest.mark.parametrize("budget", [10_000, 150])
def test_a_step_gets_the_losses_and_gradients_of_rows_that_run_whole_and_runs_fewer_tokens(
    model, corpora, budget, monkeypatch
):
    backbone, work = model[0], steps_of(model, corpora)
    losses, tokens = losses_and_gradients(backbone, work, budget)
    gradients = [part.prompt.grad.clone() for part in work]
    without_beginnings(monkeypatch)
    whole, all_tokens = losses_and_gradients(backbone, work, budget)
    assert losses == pytest.approx(whole, rel=1e-5)
    for part, gradient in zip(work, gradients, strict=True):
        torch.testing.assert_close(part.prompt.grad, gradient, rtol=1e-3, atol=1e-6)
    assert tokens.text == all_tokens.text, "text counts once a row, however it runs"
    if not backbone.shares_prompts:
        assert tokens == all_tokens
    elif budget == 10_000:
        saved = [15 * len(INSTRUCTION.split()), 2 * 15 * len(INSTRUCTION[9:].split())]  # with a teacher rows run twice
        assert all_tokens.computed - tokens.computed >= sum(saved)


@pytest.mark.parametrize("metric", ["accuracy", "exact_match", "loss"])
def test_an_evaluation_scores_what_rows_that_run_whole_score(model, corpora, metric, monkeypatch):
    backbone, tokenizer, _ = model
    requests = [
        EvalRequest(part.prompt, open_split(corpora[name].splits["dev"]), metric, None, None, 4)
        for name, part in zip(corpora, steps_of(model, corpora), strict=True)
    ]
    if metric == "accuracy":
        requests = [
            replace(request, labels=corpus.labels, label_ids=corpus.label_ids)
            for request, corpus in zip(requests, corpora.values(), strict=True)
        ]
    scores = evaluate(backbone, tokenizer, requests, 500)
    without_beginnings(monkeypatch)
    for score, whole in zip(scores, evaluate(backbone, tokenizer, requests, 500), strict=True):
        assert score.value == pytest.approx(whole.value, rel=1e-4)
        assert score.loss == pytest.approx(whole.loss, rel=1e-4)
