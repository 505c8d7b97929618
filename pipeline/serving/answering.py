"""What a service does with a request: it is let in, its tasks are looked up, and the model's thread answers it.

Runs on the event loop, and needs no Ray.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from pipeline.bank import Prompt, Snapshot
from pipeline.errors import OverloadedError, PromptBankError
from pipeline.serving.bank_tasks import BankTasks, public_sentence
from pipeline.serving.model_loop import ModelLoop, Piece, Reply
from pipeline.serving.prompted_model import Completion, PromptedModel
from pipeline.serving.requests import Request
from pipeline.serving.service import VersionedAnswers
from pipeline.serving.service_metrics import ServiceMetrics
from pipeline.serving.service_settings import ServiceSettings


class Answering:
    """A model and its bank, for many callers at once. Most methods raise as `PromptedModel.generate` does."""

    def __init__(self, settings: ServiceSettings, model: PromptedModel, metrics: ServiceMetrics) -> None:
        self.settings = settings
        self.model = model
        self.metrics = metrics
        self.tasks = BankTasks(model.bank, model.backbone, model.longest)
        self._admitted = 0
        self._loop = ModelLoop(model, settings.max_rows, settings.batch_wait_s, self._on_batch)

    def close(self) -> None:
        """End the model's thread."""
        self._loop.close()

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Around all that a request waits for: the bank's store, and the model. Raises: OverloadedError."""
        if self._admitted >= self.settings.max_waiting:
            raise OverloadedError(f"{self._admitted} requests wait for the model already; come back later")
        self._admitted += 1
        try:
            yield
        finally:
            self._admitted -= 1

    async def find(self, task: str) -> tuple[Prompt, Snapshot]:
        """As `BankTasks.find`. A store that is slow to tell stops no one else's answers."""
        current, (name, _, revision) = self.model.bank.current, task.partition("@")
        if current is not None and revision in ("", str(current.version)) and name in current.used:  # so in memory
            return self.tasks.find(task)
        return await asyncio.to_thread(self.tasks.find, task)

    async def complete(self, request: Request) -> VersionedAnswers[Completion]:
        """An answer to each row."""
        return await self._ask("generate", request)

    async def classify(self, request: Request) -> VersionedAnswers[dict[str, float]]:
        """Each row's score of every label, in nats."""
        return await self._ask("classify", request)

    async def stream(self, request: Request) -> AsyncGenerator[Piece]:
        """The answers in pieces, as they are written. Who stops asking for them ends the work on them, too."""
        request = await self._settled(request)
        running, pieces = asyncio.get_running_loop(), asyncio.Queue[Sequence[Piece] | None]()

        def tell(told: Sequence[Piece] | None) -> None:
            running.call_soon_threadsafe(pieces.put_nowait, told)

        future = self._loop.ask("generate", request, tell)
        future.add_done_callback(lambda _: tell(None))
        try:
            while (told := await pieces.get()) is not None:
                for piece in told:
                    yield piece
            self._checked(future.result(), request)
        finally:
            future.cancel()

    async def _ask(self, kind: str, request: Request) -> VersionedAnswers[Any]:
        settled = await self._settled(request)
        reply = await asyncio.wrap_future(self._loop.ask(kind, settled))
        return VersionedAnswers(reply.version, self._checked(reply, request))

    async def _settled(self, request: Request) -> Request:
        """The request by its prompts' versions."""
        named = dict.fromkeys(task for task in request.tasks if "@" in task)
        if not named:
            return request
        versions = {task: f"{task.partition('@')[0]}@{(await self.find(task))[1].version}" for task in named}
        return replace(request, tasks=[versions.get(task, task) for task in request.tasks])

    def _checked(self, reply: Reply, request: Request) -> list[Any]:
        """The answers, counted. Raises: why the request was refused."""
        if isinstance(reply.answers, PromptBankError):
            raise type(reply.answers)(public_sentence(reply.answers, self.model.bank)) from reply.answers
        for task in request.tasks:
            self.metrics.rows.labels(task.partition("@")[0]).inc()
        return reply.answers

    def _on_batch(self, kind: str, rows: int) -> None:
        """Called in the model's thread."""
        self.metrics.batch_rows.labels(kind).observe(rows)
