"""The thread that runs the model of a service, for requests of many callers.

Rows that are generated join the running batch between two tokens, and leave it when they are done. Requests to classify
run between two tokens as well, all that wait in one batch. So no request waits for another one's whole answer.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import PromptBankError
from pipeline.serving.prompted_model import BatchAnswers, Completion, PromptedModel
from pipeline.serving.requests import EncodedRow, Request
from pipeline.serving.running_batch import RunningBatch

Observe = Callable[[str, int], None]
"""Told the kind of a batch, `classify` or `generate`, and its rows."""


@dataclass(frozen=True)
class Reply:
    """Answers to one request, all by one version of the bank; or why it is refused."""

    version: int
    answers: list[Any] | PromptBankError


@dataclass(eq=False)
class _Asked:
    request: Request
    future: Future[Reply] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.request.tasks)


@dataclass(eq=False)
class _Generating:
    """A request of which some rows are under way."""

    future: Future[Reply]
    version: int
    rows: list[EncodedRow]
    answers: dict[int, Completion] = field(default_factory=dict)


_RowKey = tuple[_Generating, int]


class ModelLoop:
    """Takes requests from any thread, and answers them in one of its own."""

    def __init__(self, model: PromptedModel, max_rows: int, wait_s: float, observe: Observe) -> None:
        """max_rows: of a batch. wait_s: how long a first request waits for others while nothing runs."""
        self._model = model
        self._max_rows = max_rows
        self._wait_s = wait_s
        self._observe = observe
        self._asked: dict[str, deque[_Asked]] = {"classify": deque(), "generate": deque()}
        self._changed = threading.Condition()
        self._ready: deque[_RowKey] = deque()
        """Rows that will join as soon as there is room."""
        self._running: RunningBatch[_RowKey] | None = model.running_batch()
        threading.Thread(target=self._run, name="model", daemon=True).start()

    def ask(self, kind: str, request: Request) -> Future[Reply]:
        """`classify` or `generate`; the future can be cancelled until the model takes the request up."""
        asked = _Asked(request)
        with self._changed:
            self._asked[kind].append(asked)
            self._changed.notify()
        return asked.future

    def _run(self) -> None:
        while True:
            self._wait()
            self._turn("classify", self._classify)
            if self._running is None:
                self._turn("generate", self._generate)
            else:
                self._turn("generate", self._encode)
                self._go_on(self._running)

    def _wait(self) -> None:
        """Until there is something to do."""
        if self._ready or (self._running is not None and len(self._running)):
            return
        with self._changed:
            if any(self._asked.values()):
                return
            self._changed.wait_for(lambda: any(self._asked.values()))
        time.sleep(self._wait_s)

    def _turn(self, kind: str, answer: Callable[[list[_Asked]], None]) -> None:
        """Take up requests that wait, as many as make a batch, and at least one."""
        taken, rows = list[_Asked](), 0
        with self._changed:
            waiting = self._asked[kind]
            while waiting and (not taken or rows + len(waiting[0]) <= self._max_rows):
                asked = waiting.popleft()
                if asked.future.set_running_or_notify_cancel():  # else its caller has left
                    taken.append(asked)
                    rows += len(asked)
        if taken:
            self._guard(lambda: answer(taken), [asked.future for asked in taken])

    def _guard(self, work: Callable[[], None], futures: Sequence[Future[Reply]]) -> bool:
        """Whether the work was done; if it fails its callers are told, and the next batch runs."""
        try:
            work()
        except Exception as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)
            return False
        return True

    def _classify(self, taken: list[_Asked]) -> None:
        self._observe("classify", sum(map(len, taken)))
        _reply(taken, self._model.classify_each([asked.request for asked in taken]))

    def _generate(self, taken: list[_Asked]) -> None:
        self._observe("generate", sum(map(len, taken)))
        _reply(taken, self._model.complete_each([asked.request for asked in taken]))

    def _encode(self, taken: list[_Asked]) -> None:
        version, encoded = self._model.encode_each([asked.request for asked in taken], labelled=False)
        for asked, rows in zip(taken, encoded, strict=True):
            if isinstance(rows, PromptBankError) or not rows:
                asked.future.set_result(Reply(version, rows))
                continue
            request = _Generating(asked.future, version, rows)
            self._ready += [(request, number) for number in range(len(rows))]

    def _go_on(self, running: RunningBatch[_RowKey]) -> None:
        """Let rows join that there is room for, and then all rows take a token."""
        joining, tokens = list[_RowKey](), sum(_tokens(key) for key in running.unfinished())
        while self._ready and len(running) + len(joining) < self._max_rows:
            tokens += _tokens(self._ready[0])
            if tokens > self._model.token_budget and (joining or len(running)):
                break
            joining.append(self._ready.popleft())
        callers = [request.future for request, _ in (*running.unfinished(), *joining)]
        if not self._guard(lambda: self._take_a_token(running, joining), callers):
            self._running = self._model.running_batch()
            self._ready = deque(key for key in self._ready if not key[0].future.done())

    def _take_a_token(self, running: RunningBatch[_RowKey], joining: list[_RowKey]) -> None:
        if joining:
            self._observe("generate", len(running) + len(joining))
            rows = [request.rows[number] for request, number in joining]
            self._finish(self._model.join(running, rows, joining))
        if len(running):
            self._finish(self._model.step(running))

    def _finish(self, done: Sequence[tuple[_RowKey, Any]]) -> None:
        for (request, row), ids in done:
            request.answers[row] = self._model.completion(request.rows[row], ids)
            if len(request.answers) == len(request.rows):
                answers = [request.answers[number] for number in range(len(request.rows))]
                request.future.set_result(Reply(request.version, answers))


def _tokens(key: _RowKey) -> int:
    """Most tokens that a row comes to."""
    request, number = key
    return request.rows[number].length + request.rows[number].max_new_tokens


def _reply(taken: Sequence[_Asked], answers: BatchAnswers[Any]) -> None:
    for asked, of_request in zip(taken, answers.of_request, strict=True):
        asked.future.set_result(Reply(answers.version, of_request))
