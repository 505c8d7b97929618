"""What stands before Serve's routes, in the process of its HTTP proxy, which has neither: an end and a limit of time.

Serve forgets an application's routes while its port is still open, and answers 404 then. uvicorn waits for ever
for the rest of a request's head. Knows nothing of Ray, which finds `in_proxy` by name (`environment`). It is not in
`serving`: a proxy that had to wait for torch would be taken for one that hangs.
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
    """What the proxy's process needs; who knows the token may end the service."""
    place = f"{__name__}.{in_proxy.__name__}"
    return {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": place, _TOKEN: token, _SECONDS: str(request_s)}


def end(host: str, port: int, token: str, patience: float) -> None:
    """Have new requests refused from now on, and wait until those that are here are answered, `patience` at most."""
    near = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{near}]' if ':' in near else near}:{port}{_path(token)}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError):  # a proxy that is gone refuses everybody
        opener.open(urllib.request.Request(url, method="POST"), timeout=max(patience, 1)).close()


def in_proxy() -> list[Middleware]:
    """Called by Serve in its proxy, before that listens."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{TimelyProtocol.__name__}"  # Serve gives it no other
    return [Middleware(Front, token=os.environ[_TOKEN])]


class Front:
    """Passes requests on until it is told to end; then new ones are told to come back."""

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


class TimelyProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """uvicorn's own, which also closes a connection whose request has not a whole head in time."""

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
            self._late = self.loop.call_later(float(os.environ[_SECONDS]), self._close)

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
