"""OpenAI's routes on a service, as the plugin of vLLM has them: a task is a request's model. Answers are greedy."""

import asyncio
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel

from pipeline.bank import Snapshot
from pipeline.serving import openai_bodies as bodies
from pipeline.serving.bank_tasks import message_row, prompt_rows, row_contents
from pipeline.serving.prompted_model import Completion
from pipeline.serving.requests import Request
from pipeline.serving.service import Service, check_size

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
        name, answers = await _complete(service, body, prompt_rows(body.prompt), most, shorten=False)
        choices = [
            bodies.TextChoice(index=place, text=answer.text, finish_reason=_finish_reason(answer))
            for place, answer in enumerate(answers)
        ]
        head = _head("cmpl", name)
        if not body.stream:
            return bodies.CompletionReply(**head, choices=choices, usage=_usage(answers))
        chunks = [bodies.CompletionReply(**head, choices=[choice]) for choice in choices]
        return _events([*chunks, *_last(bodies.CompletionReply, body, head, answers)])

    @api.post("/v1/chat/completions", responses=_FAILURES, response_model=bodies.ChatReply)
    async def chat(body: bodies.ChatBody) -> Response | BaseModel:
        """A greedy answer to a row in a chat's one message."""
        asked = body.max_completion_tokens or body.max_tokens
        most = asked or service.settings.max_new_tokens
        name, (answer,) = await _complete(service, body, [message_row(body.messages)], most, shorten=asked is None)
        head, reason = _head("chatcmpl", name), _finish_reason(answer)
        if not body.stream:
            choice = bodies.ChatChoice(index=0, message=bodies.AnswerMessage(content=answer.text), finish_reason=reason)
            return bodies.ChatReply(**head, choices=[choice], usage=_usage([answer]))
        deltas: list[tuple[dict[str, str], bodies.FinishReason | None]] = [
            ({"role": "assistant", "content": ""}, None),
            ({"content": answer.text}, None),
            ({}, reason),
        ]
        chunks = [
            bodies.ChatChunk(**head, choices=[bodies.ChunkChoice(index=0, delta=delta, finish_reason=end)])
            for delta, end in deltas
        ]
        return _events([*chunks, *_last(bodies.ChatChunk, body, head, [answer])])


def _add_models(api: FastAPI, service: Service) -> None:
    @api.get("/v1/models", responses=_FAILURES)
    def models() -> bodies.ModelList:
        """The tasks of the version that is served."""
        snapshot = service.snapshot()
        return bodies.ModelList(data=[_card(name, snapshot) for name in snapshot.names()])

    @api.get("/v1/models/{model}", responses=_FAILURES)
    def model(model: str) -> bodies.ModelCard:
        """A task: `name`, `name@3` or `name@alias`."""
        return _card(model, service.tasks.find(model)[1])


def _card(name: str, snapshot: Snapshot) -> bodies.ModelCard:
    return bodies.ModelCard(id=name, created=int(datetime.fromisoformat(snapshot.header.time).timestamp()))


async def _complete(
    service: Service, body: bodies.CompletionBody | bodies.ChatBody, rows: Sequence[str], most: int, shorten: bool
) -> tuple[str, Sequence[Completion]]:
    """The version that answered, as `name@3`, and its answer to each row. Raises: PromptBankError."""
    body.refuse()
    check_size(service.settings, len(rows), most, "max_tokens")
    prompt = await asyncio.to_thread(service.tasks.prompt, body.model)  # may read from the bank's store
    name = f"{prompt.record.name}@{prompt.version}"
    request = Request(row_contents(prompt, rows), [name] * len(rows), most, shorten, body.stops())
    return name, (await service.complete(request)).answers


def _head(kind: str, name: str) -> dict[str, Any]:
    return {"id": f"{kind}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}


def _finish_reason(answer: Completion) -> bodies.FinishReason:
    return "stop" if answer.ended else "length"


def _usage(answers: Sequence[Completion]) -> bodies.Usage:
    read, written = sum(answer.input_tokens for answer in answers), sum(answer.tokens for answer in answers)
    return bodies.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def _last(
    chunk: type[bodies.CompletionReply] | type[bodies.ChatChunk],
    body: bodies.CompletionBody | bodies.ChatBody,
    head: dict[str, Any],
    answers: Sequence[Completion],
) -> list[BaseModel]:
    """The event that tells what was used, where it is asked for."""
    wanted = body.stream_options is not None and body.stream_options.include_usage
    return [chunk(**head, choices=[], usage=_usage(answers))] if wanted else []


def _events(chunks: Sequence[BaseModel]) -> StreamingResponse:
    """Server-sent events. The answers are there already, so that a mistake has had its own status."""

    def lines() -> Iterator[str]:
        for chunk in chunks:
            yield f"data: {chunk.model_dump_json()}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream")
