"""Stretches of text by step: each once an epoch, in any order of asking, and other ones with another seed."""

import numpy as np
import pytest

from pipeline.errors import CorpusError
from pipeline.lab.adapt.batches import TextBatches
from pipeline.lab.adapt.objectives import Markers
from pipeline.settings import ObjectiveSettings

MARKERS = Markers(1, range(300, 200, -1))


def batches(**changes) -> TextBatches:
    usual = {"text": np.arange(2, 107, dtype=np.int32), "tokens": 10, "batch_size": 4, "seed": 0}
    return TextBatches(**{**usual, "objective": ObjectiveSettings(), "markers": MARKERS, **changes})


def texts(examples) -> list[list[int]]:
    return [[*x[:-1].tolist(), *y[:-1].tolist()] for x, y in zip(examples.inputs, examples.targets, strict=True)]


def test_an_epoch_has_each_stretch_once_and_the_next_one_another_order():
    seen = [text for step in range(5) for text in texts(batches().examples(step))]  # 20 of 10 stretches
    whole = [list(range(first, first + 10)) for first in range(2, 102, 10)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == whole
    assert seen[:10] != seen[10:]


def test_a_step_is_the_same_whatever_came_before_and_differs_by_seed():
    first = batches().examples(7)
    ours = batches()
    for step in (3, 0):
        ours.examples(step)
    for x, again in zip(first.inputs, ours.examples(7).inputs, strict=True):
        np.testing.assert_array_equal(x, again)
    assert texts(batches(seed=1).examples(7)) != texts(first)


def test_a_stretch_is_cut_elsewhere_in_the_next_epoch():
    cuts = [[len(x) for x in batches(batch_size=10).examples(epoch).inputs] for epoch in range(3)]
    assert len({tuple(sorted(of_epoch)) for of_epoch in cuts}) > 1


def test_a_corpus_shorter_than_a_stretch_is_refused():
    with pytest.raises(CorpusError, match="105 tokens, less than one stretch of 200"):
        batches(tokens=200)
