"""Prompts of one task that answer together, against their single answers combined by hand."""

from collections import Counter

import numpy as np
import pytest

from pipeline.bank import PromptBank
from pipeline.errors import BankError
from pipeline.serving import PromptedModel, classify_ensemble, ensemble, generate_ensemble, load_backbone
from tests.corpora import reviews
from tests.serving.prompts import LABELS, new_prompt
from tests.tiny import make_model

PROMPTS = ["colour", "colour2", "colour3", "colour4"]
TEXTS = [text for text, _ in reviews(10, 0)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    backbone = load_backbone(str(make_model(folder / "model", "llama", scale=3.0)))
    bank = PromptBank.open(folder / "bank", create=True)
    prompts = [new_prompt(name, 3 + i, like="colour") for i, name in enumerate(PROMPTS)]
    bank.publish([*prompts, new_prompt("film", 4)], backbone.identity, "test", {}, "latest")
    return PromptedModel(backbone, bank)


@pytest.fixture(scope="module")
def probabilities(model):
    """[N, E, L] of single calls, normalised over the labels."""
    single = [model.classify(TEXTS, [prompt] * len(TEXTS)) for prompt in PROMPTS]
    odds = np.exp([[list(scores.values()) for scores in of_prompt] for of_prompt in single]).transpose(1, 0, 2)
    return odds / odds.sum(-1, keepdims=True)


def test_mean_is_the_mean_probability_of_single_calls(model, probabilities):
    shares = classify_ensemble(model, TEXTS, PROMPTS, combine="mean")
    by_label = [[of_text[label] for label in LABELS["colour"]] for of_text in shares]
    np.testing.assert_allclose(by_label, probabilities.mean(1), rtol=1e-4)
    assert all(list(of_text.values()) == sorted(of_text.values(), reverse=True) for of_text in shares)


def test_majority_is_the_share_of_votes_of_single_calls(model, probabilities):
    shares = classify_ensemble(model, TEXTS, PROMPTS)
    votes = [Counter(LABELS["colour"][i] for i in of_text) for of_text in probabilities.argmax(-1)]
    assert shares == [{label: count[label] / len(PROMPTS) for label in LABELS["colour"]} for count in votes]
    assert any(len(count) > 1 for count in votes)  # prompts do disagree


def test_a_tie_of_votes_goes_to_the_higher_mean_probability():
    scores = [{"red": np.log(0.6), "green": np.log(0.4)}, {"red": np.log(0.1), "green": np.log(0.9)}]
    assert list(ensemble._combined(scores, ["a", "b"], "majority")) == ["green", "red"]
    assert ensemble._combined(scores, ["a", "b"], "majority") == {"red": 0.5, "green": 0.5}


def test_generated_texts_are_chosen_by_majority_then_by_the_first_prompt(model):
    single = [model.generate(TEXTS, [prompt] * len(TEXTS), 3) for prompt in PROMPTS]
    expected = []
    for of_text in zip(*single, strict=True):
        most = max(of_text.count(answer) for answer in of_text)
        expected.append(next(answer for answer in of_text if of_text.count(answer) == most))
    assert generate_ensemble(model, TEXTS, PROMPTS, 3) == expected
    assert len(set(expected)) > 1


def test_an_ensemble_of_one_prompt_is_that_prompt(model):
    assert generate_ensemble(model, TEXTS, ["film"], 3) == model.generate(TEXTS, ["film"] * len(TEXTS), 3)
    assert classify_ensemble(model, [], ["film"]) == []


def test_prompts_with_other_labels_cannot_answer_together(model):
    with pytest.raises(BankError, match=r"'colour' and 'film' cannot answer together: .*red.* and .*positive"):
        classify_ensemble(model, TEXTS, ["colour", "film"])
    with pytest.raises(BankError, match="at least one prompt"):
        generate_ensemble(model, TEXTS, [])
