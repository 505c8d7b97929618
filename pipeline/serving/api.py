"""The HTTP side of a service: its routes, and its answers when something is wrong. Imports no Ray."""

import asyncio
import time
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.corpus.chat import recorded_input
from pipeline.errors import PromptBankError
from pipeline.serving import bodies
from pipeline.serving.authentication import AuthenticationMiddleware, Tokens
from pipeline.serving.failures import error_reply, public_error
from pipeline.serving.openai_routes import add_openai_routes
from pipeline.serving.service import Service, check_size
from pipeline.serving.service_metrics import ServiceMetrics

_FAILURES: dict[int | str, dict[str, Any]] = {
    401: {"model": bodies.Failure, "description": "No token, or one that is not known"},
    404: {"model": bodies.Failure, "description": "No such task"},
    413: {"model": bodies.Failure, "description": "Too many rows, too long a row, or too large a body"},
    422: {"model": bodies.Failure, "description": "A malformed body, or a row that does not fit its task"},
    503: {"model": bodies.Failure, "description": "Too many requests wait, or the bank cannot be read"},
}
_UNAVAILABLE: dict[int | str, dict[str, Any]] = {401: _FAILURES[401], 503: _FAILURES[503]}


def make_api(service: Service, tokens: Tokens | None = None) -> FastAPI:
    """The routes of a service. With `tokens` each but /healthz asks for one of them."""
    api = FastAPI(title="Prompt bank", description="Many tasks, one frozen model: each row runs behind its own prompt.")
    _add_answers(api, service)
    add_openai_routes(api, service)
    _add_views(api, service)

    async def error_without_address(request: HttpRequest, error: Exception) -> Response:
        return await error_reply(request, public_error(error, service.tasks.bank))

    for kind in (PromptBankError, HTTPException, RequestValidationError, Exception):
        api.add_exception_handler(kind, error_without_address)
    api.add_middleware(_BodyLimitMiddleware, limit=service.settings.max_body_bytes, seconds=service.settings.request_s)
    if tokens is not None:
        api.add_middleware(AuthenticationMiddleware, tokens=tokens)
    api.add_middleware(_HeadMiddleware)
    api.add_middleware(_MetricsMiddleware, metrics=service.metrics)
    return api


def _add_answers(api: FastAPI, service: Service) -> None:
    @api.post("/v1/generate", responses=_FAILURES, response_model=bodies.GenerateReply)
    async def generate(body: bodies.GenerateBody) -> Response:
        """Greedy answers, each behind the prompt of its row's task."""
        check_size(service.settings, len(body.rows), body.max_new_tokens, "max_new_tokens")
        with service.admitted():
            reply = await service.complete(body.request())
        rows = [
            bodies.Generated(task=row.task, text=completion.answer)
            for row, completion in zip(body.rows, reply.answers, strict=True)
        ]
        return _json(bodies.GenerateReply(version=reply.version, rows=rows))

    @api.post("/v1/classify", responses=_FAILURES, response_model=bodies.ClassifyReply)
    async def classify(body: bodies.ClassifyBody) -> Response:
        """The likelihood of each label of a row's task."""
        check_size(service.settings, len(body.rows), 0, "")
        with service.admitted():
            reply = await service.classify(body.request())
        rows = [
            bodies.Classified(task=row.task, label=max(scores, key=lambda label: scores[label]), log_likelihoods=scores)
            for row, scores in zip(body.rows, reply.answers, strict=True)
        ]
        return _json(bodies.ClassifyReply(version=reply.version, rows=rows))


def _json(reply: BaseModel) -> Response:
    """Without FastAPI's second validation of what was made here."""
    return Response(reply.model_dump_json(), media_type="application/json")


def _add_views(api: FastAPI, service: Service) -> None:
    @api.get("/v1/tasks", responses=_UNAVAILABLE)
    def tasks() -> bodies.TasksReply:
        """Every task that can be asked, and the columns that its rows must have."""
        snapshot = service.snapshot()
        found = []
        for name in snapshot.names():
            record = snapshot.record(name)
            assert record is not None
            columns = recorded_input(record.template, f"prompt '{name}'").columns
            labels = list(record.labels) if record.labels else None
            told = {"labels": labels, "metric": record.metric, "prompt_length": record.length}
            found.append(bodies.TaskTold(name=name, columns=list(columns), **told))
        return bodies.TasksReply(version=snapshot.version, tasks=found)

    @api.get("/healthz", responses={503: _FAILURES[503]})
    async def healthz() -> bodies.Health:
        """Whether rows can be answered; it does not wait for the model."""
        return bodies.Health(version=service.snapshot().version, watch_error=service.watch_error())

    @api.get("/metrics", response_class=Response, responses={401: _FAILURES[401]})
    async def metrics() -> Response:
        """Counters of this replica in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@dataclass(frozen=True)
class _BodyLimitMiddleware:
    """Refuses a body above `limit` bytes, by its Content-Length or by what arrives, and one slower than `seconds`."""

    app: ASGIApp
    limit: int
    seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        told = next((int(value) for key, value in scope.get("headers", ()) if key == b"content-length"), 0)
        arrived, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self.seconds

        async def limited() -> Message:
            nonlocal arrived, whole
            try:
                async with asyncio.timeout_at(None if whole else deadline):
                    message: Message = {} if told > self.limit else await receive()
            except TimeoutError as error:
                late = f"the body was not there after {self.seconds:g} s; send it again, in fewer rows"
                raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, late, {"Connection": "close"}) from error
            whole = not message.get("more_body", False)
            arrived += len(message.get("body", b""))
            if max(told, arrived) > self.limit:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is above {self.limit:,} bytes")
            return message

        await self.app(scope, limited, send)


@dataclass(frozen=True)
class _HeadMiddleware:
    """Answers HEAD like GET, without the body."""

    app: ASGIApp

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self.app(scope, receive, send)

        async def bodiless(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        asked = {**scope, "method": "GET"}  # a copy, for the server must know that no body comes
        try:
            await self.app(asked, receive, bodiless)
        finally:
            if "route" in asked:  # the router's finding, which is counted outside
                scope["route"] = asked["route"]


_CLIENT_LEFT = 499
"""The status that nginx logs when the client did not wait for the answer."""


@dataclass(frozen=True)
class _MetricsMiddleware:
    """Counts and times requests by route."""

    app: ASGIApp
    metrics: ServiceMetrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status, start = 500, time.perf_counter()

        async def watched(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        self.metrics.in_progress.inc()
        try:
            await self.app(scope, receive, watched)
        except asyncio.CancelledError:
            status = _CLIENT_LEFT
            raise
        finally:
            self.metrics.in_progress.dec()
            path = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - start)
