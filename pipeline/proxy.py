"""Draining and a request timeout for Ray Serve's HTTP proxy, which has neither.

Without draining, Serve forgets an application's routes while its port is still open, and answers 404. Without the
timeout, uvicorn waits for ever for the rest of a request's head. This module runs in the proxy's process and imports
no Ray: Serve finds `proxy_middleware` by its name (see `environment`). It is not in `serving`, because a proxy that
had to import torch would be taken for one that hangs.
"""

import asyncio
import os
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import uvicorn.config
from starlette.middleware import Middleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

_TOKEN, _SECONDS = "PROMPTBANK_PROXY_TOKEN", "PROMPTBANK_REQUEST_S"
_TOO_LATE = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


def environment(token: str, request_s: float) -> Mapping[str, str]:
    """Environment variables for the proxy's process. Whoever knows the token may drain the service."""
    place = f"{__name__}.{proxy_middleware.__name__}"
    return {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": place, _TOKEN: token, _SECONDS: str(request_s)}


def drain(host: str, port: int, token: str, patience: float) -> None:
    """Refuse new requests from now on, and wait at most `patience` seconds until those under way are answered."""
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{near}]' if ':' in near else near}:{port}{_path(token)}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError):  # a proxy that is gone refuses everybody
        opener.open(urllib.request.Request(url, method="POST"), timeout=max(patience, 1)).close()


def proxy_middleware() -> list[Middleware]:
    """The middleware that Serve asks for in its proxy before the proxy listens."""
    HeadTimeoutProtocol.seconds = float(os.environ[_SECONDS])
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{HeadTimeoutProtocol.__name__}"  # Serve gives it no other
    return [Middleware(DrainMiddleware, token=os.environ[_TOKEN])]


class DrainMiddleware:
    """Passes requests on until it is told to drain; then it answers new ones with 503 and Retry-After."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._end = _path(token)
        self._ending = False
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == self._end:
            self._ending = True
            await self._idle.wait()
            return await Response()(scope, receive, send)
        if scope["type"] == "http" and self._ending:
            told = {"error": "the service is ending; ask again in a moment, or ask another one"}
            return await JSONResponse(told, 503, {"Retry-After": "1", "Connection": "close"})(scope, receive, send)
        self._running += 1
        self._idle.clear()
        try:
            await self._app(scope, receive, send)
        finally:
            self._running -= 1
            if not self._running:
                self._idle.set()


class HeadTimeoutProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's own protocol, which also closes a connection whose request head does not arrive in `seconds`."""

    seconds: float

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel()  # there is a whole head
        else:
            self._expect_head()

    def connection_lost(self, error: Exception | None) -> None:
        self._cancel()
        super().connection_lost(error)

    def _expect_head(self) -> None:
        if self._late is None and not self.transport.is_closing():
            self._late = self.loop.call_later(self.seconds, self._close)

    def _cancel(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_TOO_LATE)
            self.transport.close()


def _path(token: str) -> str:
    return f"/-/end/{token}"
