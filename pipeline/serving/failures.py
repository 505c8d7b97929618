"""What a caller is told when a request fails: a status and one sentence, in the form that its route speaks."""

from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest

from pipeline.bank import PromptBank
from pipeline.errors import (
    CorpusError,
    NoLabelsError,
    OverloadedError,
    PromptBankError,
    RowTooLongError,
    UnknownTaskError,
)
from pipeline.serving.bank_tasks import Refusal, public_sentence, refusal

_OPENAI = ("/v1/completions", "/v1/chat/completions", "/v1/models")
"""Routes that fail as OpenAI's do."""
_STATUS: dict[type[Exception], HTTPStatus] = {
    UnknownTaskError: HTTPStatus.NOT_FOUND,
    RowTooLongError: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    NoLabelsError: HTTPStatus.UNPROCESSABLE_ENTITY,
    CorpusError: HTTPStatus.UNPROCESSABLE_ENTITY,
    PromptBankError: HTTPStatus.SERVICE_UNAVAILABLE,
}
_UNKNOWN = Refusal("the service failed on this request; its log tells why", HTTPStatus.INTERNAL_SERVER_ERROR)


async def error_reply(request: HttpRequest, error: Exception) -> JSONResponse:
    """Answer every failure with one sentence and never a traceback."""
    # A route may stand below a prefix, which Serve takes from the path.
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    if path in _OPENAI or path.startswith("/v1/models/"):
        body, status = openai_failure(error, _told(request, error))
        return JSONResponse(body, status, headers=_headers(error))
    told = _told(request, error)
    return JSONResponse({"error": told.message}, told.status, headers=_headers(error))


def public_error(error: Exception, bank: PromptBank) -> Exception:
    """The error without the bank's address, which is not for callers."""
    return type(error)(public_sentence(error, bank)) if isinstance(error, PromptBankError) else error


def openai_failure(error: Exception, otherwise: Refusal = _UNKNOWN) -> tuple[dict[str, Any], HTTPStatus]:
    """A reply's body, or a stream's event, and its status; what is no PromptBankError is told `otherwise`."""
    told = refusal(error) if isinstance(error, PromptBankError) else otherwise
    status = HTTPStatus.BAD_REQUEST if isinstance(error, RequestValidationError) else told.status
    fields = {"message": told.message, "type": Refusal("", status).kind, "param": told.param, "code": int(status)}
    return {"error": fields}, status


def _told(request: HttpRequest, error: Exception) -> Refusal:
    match error:
        case PromptBankError():
            return Refusal(str(error), next(status for kind, status in _STATUS.items() if isinstance(error, kind)))
        case RequestValidationError():
            return _first_mistake(error)
        case HTTPException():
            sentence = f"{request.method} {request.url.path}: {error.detail}"
            return Refusal(sentence, HTTPStatus(error.status_code))
        case _:
            return _UNKNOWN


def _headers(error: Exception) -> dict[str, str]:
    if isinstance(error, OverloadedError):
        return {"Retry-After": "1"}
    return dict(error.headers or {}) if isinstance(error, HTTPException) else {}


def _first_mistake(error: RequestValidationError) -> Refusal:
    first: Mapping[str, Any] = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refusal(f"the body is not JSON ({first['ctx']['error']})", HTTPStatus.UNPROCESSABLE_ENTITY)
    where = ".".join(map(str, first["loc"]))
    message = first["msg"].removeprefix("Value error, ")
    setting = next(map(str, first["loc"][1:]), None)  # behind "body"
    return Refusal(f"{where}: {message[:1].lower()}{message[1:]}", HTTPStatus.UNPROCESSABLE_ENTITY, setting)
