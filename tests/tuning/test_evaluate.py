"""Evaluation: many trials in one batch, labels by log-likelihood, open targets decoded, as each alone."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.backbone import prompted
from pipeline.corpus.reader import open_split
from pipeline.tuning.evaluate import EvalRequest, answer, evaluate
from pipeline.tuning.metrics import goodness, label_metric, text_metric
from tests.corpora import make_corpus, reviews, task_corpus


@pytest.fixture
def requests(model, tmp_path):
    backbone, tokenizer, _ = model
    out = []
    for i, metric in enumerate(("accuracy", "f1", "rouge_l", "exact_match", "loss")):
        corpus = make_corpus(tmp_path, tokenizer, backbone.architecture, metric, seed=i, rows=15 + i)
        prompt = torch.randn(3 + 2 * i, 32, generator=torch.Generator().manual_seed(i))
        split = open_split(corpus.splits["dev"])
        out.append(EvalRequest(prompt, split, metric, corpus.labels, corpus.label_ids, 4))
    return out


def test_requests_taken_together_score_as_each_alone(model, requests):
    backbone, tokenizer, _ = model
    together = evaluate(backbone, tokenizer, requests, token_budget=100)
    for request, score in zip(requests, together, strict=True):
        (alone,) = evaluate(backbone, tokenizer, [request], token_budget=10_000)
        assert score.value == pytest.approx(alone.value, rel=1e-5)
        assert score.loss == pytest.approx(alone.loss, rel=1e-4)


def test_the_loss_is_the_mean_over_target_tokens(model, requests):
    backbone, tokenizer, _ = model
    for request in requests:
        (score,) = evaluate(backbone, tokenizer, [request], 1000)
        rows = prompted.Rows(
            [request.prompt], [0] * len(request.split), [request.split.input_ids(i) for i in range(len(request.split))]
        )
        targets = [request.split.target_ids(i) for i in range(len(request.split))]
        nll = backbone.run(prompted.target_nll, rows, targets).sum().item()
        assert score.loss == pytest.approx(nll / sum(map(len, targets)), rel=1e-4)


def test_a_metric_named_loss_is_the_loss(model, requests):
    backbone, tokenizer, _ = model
    (score,) = evaluate(backbone, tokenizer, [replace(requests[0], metric="loss")], 1000)
    assert score.value == score.loss


def test_the_answer_is_the_label_with_the_highest_log_likelihood(model, requests):
    backbone, tokenizer, _ = model
    request = requests[0]
    inputs = [request.split.input_ids(i) for i in range(len(request.split))]
    rows = prompted.Rows([request.prompt], [0] * len(inputs), inputs)
    with torch.no_grad():
        nll = [backbone.run(prompted.target_nll, rows, [np.array(ids)] * len(inputs)) for ids in request.label_ids]
    answers = torch.stack(nll).argmin(0).tolist()
    right = [request.labels[answer] == request.split.target(i) for i, answer in enumerate(answers)]
    (score,) = evaluate(backbone, tokenizer, [request], 1000)
    assert score.value == pytest.approx(np.mean(right))


def test_a_target_behind_a_special_token_is_met_by_what_the_service_would_show(model, tmp_path):
    backbone, tokenizer, _ = model
    rows = reviews(12, seed=0)
    prompt = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    def request_with(name, targets):
        pairs = [(text, target) for (text, _), target in zip(rows, targets, strict=True)]
        corpus = task_corpus(tmp_path, tokenizer, backbone.architecture, name, {"train": pairs, "dev": pairs})
        return EvalRequest(prompt, open_split(corpus.splits["dev"]), "exact_match", None, None, 4)

    plain = request_with("plain", ["good"] * len(rows))
    (first,) = answer(backbone, tokenizer, [plain], 1000)
    inputs = [plain.split.input_ids(i) for i in range(len(rows))]
    shown = {
        tokenizer.decode(ids, skip_special_tokens=True).strip(): text
        for ids, text in zip(inputs, first.texts, strict=True)
    }
    behind = request_with("behind", [f"<unk> {shown[text]}" for text, _ in rows])
    (again,) = answer(backbone, tokenizer, [behind], 1000)
    assert sorted(again.wanted) == sorted(first.texts)
    assert evaluate(backbone, tokenizer, [behind], 1000)[0].value == 1


def test_metrics_on_worked_examples():
    assert label_metric("accuracy", ["a", "b", "a"], ["a", "b", "b"]) == pytest.approx(2 / 3)
    # a: precision 1/2, recall 1 -> 2/3; b: precision 1, recall 1/2 -> 2/3
    assert label_metric("f1", ["a", "b", "a"], ["a", "b", "b"]) == pytest.approx(2 / 3)
    assert text_metric("exact_match", ["Who is it?", "a  b"], ["who is it?", "a b"]) == 0.5
    # Longest common subsequence 2 of 3 and 2 words: precision 2/3, recall 1 -> 0.8
    assert text_metric("rouge_l", ["el pingüino azul"], ["Pingüino AZUL"]) == pytest.approx(0.8)


def test_more_is_better_but_for_loss_and_ties_fall_to_the_lower_loss():
    assert goodness("accuracy", 0.9, 1.0) > goodness("accuracy", 0.8, 0.5)
    assert goodness("accuracy", 0.8, 0.6) < goodness("accuracy", 0.8, 0.5)
    assert goodness("accuracy", 0.8, 0.4) > goodness("accuracy", 0.8, 0.5)
    assert goodness("loss", 0.4, 0.4) > goodness("loss", 0.5, 0.5)


def test_an_answer_ends_at_eos_also_where_targets_have_their_language_behind_it(model, requests):
    backbone, tokenizer, _ = model
    request = next(request for request in requests if request.metric == "exact_match")
    marked = _LanguageLast(request.split, language=int(request.split.target_ids(0)[0]))
    asked = [request, replace(request, split=marked)]
    plain, behind = (of.texts for of in answer(backbone, tokenizer, asked, 1000))
    assert plain == behind


class _LanguageLast:
    """A split whose targets end as mBART's do, with a token of their language behind eos."""

    def __init__(self, split, language):
        self._split, self._language = split, language

    def __len__(self):
        return len(self._split)

    def __getattr__(self, name):
        return getattr(self._split, name)

    def target_ids(self, number):
        return np.append(self._split.target_ids(number), self._language)
