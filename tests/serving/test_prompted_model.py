"""One model, prompts of a bank: rows of different tasks in one batch, answered as one by one."""

import numpy as np
import pytest

from pipeline.bank import Metrics, NewPrompt, PromptBank, Template
from pipeline.errors import BankError, CorpusError
from pipeline.serving import PromptedModel
from tests.corpora import reviews
from tests.tiny import make_model

LABELS = {"film": ("negative", "positive"), "colour": ("red", "green", "blue"), "open": None}


def new_prompt(name: str, length: int) -> NewPrompt:
    return NewPrompt(
        name=name,
        array=np.random.default_rng(length).normal(size=(length, 32)).astype(np.float32),
        task=name,
        template=Template(input="{text}", target="{label}", separator=" "),
        labels=LABELS[name],
        metric="accuracy" if LABELS[name] else "rouge_l",
        metrics=Metrics(),
        initialisation="random",
        length=length,
        steps=0,
        seed=0,
        corpus_digest="0" * 64,
        settings_digest="0" * 64,
    )


@pytest.fixture(scope="module", params=["llama", "t5"])
def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = str(make_model(folder / "model", request.param, scale=1.0))
    bank = PromptBank.open(folder / "bank", create=True)
    opened = PromptedModel.open(model, bank)
    bank.publish([new_prompt(n, 3 + i) for i, n in enumerate(LABELS)], opened.identity, "test", {}, "latest")
    return opened, folder


@pytest.fixture(scope="module")
def batch():
    texts = [text for text, _ in reviews(12, 0)]
    return [{"text": text} for text in texts], [list(LABELS)[i % 3] for i in range(len(texts))]


def test_a_mixed_batch_generates_what_each_row_generates_alone(served, batch):
    model, _ = served
    rows, tasks = batch
    together = model.generate(rows, tasks, max_new_tokens=6)
    assert together == [model.generate([row], [task], 6)[0] for row, task in zip(rows, tasks, strict=True)]


def test_a_mixed_batch_scores_the_labels_of_each_row_as_alone(served, batch):
    model, _ = served
    labelled = [(row, task) for row, task in zip(*batch, strict=True) if LABELS[task]]
    together = model.classify([row for row, _ in labelled], [task for _, task in labelled])
    for scores, (row, task) in zip(together, labelled, strict=True):
        (alone,) = model.classify([row], [task])
        assert tuple(scores) == LABELS[task]
        np.testing.assert_allclose(list(scores.values()), list(alone.values()), rtol=1e-4)


def test_a_prompt_of_another_backbone_is_refused(served, tmp_path):
    _, folder = served
    other = str(make_model(tmp_path / "other", "llama", seed=7))
    model = PromptedModel.open(other, PromptBank.open(folder / "bank"))
    with pytest.raises(BankError, match="they differ in"):
        model.generate([{"text": "good"}], ["film"])


def test_rows_and_tasks_that_do_not_fit_get_one_sentence(served):
    model, _ = served
    with pytest.raises(CorpusError, match=r"task 'film' needs the column.* text"):
        model.classify([{"words": "good"}], ["film"])
    with pytest.raises(BankError, match="did you mean 'film'"):
        model.classify([{"text": "good"}], ["flim"])
    with pytest.raises(BankError, match="without a label set"):
        model.classify([{"text": "good"}], ["open"])
