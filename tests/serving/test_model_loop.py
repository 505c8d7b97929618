"""The loop that runs a model for many callers, against the model asked directly."""

import threading
from concurrent.futures import wait

import numpy as np
import pytest

from pipeline.bank import PromptBank
from pipeline.errors import UnknownTaskError
from pipeline.serving import PromptedModel, load_backbone
from pipeline.serving.model_loop import ModelLoop
from pipeline.serving.requests import Request
from tests.corpora import reviews
from tests.serving.prompts import LABELS, new_prompt
from tests.tiny import make_model


@pytest.fixture(scope="module", params=["llama", "t5"])
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    backbone = load_backbone(str(make_model(folder / "model", request.param, seed=1, scale=2.0)))
    bank = PromptBank.open(folder / "bank", create=True)
    bank.publish([new_prompt(n, 3 + i) for i, n in enumerate(LABELS)], backbone.identity, "test", {}, "latest")
    return PromptedModel(backbone, bank, token_budget=200)


@pytest.fixture
def loop(model):
    batches = []
    made = ModelLoop(model, 16, 0.001, lambda kind, rows: batches.append((kind, rows)))
    made.batches = batches
    return made


def texts_of(reply):
    return [completion.answer for completion in reply.answers]


def test_requests_of_many_threads_get_the_answers_that_each_gets_alone(model, loop):
    texts = [text for text, _ in reviews(60, 0)]
    asked = [
        (
            "generate" if i % 2 else "classify",
            Request(texts[i : i + 1 + i % 3], ["film"] * len(texts[i : i + 1 + i % 3]), 1 + i % 9),
        )
        for i in range(50)
    ]
    futures = [None] * len(asked)

    def ask(first):
        for i in range(first, len(asked), 4):
            futures[i] = loop.ask(*asked[i])

    threads = [threading.Thread(target=ask, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (kind, request), future in zip(asked, futures, strict=True):
        reply = future.result(60)
        assert reply.version == 1
        if kind == "generate":
            assert texts_of(reply) == model.generate(request.texts, request.tasks, request.max_new_tokens)
        else:
            for scores, expected in zip(reply.answers, model.classify(request.texts, request.tasks), strict=True):
                np.testing.assert_allclose([*scores.values()], [*expected.values()], rtol=1e-4)
    assert max(rows for _, rows in loop.batches) <= 16
    assert len(loop.batches) < len(asked)  # some ran together


def test_a_bad_row_refuses_its_own_request_alone(loop):
    good, bad = (loop.ask("generate", Request(["good film"], [task], 3)) for task in ("film", "flim"))
    assert isinstance(bad.result(60).answers, UnknownTaskError)
    assert len(good.result(60).answers) == 1


def test_a_request_whose_caller_left_does_not_run(loop):
    long = loop.ask("generate", Request(["good film"] * 16, ["film"] * 16, 60))
    left = [loop.ask("classify", Request(["bad"], ["film"])) for _ in range(3)]
    cancelled = [future.cancel() for future in left]
    wait([long, *left], 60)
    assert sum(rows for kind, rows in loop.batches if kind == "classify") == cancelled.count(False)


def test_a_failure_is_told_to_its_callers_and_the_next_request_is_answered(model, loop, monkeypatch):
    def broken(*_):
        raise MemoryError("no room")

    name = "step" if model.running_batch() is not None else "_decode"
    with monkeypatch.context() as patched:
        patched.setattr(model, name, broken)
        with pytest.raises(MemoryError, match="no room"):
            loop.ask("generate", Request(["good film"], ["film"], 5)).result(60)
    after = loop.ask("generate", Request(["good film"], ["film"], 5)).result(60)
    assert texts_of(after) == model.generate(["good film"], ["film"], 5)


def test_a_request_larger_than_a_batch_is_answered(model, loop):
    request = Request(["good film", "bad food"] * 20, ["film"] * 40, 4)
    assert texts_of(loop.ask("generate", request).result(60)) == model.generate(request.texts, request.tasks, 4)
