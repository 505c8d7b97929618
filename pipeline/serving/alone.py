"""A service of one replica in this process, without Ray: a request costs a fraction of what it costs behind Serve."""

import asyncio
import logging
import math
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline import proxy
from pipeline.errors import SettingsError
from pipeline.serving.authentication import settle_authentication
from pipeline.serving.replica import Replica
from pipeline.serving.service_settings import ServiceSettings

_log = logging.getLogger(__name__)
_KEEP_ALIVE_S = 90
"""As behind Serve: a connection that is closed sooner meets clients' next requests half way."""


@contextmanager
def serving_alone(settings: ServiceSettings, host: str, port: int) -> Iterator[None]:
    """Answer at `http://host:port`; when the block ends, finish the requests that are here and stop.

    Sets torch's threads until then. Raises: SettingsError when the port is taken, or callers beyond this machine would
    need no token; PromptBankError with the reason why there is nothing to serve.
    """
    settings = settle_authentication(settings, host)
    with ExitStack() as afterwards:
        try:
            listening = afterwards.enter_context(socket.create_server((host, port), backlog=2048))
        except OSError as error:
            raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
        afterwards.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(max(1, math.floor(settings.cpus_per_replica)))
        replica, token = Replica(settings, "alone"), secrets.token_urlsafe()
        afterwards.callback(replica.close)
        server = _server(replica, token)
        thread = threading.Thread(target=server.run, args=([listening],), name="http")
        thread.start()
        try:
            while not server.started:
                if not thread.is_alive():
                    raise SettingsError(f"the HTTP server on {host}:{port} ended before it listened; its log tells why")
                time.sleep(0.01)
            yield
        finally:
            if thread.is_alive():
                proxy.drain(host, port, token, settings.shutdown_s)
            server.should_exit = True
            thread.join()


def _server(replica: Replica, token: str) -> uvicorn.Server:
    class Protocol(proxy.HeadTimeoutProtocol):
        seconds = replica.settings.request_s

    app = proxy.DrainMiddleware(_PatienceMiddleware(replica.api(), replica.settings.request_s), token)
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Protocol,
            lifespan="off",
            log_level="warning",
            access_log=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,  # by then all is answered, or has had its time
        )
    )


@dataclass(frozen=True)
class _PatienceMiddleware:
    """Ends the work on a request whose client has left, or takes nothing of its answer for `seconds`.

    Serve's proxy does so too; uvicorn runs the application to its end, which would keep the model from others.
    """

    app: ASGIApp
    seconds: float

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        left: asyncio.Task[Message] | None = None
        whole = False

        async def received() -> Message:
            nonlocal left
            if left is not None:
                return await asyncio.shield(left)
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False):
                left = asyncio.ensure_future(receive())  # the next message is that the client has left
                left.add_done_callback(lambda _: None if whole else answer.cancel())
            return message

        async def sent(message: Message) -> None:
            nonlocal whole
            whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            try:
                async with asyncio.timeout(self.seconds):
                    await send(message)
            except TimeoutError:
                _log.warning("a client took nothing of its answer for %g s, which ends here", self.seconds)
                answer.cancel()

        answer = asyncio.ensure_future(self.app(scope, received, sent))
        try:
            await answer
        except asyncio.CancelledError:
            if (task := asyncio.current_task()) is None or task.cancelling():
                raise  # not on account of the client
        finally:
            answer.cancel()
            if left is not None:
                left.cancel()
