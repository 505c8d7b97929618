"""The loop that runs a model for many callers, against the model asked directly."""

import threading
import time
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
    yield made
    made.close()


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
    wait([long, *(future for future in left if not future.cancelled())], 60)
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


def test_rows_of_a_caller_who_left_neither_wait_nor_run_on(model, loop):
    left = [loop.ask("generate", Request(["good film"] * 16, ["film"] * 16, 60)) for _ in range(6)]
    while not loop.batches:  # until the first of them run
        time.sleep(0.001)
    assert all(future.cancel() for future in left)
    before = len(loop.batches)
    assert len(loop.ask("generate", Request(["good film"], ["film"], 1)).result(60).answers) == 1
    assert sum(rows for _, rows in loop.batches[before:]) <= 16 + 1  # at most the batch that ran, and this row


def test_a_request_of_one_row_is_not_behind_all_rows_of_an_earlier_one(model, loop):
    if model.running_batch() is None:
        pytest.skip("rows of this model do not join others")
    order = []
    large = loop.ask("generate", Request(["good film"] * 60, ["film"] * 60, 30))
    large.add_done_callback(lambda _: order.append("large"))
    small = loop.ask("generate", Request(["good film"], ["film"], 1))
    small.add_done_callback(lambda _: order.append("small"))
    wait([large, small], 60)
    assert order == ["small", "large"]


def test_an_answer_goes_on_under_a_load_of_requests_to_classify(model, loop, monkeypatch):
    if model.running_batch() is None:
        pytest.skip("rows of this model do not join others")
    classify_each = model.classify_each
    # As long as several tokens take.
    monkeypatch.setattr(model, "classify_each", lambda asked: time.sleep(0.1) or classify_each(asked))
    loop.ask("generate", Request(["good film"], ["film"], 2)).result(60)
    stop, done = threading.Event(), []

    def classify():
        while not stop.is_set():
            loop.ask("classify", Request(["bad"] * 16, ["film"] * 16)).result(60)
            done.append(1)

    threads = [threading.Thread(target=classify) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        while not done:
            time.sleep(0.001)
        before = len(done)
        loop.ask("generate", Request(["good film"], ["film"], 80)).result(60)
        during = len(done) - before
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert during < 60  # else every token would have waited for a batch of its own


def test_a_request_larger_than_a_batch_is_answered(model, loop):
    request = Request(["good film", "bad food"] * 20, ["film"] * 40, 4)
    assert texts_of(loop.ask("generate", request).result(60)) == model.generate(request.texts, request.tasks, 4)


def test_an_answer_ends_its_work_with_its_first_stop(model, loop, monkeypatch):
    if model.running_batch() is None:
        pytest.skip("rows of this model do not join others")
    steps, step = [], model.step
    monkeypatch.setattr(model, "step", lambda running: steps.append(1) or step(running))
    (whole,) = loop.ask("generate", Request(["good film"], ["film"], 40)).result(60).answers
    taken = len(steps)
    stop = whole.text[: len(whole.text) // 4]
    (cut,) = loop.ask("generate", Request(["good film"], ["film"], 40, stops=(stop,))).result(60).answers
    assert cut.text == "" and cut.ended and cut.tokens < whole.tokens
    assert len(steps) - taken == cut.tokens - 1


def test_the_pieces_of_many_callers_answers_are_their_answers(model, loop):
    texts = [text for text, _ in reviews(24, 0)]
    told, replies = [[] for _ in texts], []
    for i in range(0, len(texts), 3):
        request = Request(texts[i : i + 3], ["open", "film", "open"], 1 + i, stops=("good", "d f") if i % 2 else ())
        replies.append((request, loop.ask("generate", request, told[i].extend)))
    for i, (request, future) in zip(range(0, len(texts), 3), replies, strict=True):
        answers, pieces = future.result(60).answers, told[i]
        assert [answer.text for answer in answers] == [a.text for a in model.complete_each([request]).only()]
        for row, answer in enumerate(answers):
            of_row = [piece for piece in pieces if piece.row == row]
            assert "".join(piece.text for piece in of_row) == answer.text
            assert [piece.whole for piece in of_row] == [None] * (len(of_row) - 1) + [answer]


def test_a_piece_is_told_before_the_next_token_is_made(model, loop, monkeypatch):
    if model.running_batch() is None:
        pytest.skip("rows of this model do not join others")
    order, step = [], model.step
    monkeypatch.setattr(model, "step", lambda running: order.append("token") or step(running))
    request = Request(["good film"], ["film"], 12)
    (answer,) = loop.ask("generate", request, order.extend).result(60).answers
    assert answer.tokens == 12 and order[0].text and order[1] == "token"
    assert order[2::2] == [piece for piece in order if piece != "token"][1:]  # a word each


def test_an_answer_whose_caller_left_in_the_middle_takes_no_more_tokens(model, loop, monkeypatch):
    if model.running_batch() is None:
        pytest.skip("rows of this model do not join others")
    step, rows = model.step, []
    monkeypatch.setattr(model, "step", lambda running: rows.append(len(running)) or step(running))
    began = threading.Event()
    left = loop.ask("generate", Request(["good film"], ["film"], 150), lambda _: began.set())
    assert began.wait(60) and left.cancel()
    taken = len(rows)
    loop.ask("generate", Request(["good film"], ["film"], 5)).result(60)
    assert taken < 100 and rows[taken + 1 :] == [1] * len(rows[taken + 1 :])


def test_a_failure_in_the_middle_of_a_stream_is_told_behind_its_pieces(model, loop, monkeypatch):
    if model.running_batch() is None:
        pytest.skip("rows of this model do not join others")
    step, told = model.step, []

    def breaks(running):
        if len(told) > 2:
            raise MemoryError("no room")
        return step(running)

    monkeypatch.setattr(model, "step", breaks)
    with pytest.raises(MemoryError, match="no room"):
        loop.ask("generate", Request(["good film"], ["film"], 50), told.extend).result(60)
    assert 2 < len(told) < 50 and all(piece.whole is None for piece in told)
