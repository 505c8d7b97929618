"""OpenAI's routes on a service, as the plugin of vLLM has them: a task is a request's model. Answers are greedy."""

import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from pipeline.bank import Snapshot
from pipeline.serving import openai_bodies as bodies
from pipeline.serving.bank_tasks import message_row, prompt_rows, row_contents
from pipeline.serving.failures import openai_failure, public_error
from pipeline.serving.model_loop import Piece
from pipeline.serving.prompted_model import Completion
from pipeline.serving.requests import Request
from pipeline.serving.service import Service, check_size

_log = logging.getLogger(__name__)
_COMPLETION_TOKENS = 16
"""OpenAI's longest completion where a request sets none."""
_FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"model": bodies.OpenAIFailure, "description": "A setting or a row that cannot be answered"},
    401: {"model": bodies.OpenAIFailure, "description": "No token, or one that is not known"},
    404: {"model": bodies.OpenAIFailure, "description": "No such task, version or alias"},
    503: {"model": bodies.OpenAIFailure, "description": "Too many requests wait, or the bank cannot be read"},
    "default": {"model": bodies.OpenAIFailure, "description": "Another failure"},  # else FastAPI tells of a 422
}


def add_openai_routes(api: FastAPI, service: Service) -> None:
    """Add /v1/completions, /v1/chat/completions and /v1/models."""
    _add_models(api, service)

    @api.post("/v1/completions", responses=_FAILURES, response_model=bodies.CompletionReply)
    async def completions(body: bodies.CompletionBody) -> Response | BaseModel:
        """Greedy answers behind a task's prompt, one for each row."""
        most = body.max_tokens or min(_COMPLETION_TOKENS, service.settings.max_new_tokens)
        asking = _Asking(service, body, prompt_rows(body.prompt), most, shorten=False)
        if body.stream:
            return await _stream(asking, "cmpl", _TEXT)
        name, answers = await asking.answers()
        choices = [
            bodies.TextChoice(index=place, text=answer.text, finish_reason=_finish_reason(answer))
            for place, answer in enumerate(answers)
        ]
        return bodies.CompletionReply(**_head("cmpl", name), choices=choices, usage=_usage(answers))

    @api.post("/v1/chat/completions", responses=_FAILURES, response_model=bodies.ChatReply)
    async def chat(body: bodies.ChatBody) -> Response | BaseModel:
        """A greedy answer to a row in a chat's one message."""
        asked = body.max_completion_tokens or body.max_tokens
        most = asked or service.settings.max_new_tokens
        asking = _Asking(service, body, [message_row(body.messages)], most, shorten=asked is None)
        if body.stream:
            return await _stream(asking, "chatcmpl", _CHAT)
        name, (answer,) = await asking.answers()
        message = bodies.AnswerMessage(content=answer.text)
        choice = bodies.ChatChoice(index=0, message=message, finish_reason=_finish_reason(answer))
        return bodies.ChatReply(**_head("chatcmpl", name), choices=[choice], usage=_usage([answer]))


def _add_models(api: FastAPI, service: Service) -> None:
    @api.get("/v1/models", responses=_FAILURES)
    def models() -> bodies.ModelList:
        """The tasks of the version that is served."""
        snapshot = service.snapshot()
        return bodies.ModelList(data=[_card(name, snapshot) for name in snapshot.names()])

    @api.get("/v1/models/{model}", responses=_FAILURES)
    async def model(model: str) -> bodies.ModelCard:
        """A task: `name`, `name@3` or `name@alias`."""
        with service.admitted():
            return _card(model, (await service.find(model))[1])


def _card(name: str, snapshot: Snapshot) -> bodies.ModelCard:
    return bodies.ModelCard(id=name, created=int(datetime.fromisoformat(snapshot.header.time).timestamp()))


@dataclass(frozen=True)
class _Asking:
    """What one client asks for."""

    service: Service
    body: bodies.CompletionBody | bodies.ChatBody
    rows: Sequence[str]
    most: int
    """Tokens of an answer."""
    shorten: bool

    async def answers(self) -> tuple[str, Sequence[Completion]]:
        """The version that answered, as `name@3`, and its answer to each row. Raises: PromptBankError."""
        with self.service.admitted():
            name, request = await self.request()
            return name, (await self.service.complete(request)).answers

    async def request(self) -> tuple[str, Request]:
        """The version that will answer, as `name@3`, and what it is asked. Raises: PromptBankError."""
        self.body.refuse()
        check_size(self.service.settings, len(self.rows), self.most, "max_tokens")
        prompt, _ = await self.service.find(self.body.model)
        name = f"{prompt.record.name}@{prompt.version}"
        contents = row_contents(prompt, self.rows)
        return name, Request(contents, [name] * len(contents), self.most, self.shorten, self.body.stops())


def _head(kind: str, name: str) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}


def _finish_reason(answer: Completion) -> bodies.FinishReason:
    return "stop" if answer.ended else "length"


def _usage(answers: Sequence[Completion]) -> bodies.Usage:
    read, written = sum(answer.input_tokens for answer in answers), sum(answer.tokens for answer in answers)
    return bodies.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


@dataclass(frozen=True)
class _Form:
    """How a stream's events look."""

    chunk: type[bodies.CompletionChunk] | type[bodies.ChatChunk]
    choices: Callable[[Piece], list[Any]]
    """Of a piece, each for an event of its own."""
    opening: Sequence[Any] = ()
    """Those of the events before the first piece."""


def _text_choices(piece: Piece) -> list[bodies.TextChunkChoice]:
    reason = _finish_reason(piece.whole) if piece.whole else None
    return [bodies.TextChunkChoice(index=piece.row, text=piece.text, finish_reason=reason)]


def _chat_choices(piece: Piece) -> list[bodies.ChunkChoice]:
    found = [bodies.ChunkChoice(index=0, delta={"content": piece.text})] if piece.text else []
    end = [bodies.ChunkChoice(index=0, delta={}, finish_reason=_finish_reason(piece.whole))] if piece.whole else []
    return found + end


_TEXT = _Form(bodies.CompletionChunk, _text_choices)
_CHAT = _Form(
    bodies.ChatChunk, _chat_choices, [bodies.ChunkChoice(index=0, delta={"role": "assistant", "content": ""})]
)


async def _stream(asking: _Asking, kind: str, form: _Form) -> StreamingResponse:
    """The reply, once its first event is there: a mistake before that has its own status."""
    events = _events(asking, kind, form)
    return _Stream(await anext(events), events)


async def _events(asking: _Asking, kind: str, form: _Form) -> AsyncGenerator[str]:
    """Server-sent events. What fails before the first of them raises, and later it is an event."""
    begun, answers, service = False, list[Completion](), asking.service
    options = asking.body.stream_options
    with service.admitted():
        name, request = await asking.request()
        head = _head(kind, name)
        try:
            async with aclosing(service.stream(request)) as pieces:
                async for piece in pieces:
                    for choice in (*(() if begun else form.opening), *form.choices(piece)):
                        begun = True
                        yield _event(form.chunk(**head, choices=[choice]).model_dump_json())
                    answers += [piece.whole] if piece.whole else []
            if options is not None and options.include_usage:
                yield _event(form.chunk(**head, choices=[], usage=_usage(answers)).model_dump_json())
        except Exception as error:
            if not begun:
                raise
            _log.exception("an answer ended in the middle of its stream")
            yield _event(json.dumps(openai_failure(public_error(error, service.tasks.bank))[0]))
    yield _event("[DONE]")


def _event(data: str) -> str:
    return f"data: {data}\n\n"


class _Stream(StreamingResponse):
    """Events that were begun. When the client has left, the rest is closed at once, and with it what it asked for."""

    def __init__(self, first: str, rest: AsyncGenerator[str]) -> None:
        async def events() -> AsyncGenerator[str]:
            yield first
            async for event in rest:
                yield event

        super().__init__(events(), media_type="text/event-stream")
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()
