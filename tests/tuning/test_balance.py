"""A balanced trial learns from a skewed corpus what it would learn if the rare rows stood there more often."""

import numpy as np
import pytest
import torch

from pipeline.corpus.reader import open_split
from pipeline.tuning.step import TrialStep, losses_and_gradients
from tests.corpora import reviews, task_corpus, trial

RARE = 19
"""Rows of the one label for each of the other."""


def skewed(rows: int, seed: int) -> list[tuple[str, str]]:
    """So many rows of `positive`, and for RARE of them one of `negative`."""
    pairs = reviews(6 * rows, seed)
    positive, negative = ([pair for pair in pairs if pair[1] == label] for label in ("positive", "negative"))
    return [*positive[:rows], *negative[: rows // RARE]]


def step(backbone, corpus, prompt, **changes):
    """The loss of a trial's first step, and the gradient of its prompt."""
    prompt = prompt.clone().requires_grad_()
    part = TrialStep(trial("film", corpus, **changes), prompt, 0, open_split(corpus.splits["train"]))
    losses, _ = losses_and_gradients(backbone, [part], 300)
    return losses[0], prompt.grad


def test_a_balanced_epoch_has_the_gradient_of_a_corpus_in_which_rare_rows_are_repeated(model, tmp_path):
    backbone, tokenizer, _ = model
    rows = skewed(2 * RARE, 0)
    repeated = [pair for pair in rows for _ in range(RARE if pair[1] == "negative" else 1)]
    corpora = [
        task_corpus(tmp_path, tokenizer, backbone.architecture, name, dict.fromkeys(("train", "dev"), pairs))
        for name, pairs in (("skewed", rows), ("repeated", repeated))
    ]
    prompt = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    whole = {"batch_size": len(repeated)}
    loss, gradient = step(backbone, corpora[0], prompt, balance=True, **whole)
    other_loss, other_gradient = step(backbone, corpora[1], prompt, **whole)
    assert loss == pytest.approx(other_loss, rel=1e-4)
    distance = (gradient - other_gradient).norm() / other_gradient.norm()
    assert distance < 1e-3
    _, plain = step(backbone, corpora[0], prompt, batch_size=len(rows))
    assert (plain - other_gradient).norm() / other_gradient.norm() > 0.1, "as the corpus stands it is another one"


def test_a_split_knows_the_rows_of_each_of_its_targets(model, tmp_path):
    backbone, tokenizer, _ = model
    rows = skewed(4 * RARE, 1)
    corpus = task_corpus(tmp_path, tokenizer, backbone.architecture, "film", dict.fromkeys(("train", "dev"), rows))
    train = open_split(corpus.splits["train"])
    assert {target: len(own) for target, own in train.rows_by_target.items()} == {"negative": 4, "positive": 4 * RARE}
    assert sorted(np.concatenate(list(train.rows_by_target.values()))) == list(range(len(rows)))
    for target, own in train.rows_by_target.items():
        assert {train.target(int(row)) for row in own} == {target}
