"""Labels scored by sum or mean and calibrated: as computed by hand with transformers, and as a service answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from pipeline.backbone.label_scores import label_offsets, label_scores
from pipeline.bank import PromptBank
from pipeline.corpus.encoding import encode_targets
from pipeline.corpus.reader import open_split
from pipeline.serving import PromptedModel, classify_ensemble, load_backbone
from pipeline.tuning.evaluate import answer, eval_request, evaluate
from tests.corpora import make_task, reviews, task_corpus
from tests.serving.prompts import new_prompt
from tests.tiny import make_model

LABELS = ("good", "not good", "very bad film")
"""Of different numbers of tokens."""
TEXTS = [text for text, _ in reviews(30, 0)]
HOWS = [
    {},
    {"label_score": "mean"},
    {"calibrate": True},
    {"label_score": "mean", "calibrate": True, "metric": "f1"},
]
PROMPT = np.random.default_rng(3).normal(size=(4, 32)).astype(np.float32)


def softmax(scores):
    odds = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


@given(arrays(np.float64, (7, 3), elements=st.floats(-30, 0)))
def test_an_offset_is_the_log_of_a_labels_mean_probability_which_sums_to_one(scores):
    offsets = label_offsets(scores)
    np.testing.assert_allclose(np.exp(offsets), softmax(scores).mean(axis=0), rtol=1e-9)
    assert sum(np.exp(offsets)) == pytest.approx(1)


def test_a_prior_that_all_rows_share_is_taken_off_whole():
    own = np.random.default_rng(0).normal(size=(50, 3))
    prior = np.array([0.0, -4.0, 3.0])
    # Rows that are alike but for the order of labels have no prior of their own.
    rows = np.concatenate([own, np.roll(own, 1, axis=1), np.roll(own, 2, axis=1)])
    np.testing.assert_allclose(label_offsets(rows), np.log([1 / 3] * 3))
    one_row = np.array([[-1.0, -2.0, -3.0]]) + prior
    calibrated = label_scores(one_row, [1, 1, 1], "sum", label_offsets(one_row))
    np.testing.assert_allclose(calibrated - calibrated.mean(), 0, atol=1e-12)


def test_a_label_that_no_row_comes_near_and_rows_that_are_not_finite_leave_offsets_finite():
    far = np.array([[0.0, -5000.0], [-1.0, -6000.0]])
    assert np.isfinite(label_offsets(far)).all()
    assert label_offsets(np.array([*far, [np.nan, 0.0]])) == label_offsets(far)
    assert label_offsets(np.full((2, 3), np.nan)) == (0.0, 0.0, 0.0)


@pytest.fixture(scope="module", params=["llama", "t5"])
def model(request, tmp_path_factory):
    """A tiny model in full precision behind a service, the same in transformers, and a corpus of three labels."""
    folder = tmp_path_factory.mktemp(request.param)
    served = load_backbone(str(make_model(folder / "model", request.param, scale=2.0)), weights="full")
    kind = AutoModelForSeq2SeqLM if request.param == "t5" else AutoModelForCausalLM
    pairs = [(text, LABELS[i % 3]) for i, text in enumerate(TEXTS)]
    splits = {"train": pairs[:20], "dev": pairs[20:]}
    corpus = task_corpus(folder, served.tokenizer, served.architecture, "film", splits)
    ids = encode_targets(served.tokenizer, served.architecture, " ", LABELS)
    corpus = replace(corpus, labels=LABELS, label_ids=tuple(map(tuple, ids)))
    return served, kind.from_pretrained(folder / "model").eval(), corpus


def by_hand(reference, input_ids, label_ids):
    """log P of a label's tokens, each by transformers' own forward pass."""
    embed = reference.get_input_embeddings()
    prompt, label = torch.tensor(PROMPT), torch.tensor(label_ids)
    words = embed(torch.tensor(input_ids))
    with torch.no_grad():
        if reference.config.is_encoder_decoder:
            logits = reference(inputs_embeds=torch.cat([prompt, words])[None], labels=label[None]).logits[0]
        else:
            whole = torch.cat([prompt, words, embed(label)])[None]
            logits = reference(inputs_embeds=whole).logits[0, len(prompt) + len(words) - 1 : -1]
    return logits.log_softmax(-1)[range(len(label_ids)), label_ids].numpy()


def table_by_hand(reference, split, corpus, how):
    of_tokens = [
        [by_hand(reference, split.input_ids(row), ids) for ids in corpus.label_ids] for row in range(len(split))
    ]
    combine = np.mean if how.get("label_score") == "mean" else np.sum
    return np.array([[combine(label) for label in row] for row in of_tokens])


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_scores_are_those_computed_by_hand_with_transformers(model, how):
    served, reference, corpus = model
    request = eval_request(make_task(**how), torch.tensor(PROMPT), open_split(corpus.splits["dev"]), corpus)
    (given,) = answer(served.backbone, served.tokenizer, [request], 1000)
    wanted = table_by_hand(reference, request.split, corpus, how)
    if how.get("calibrate"):
        train = table_by_hand(reference, open_split(corpus.splits["train"]), corpus, how)
        wanted = wanted - np.log(softmax(train).mean(axis=0))
    np.testing.assert_allclose(given.label_scores, wanted, rtol=1e-4, atol=1e-4)
    assert given.texts == [LABELS[i] for i in wanted.argmax(axis=1)]


def test_the_settings_do_change_the_answers_and_never_the_loss(model):
    served, _, corpus = model
    split = open_split(corpus.splits["dev"])
    requests = [eval_request(make_task(**how), torch.tensor(PROMPT), split, corpus) for how in HOWS]
    answers = answer(served.backbone, served.tokenizer, requests, 1000)
    assert len({tuple(given.texts) for given in answers}) > 1
    losses = [score.loss for score in evaluate(served.backbone, served.tokenizer, requests, 1000)]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


def test_targets_of_the_rows_that_calibrate_are_not_used(model):
    served, _, corpus = model
    request = eval_request(make_task(calibrate=True), torch.tensor(PROMPT), open_split(corpus.splits["dev"]), corpus)
    rows = request.unlabelled
    blind = replace(rows, targets=rows.targets.take(np.zeros(len(rows), int)))
    first, second = answer(served.backbone, served.tokenizer, [request, replace(request, unlabelled=blind)], 1000)
    assert first.label_offsets == pytest.approx(second.label_offsets, rel=1e-4)


def test_offsets_that_are_given_are_taken_off_and_not_measured_again(model):
    served, _, corpus = model
    split, task = open_split(corpus.splits["dev"]), make_task(calibrate=True)
    known = eval_request(task, torch.tensor(PROMPT), split, corpus, (1.0, 0.0, -2.0))
    plain = eval_request(make_task(), torch.tensor(PROMPT), split, corpus)
    assert known.unlabelled is None
    (given, raw) = answer(served.backbone, served.tokenizer, [known, plain], 1000)
    np.testing.assert_allclose(given.label_scores, raw.label_scores - np.array([1.0, 0.0, -2.0]), rtol=1e-5)
    assert given.label_offsets == (1.0, 0.0, -2.0) and raw.label_offsets is None


@pytest.mark.parametrize("how", HOWS, ids=str)
def test_a_service_scores_labels_as_the_evaluation_did_that_the_record_tells_of(model, tmp_path, how):
    served, _, corpus = model
    request = eval_request(make_task(**how), torch.tensor(PROMPT), open_split(corpus.splits["dev"]), corpus)
    (given,) = answer(served.backbone, served.tokenizer, [request], 1000)
    bank = PromptBank.open(tmp_path / "bank", create=True)
    plain = replace(new_prompt("plain", 4, like="film"), array=PROMPT, labels=LABELS)
    own = replace(plain, name="film", label_score=request.label_score, label_offsets=given.label_offsets)
    bank.publish([own, plain], served.identity, "test", {}, "latest")
    service, split = PromptedModel(served, PromptBank.open(tmp_path / "bank")), request.split
    texts = [served.tokenizer.decode(split.input_ids(row), skip_special_tokens=True) for row in range(len(split))]
    answers = service.classify(texts * 2, ["film"] * len(texts) + ["plain"] * len(texts))
    table = np.array([[row[label] for label in LABELS] for row in answers])
    np.testing.assert_allclose(table[: len(texts)], given.label_scores, rtol=1e-4, atol=1e-4)
    if how:
        assert not np.allclose(table[: len(texts)], table[len(texts) :], atol=0.01), "the same vectors, scored by sum"
    alone = classify_ensemble(service, texts, ["film"], combine="mean")
    shares = [[row[label] for label in LABELS] for row in alone]
    np.testing.assert_allclose(shares, softmax(given.label_scores), rtol=1e-3, atol=1e-4)
