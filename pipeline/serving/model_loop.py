"""The thread that runs the model of a service, for requests of many callers.

Rows that are generated join the running batch between two tokens, and leave it when they are done. Requests to classify
run between two tokens as well, all that wait in one batch, and answers get as much time as those took. Requests take
turns with their rows. What a caller who left has asked for does not run on. A caller may be told answers while they are
written.
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
from pipeline.serving.streamed_text import StreamedText

Observe = Callable[[str, int], None]
"""Told the kind of a batch, `classify` or `generate`, and its rows."""


@dataclass(frozen=True)
class Reply:
    """Answers to one request, all by one version of the bank; or why it is refused."""

    version: int
    answers: list[Any] | PromptBankError


@dataclass(frozen=True)
class Piece:
    """A further part of the answer to one row of a request."""

    row: int
    text: str
    whole: Completion | None = None
    """With the last piece: the whole answer, and what it took."""


Tell = Callable[[Sequence[Piece]], None]
"""Called in the model's thread, with pieces of one request; must not raise."""


@dataclass(eq=False)
class _Asked:
    request: Request
    tell: Tell | None
    future: Future[Reply] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.request.tasks)


@dataclass(eq=False)
class _Generating:
    """A request of which some rows are under way."""

    future: Future[Reply]
    version: int
    rows: list[EncodedRow]
    waiting: deque[int]
    """Rows that have not joined the batch yet."""
    tell: Tell | None
    texts: dict[int, StreamedText] = field(default_factory=dict)
    """Of the rows that are under way, where somebody is told."""
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
        self._closed = False
        self._ready: deque[_Generating] = deque()
        """Requests with rows that will join as soon as there is room."""
        self._running: RunningBatch[_RowKey] | None = model.running_batch()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def ask(self, kind: str, request: Request, tell: Tell | None = None) -> Future[Reply]:
        """`classify` or `generate`; the future can be cancelled until it is answered.

        tell: gets pieces of the answers that are generated, each as soon as it is certain. A model whose rows cannot
        join others (`shares_prompts`) has each answer in one piece.
        """
        asked = _Asked(request, tell)
        with self._changed:
            self._asked[kind].append(asked)
            self._changed.notify()
        return asked.future

    def close(self) -> None:
        """End the thread after what is under way, and wait a moment for it. What is not answered by then never is."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(5)  # a batch that hangs must not keep the process

    def _run(self) -> None:
        while not self._closed:
            self._wait()
            start = time.monotonic()
            self._turn("classify", self._classify)
            now = time.monotonic()
            if self._running is None:
                self._turn("generate", self._generate)
                continue
            if sum(len(request.waiting) for request in self._ready) < self._max_rows:
                self._turn("generate", self._encode)
            self._go_on(self._running)
            # Under a load of requests to classify, answers take half of the time.
            while self._running is not None and len(self._running) and time.monotonic() - now < now - start:
                self._go_on(self._running)

    def _wait(self) -> None:
        """Until there is something to do."""
        if self._ready or (self._running is not None and len(self._running)):
            return
        with self._changed:
            if any(self._asked.values()):
                return
            self._changed.wait_for(lambda: self._closed or any(self._asked.values()))
        time.sleep(self._wait_s)

    def _turn(self, kind: str, answer: Callable[[list[_Asked]], None]) -> None:
        """Take up requests that wait, as many as make a batch, and at least one."""
        taken, rows = list[_Asked](), 0
        with self._changed:
            waiting = self._asked[kind]
            while waiting and (not taken or rows + len(waiting[0]) <= self._max_rows):
                asked = waiting.popleft()
                if not asked.future.cancelled():  # else its caller has left
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
                if not future.done() and future.set_running_or_notify_cancel():
                    future.set_exception(error)
            return False
        return True

    def _classify(self, taken: list[_Asked]) -> None:
        self._observe("classify", sum(map(len, taken)))
        _reply(taken, self._model.classify_each([asked.request for asked in taken]))

    def _generate(self, taken: list[_Asked]) -> None:
        self._observe("generate", sum(map(len, taken)))
        answers = self._model.complete_each([asked.request for asked in taken])
        for asked, of_request in zip(taken, answers.of_request, strict=True):
            if asked.tell and not isinstance(of_request, PromptBankError):
                asked.tell([Piece(row, answer.text, answer) for row, answer in enumerate(of_request)])
        _reply(taken, answers)

    def _encode(self, taken: list[_Asked]) -> None:
        version, encoded = self._model.encode_each([asked.request for asked in taken], labelled=False)
        for asked, rows in zip(taken, encoded, strict=True):
            if isinstance(rows, PromptBankError) or not rows:
                _answer(asked.future, Reply(version, rows))
            else:
                self._ready.append(_Generating(asked.future, version, rows, deque(range(len(rows))), asked.tell))

    def _go_on(self, running: RunningBatch[_RowKey]) -> None:
        """Let rows join that there is room for, and then all rows take a token."""
        self._ready = deque(request for request in self._ready if not request.future.cancelled())
        running.drop(lambda key: key[0].future.cancelled())
        joining = self._joining(running.unfinished())
        callers = list(dict.fromkeys(request.future for request, _ in (*running.unfinished(), *joining)))
        if not self._guard(lambda: self._take_a_token(running, joining), callers):
            self._running = self._model.running_batch()
            self._ready = deque(request for request in self._ready if not request.future.done())

    def _joining(self, under_way: Sequence[_RowKey]) -> list[_RowKey]:
        """Rows that join next: one of each request in turn, as long as all rows fit when padded to the longest."""
        joining = list[_RowKey]()
        longest = max(map(_tokens, under_way), default=0)
        while self._ready and len(under_way) + len(joining) < self._max_rows:
            request = self._ready[0]
            key = (request, request.waiting[0])
            longest, rows = max(longest, _tokens(key)), len(under_way) + len(joining) + 1
            if rows > 1 and rows * longest > self._model.token_budget:
                break
            joining.append(key)
            request.waiting.popleft()
            self._ready.rotate(-1)
            if not request.waiting:
                self._ready.pop()
        return joining

    def _take_a_token(self, running: RunningBatch[_RowKey], joining: list[_RowKey]) -> None:
        if joining:
            self._observe("generate", len(running) + len(joining))
            rows = [request.rows[number] for request, number in joining]
            self._took(running, self._model.join(running, rows, joining))
        if len(running):
            self._took(running, self._model.step(running))

    def _took(self, running: RunningBatch[_RowKey], done: Sequence[tuple[_RowKey, Any]]) -> None:
        """All rows have a token more: tell what is new of answers, and reply to requests of which no row is left."""
        pieces: dict[_Generating, list[Piece]] = {}
        for (request, row), ids in running.written():
            if request.tell and (text := self._text(request, row).piece(ids)):
                pieces.setdefault(request, []).append(Piece(row, text))
        for (request, row), ids in done:
            answer = request.answers[row] = self._model.completion(request.rows[row], ids)
            if request.tell:
                rest = self._text(request, row).rest(answer.text)
                pieces.setdefault(request, []).append(Piece(row, rest, answer))
        for request, of_request in pieces.items():
            assert request.tell is not None
            request.tell(of_request)
        for request in dict.fromkeys(request for (request, _), _ in done):
            if len(request.answers) == len(request.rows):
                answers = [request.answers[number] for number in range(len(request.rows))]
                _answer(request.future, Reply(request.version, answers))

    def _text(self, request: _Generating, row: int) -> StreamedText:
        if row not in request.texts:
            request.texts[row] = self._model.streamed_text(request.rows[row])
        return request.texts[row]


def _tokens(key: _RowKey) -> int:
    """Most tokens that a row comes to."""
    request, number = key
    return request.rows[number].length + request.rows[number].max_new_tokens


def _reply(taken: Sequence[_Asked], answers: BatchAnswers[Any]) -> None:
    for asked, of_request in zip(taken, answers.of_request, strict=True):
        _answer(asked.future, Reply(answers.version, of_request))


def _answer(future: Future[Reply], reply: Reply) -> None:
    if future.set_running_or_notify_cancel():  # else its caller has left
        future.set_result(reply)
