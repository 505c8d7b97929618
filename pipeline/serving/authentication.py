"""Who may ask a service: callers with a bearer token, which a file or the environment names.

A token is read where it is checked. It is never in the settings, which Ray stores and sends about.
"""

import hashlib
import hmac
import ipaddress
import logging
import os
import re
import socket
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TypeAlias

from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Receive, Scope, Send

from pipeline.errors import SettingsError
from pipeline.serving.failures import error_reply
from pipeline.serving.service_settings import ServiceSettings

_log = logging.getLogger("ray.serve")
_VARIABLE = "PROMPT_BANK_TOKEN"
_OPEN = "/healthz"
_TOKEN = re.compile(r"[\x21-\x7e]+")
_FORM = "is empty, or has a space or a sign that no header can carry"
_LARGEST_FILE = 2**20
_FileState: TypeAlias = tuple[int, ...]
"""What changes with a file's content; empty for a file that is not there."""


class Tokens:
    """The tokens that are let in. Those of a file are read again when it changes."""

    def __init__(self, tokens: Sequence[bytes] = (), path: Path | None = None) -> None:
        """Raises: SettingsError when the file has no tokens, or something else in it."""
        self._path = path
        self._state: _FileState = ()
        self._digests = _digests(tokens)
        if path is not None:
            tokens, self._state = _read(path)
            self._digests = _digests(tokens)

    def accept(self, offered: bytes) -> bool:
        """Whether this is one of the tokens. How long that takes tells nothing about them."""
        self._follow()
        (digest,) = _digests([offered])
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0

    def _follow(self) -> None:
        if self._path is None or (state := _state(self._path)) == self._state:
            return
        self._state = state
        try:
            tokens, self._state = _read(self._path)
        except SettingsError as error:  # half written, perhaps
            _log.warning("the tokens that were read before stay in force: %s", error)
        else:
            self._digests = _digests(tokens)
            _log.info("the tokens were read again, for their file has changed")


def open_tokens(settings: ServiceSettings, environment: Mapping[str, str] = os.environ) -> Tokens | None:
    """The tokens of `token_file`, else that of PROMPT_BANK_TOKEN; None where there is neither, or no authentication.

    Raises: SettingsError that names the file and its line, and never the token.
    """
    if settings.token_file is not None:
        return Tokens(path=Path(settings.token_file))
    if settings.no_authentication or _VARIABLE not in environment:
        return None
    token = environment[_VARIABLE].strip()
    if not _TOKEN.fullmatch(token):
        raise SettingsError(f"{_VARIABLE} {_FORM}: set it to a token, or unset it")
    return Tokens([token.encode()])


def require_tokens(settings: ServiceSettings) -> Tokens | None:
    """As `open_tokens`, for a process that does not know who reaches it: None only with `no_authentication`.

    Raises: as `open_tokens`, and SettingsError without a token.
    """
    tokens = open_tokens(settings)
    if tokens is None and not settings.no_authentication:
        raise SettingsError(
            f"the service has no token to ask callers for: set {_VARIABLE} in the environment of every process of the "
            "service (of every node of a cluster), name a token_file, or set no_authentication"
        )
    return tokens


def settle_authentication(settings: ServiceSettings, host: str) -> ServiceSettings:
    """The settings of a service that listens at `host` and has this process' environment.

    Without a token it needs none on a loopback address. Raises: SettingsError on any other address, and as
    `open_tokens`.
    """
    if settings.no_authentication or open_tokens(settings) is not None:
        return settings
    if not _is_loopback(host):
        raise SettingsError(
            f"whoever reaches {host} could ask the service: set {_VARIABLE} or --token-file, listen on 127.0.0.1, or "
            "say --no-authentication where something in front of it asks for a password"
        )
    return settings.model_copy(update={"no_authentication": True})


@dataclass(frozen=True)
class AuthenticationMiddleware:
    """Answers 401 to a request without a token of the service, before its body is read."""

    app: ASGIApp
    tokens: Tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _path(scope) == _OPEN:
            return await self.app(scope, receive, send)
        offered = [value for name, value in scope["headers"] if name == b"authorization"]
        kind, _, token = offered[0].partition(b" ") if len(offered) == 1 else (b"", b"", b"")
        if kind.lower() == b"bearer" and self.tokens.accept(token.strip(b" ")):
            return await self.app(scope, receive, send)
        known = "Bearer" if not offered else 'Bearer error="invalid_token"'
        told = (
            "the token is not one of this service's"
            if offered
            else "send one of this service's tokens in the header 'Authorization: Bearer TOKEN'"
        )
        error = HTTPException(HTTPStatus.UNAUTHORIZED, told, {"WWW-Authenticate": known})
        await (await error_reply(HttpRequest(scope), error))(scope, receive, send)


def _digests(tokens: Sequence[bytes]) -> list[bytes]:
    """Of one length, so that comparing them takes one time."""
    return [hashlib.sha256(token).digest() for token in tokens]


def _read(path: Path) -> tuple[list[bytes], _FileState]:
    """A file's tokens, one a line, and its state; empty lines and such as begin with # are passed over."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise SettingsError(f"token_file {path} is no plain file: name one")
        with path.open("rb") as file:
            state = _file_state(os.fstat(file.fileno()))
            data = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise SettingsError(f"token_file {path} cannot be read ({error.strerror}): make it readable") from error
    if len(data) > _LARGEST_FILE:
        raise SettingsError(f"token_file {path} is larger than {_LARGEST_FILE:,} bytes: write one token a line")
    tokens = []
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        token = line.strip()
        if not token or token.startswith("#"):
            continue
        if not _TOKEN.fullmatch(token):
            raise SettingsError(f"token_file {path}, line {number}, {_FORM}: write one token a line")
        tokens.append(token.encode())
    if not tokens:
        raise SettingsError(f"token_file {path} has no token: write one a line")
    return tokens, state


def _state(path: Path) -> _FileState:
    try:
        return _file_state(path.stat())
    except OSError:
        return ()


def _file_state(found: os.stat_result) -> _FileState:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _path(scope: Scope) -> str:
    return str(scope["path"]).removeprefix(str(scope.get("root_path", "")))


def _is_loopback(host: str) -> bool:
    """Whether a socket that listens at `host` is reached from this machine alone."""
    try:
        found = socket.getaddrinfo(host or None, None, flags=socket.AI_PASSIVE)
        return all(ipaddress.ip_address(str(each[4][0]).partition("%")[0]).is_loopback for each in found)
    except (OSError, ValueError):
        return False
