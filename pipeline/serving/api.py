"""The HTTP side of a service: its routes, and its answers when something is wrong. Imports no Ray."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Generic, Protocol

from fastapi import FastAPI, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.bank import Snapshot
from pipeline.corpus.chat import recorded_input
from pipeline.errors import (
    CorpusError,
    NoLabelsError,
    OverloadedError,
    PromptBankError,
    RowTooLongError,
    UnknownTaskError,
)
from pipeline.serving import bodies
from pipeline.serving.prompted_model import Answer
from pipeline.serving.requests import Request
from pipeline.serving.service_metrics import ServiceMetrics
from pipeline.serving.service_settings import ServiceSettings


@dataclass(frozen=True)
class VersionedAnswers(Generic[Answer]):
    """Answers to one request, and the version of the bank that they come from."""

    version: int
    answers: Sequence[Answer]


class Service(Protocol):
    """What the routes need of a service; `app.PromptService` is one on Ray Serve."""

    settings: ServiceSettings
    metrics: ServiceMetrics

    def snapshot(self) -> Snapshot:
        """The version that is served. Raises: BankError when none can be served."""

    def watch_error(self) -> str | None:
        """Why the bank cannot be followed at present, None while it can."""

    async def generate(self, request: Request) -> VersionedAnswers[str]:
        """Text for each row. Raises: as `PromptedModel.generate`, OverloadedError."""

    async def classify(self, request: Request) -> VersionedAnswers[dict[str, float]]:
        """Each row's score of every label, in nats. Raises: as `PromptedModel.classify`, OverloadedError."""


_STATUS: dict[type[Exception], int] = {
    UnknownTaskError: 404,
    RowTooLongError: 413,
    NoLabelsError: 422,
    CorpusError: 422,
    PromptBankError: 503,
}
_FAILURES: dict[int | str, dict[str, Any]] = {
    404: {"model": bodies.Failure, "description": "No such task"},
    413: {"model": bodies.Failure, "description": "Too many rows, too long a row, or too large a body"},
    422: {"model": bodies.Failure, "description": "A malformed body, or a row that does not fit its task"},
    503: {"model": bodies.Failure, "description": "Too many requests wait, or the bank cannot be read"},
}
_UNAVAILABLE: dict[int | str, dict[str, Any]] = {503: _FAILURES[503]}


def make_api(service: Service) -> FastAPI:
    """The routes of a service."""
    api = FastAPI(title="Prompt bank", description="Many tasks, one frozen model: each row runs behind its own prompt.")
    _add_answers(api, service)
    _add_views(api, service)
    for kind in (PromptBankError, HTTPException, RequestValidationError, Exception):
        api.add_exception_handler(kind, _error_reply)
    api.add_middleware(_BodyLimitMiddleware, limit=service.settings.max_body_bytes, seconds=service.settings.request_s)
    api.add_middleware(_HeadMiddleware)
    api.add_middleware(_MetricsMiddleware, metrics=service.metrics)
    return api


def _add_answers(api: FastAPI, service: Service) -> None:
    @api.post("/v1/generate", responses=_FAILURES)
    async def generate(body: bodies.GenerateBody) -> bodies.GenerateReply:
        """Greedy answers, each behind the prompt of its row's task."""
        _check_size(body, service.settings)
        reply = await service.generate(body.request())
        rows = [bodies.Generated(task=row.task, text=text) for row, text in zip(body.rows, reply.answers, strict=True)]
        return bodies.GenerateReply(version=reply.version, rows=rows)

    @api.post("/v1/classify", responses=_FAILURES)
    async def classify(body: bodies.ClassifyBody) -> bodies.ClassifyReply:
        """The likelihood of each label of a row's task."""
        _check_size(body, service.settings)
        reply = await service.classify(body.request())
        rows = [
            bodies.Classified(task=row.task, label=max(scores, key=lambda label: scores[label]), log_likelihoods=scores)
            for row, scores in zip(body.rows, reply.answers, strict=True)
        ]
        return bodies.ClassifyReply(version=reply.version, rows=rows)


def _check_size(body: bodies.ClassifyBody, settings: ServiceSettings) -> None:
    if len(body.rows) > settings.max_rows:
        raise RowTooLongError(
            f"the request has {len(body.rows)} rows where {settings.max_rows} are allowed; send them in parts"
        )
    asked = getattr(body, "max_new_tokens", 0)
    if asked > settings.max_new_tokens:
        raise RowTooLongError(f"max_new_tokens is {asked} where {settings.max_new_tokens} are allowed; ask for fewer")


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

    @api.get("/healthz", responses=_UNAVAILABLE)
    async def healthz() -> bodies.Health:
        """Whether rows can be answered; it does not wait for the model."""
        return bodies.Health(version=service.snapshot().version, watch_error=service.watch_error())

    @api.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Counters of this replica in Prometheus' text format."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _error_reply(request: HttpRequest, error: Exception) -> JSONResponse:
    """Answer every failure with one sentence and never a traceback."""
    headers: Mapping[str, str] = {}
    match error:
        case PromptBankError():
            status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
            sentence = str(error)
            headers = {"Retry-After": "1"} if isinstance(error, OverloadedError) else {}
        case RequestValidationError():
            status, sentence = 422, _first_mistake(error)
        case HTTPException():
            status, headers = error.status_code, error.headers or {}
            sentence = f"{request.method} {request.url.path}: {error.detail}"
        case _:
            status, sentence = 500, "the service failed on this request; its log tells why"
    return JSONResponse({"error": sentence}, status, headers=dict(headers))


def _first_mistake(error: RequestValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return f"the body is not JSON ({first['ctx']['error']})"
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}"


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

        scope["method"] = "GET"  # in place, for the router reads the method from this scope
        await self.app(scope, receive, bodiless)


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
