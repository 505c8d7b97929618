"""Ensembles compared with plain numpy, row by row, and with the service's."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.lab.comparison.ensembles import average, majority
from pipeline.lab.comparison.questions import SplitAnswers
from pipeline.serving.ensemble import classify_ensemble

LABELS = ("a", "b", "c")


def member(scores: np.ndarray) -> SplitAnswers:
    rows = len(scores)
    texts = [LABELS[place] for place in scores.argmax(axis=1)]
    return SplitAnswers(np.zeros(rows), np.ones(rows), ["a"] * rows, texts, scores, LABELS)


def texts(*answers: str) -> SplitAnswers:
    return SplitAnswers(np.zeros(len(answers)), np.ones(len(answers)), [*answers], [*answers], None, None)


def scores_of(seed: int) -> np.ndarray:
    """`[E, N, 3]` log-likelihoods of up to five prompts."""
    rng = np.random.default_rng(seed)
    return rng.normal(-3, 2, (rng.integers(1, 6), rng.integers(1, 9), 3))


tables = st.integers(0, 2**32 - 1).map(scores_of)


@given(tables)
def test_the_average_is_the_label_of_the_highest_mean_probability(scores):
    found = average([member(of_prompt) for of_prompt in scores])
    for row, label in enumerate(found):
        shares = [np.exp(of_prompt[row]) / np.exp(of_prompt[row]).sum() for of_prompt in scores]
        assert label == LABELS[int(np.mean(shares, axis=0).argmax())]


@given(tables)
def test_the_majority_is_the_label_of_most_prompts_and_of_a_tie_the_more_probable(scores):
    found = majority([member(of_prompt) for of_prompt in scores])
    for row, label in enumerate(found):
        votes = [int(of_prompt[row].argmax()) for of_prompt in scores]
        shares = np.mean([np.exp(o[row]) / np.exp(o[row]).sum() for o in scores], axis=0)
        most = max(votes.count(place) for place in range(3))
        tied = [place for place in range(3) if votes.count(place) == most]
        assert label == LABELS[max(tied, key=lambda place: shares[place])]


@given(tables)
def test_the_comparison_answers_as_the_service_does(scores):
    class Model:
        """Of whose `classify` the service's ensembles ask."""

        def classify(self, asked, tasks):
            of_row = [scores[int(task), int(text)] for text, task in zip(asked, tasks, strict=True)]
            return [dict(zip(LABELS, row, strict=True)) for row in of_row]

    asked, prompts = [str(row) for row in range(scores.shape[1])], [str(e) for e in range(len(scores))]
    for combine, ours in (("mean", average), ("majority", majority)):
        served = [next(iter(shares)) for shares in classify_ensemble(Model(), asked, prompts, combine)]
        assert ours([member(of_prompt) for of_prompt in scores]) == served


def test_texts_are_voted_on_and_of_a_tie_the_foremost_prompt_answers():
    members = [texts("x", "p"), texts("y", "q"), texts("y", "r")]
    assert majority(members) == ["y", "p"] and average(members) is None


def test_losses_cannot_vote():
    silent = SplitAnswers(np.zeros(1), np.ones(1), ["a"], None, None, None)
    assert majority([silent, silent]) is None and average([silent, silent]) is None
