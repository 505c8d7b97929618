"""A service of one replica in this process, without Ray: a request costs a fraction of what it costs behind Serve."""

import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import uvicorn

from pipeline import proxy
from pipeline.errors import SettingsError
from pipeline.serving.authentication import settle_authentication
from pipeline.serving.replica import Replica
from pipeline.serving.service_settings import ServiceSettings

_KEEP_ALIVE_S = 90
"""As behind Serve: a connection that is closed sooner meets clients' next requests half way."""


@contextmanager
def serving_alone(settings: ServiceSettings, host: str, port: int) -> Iterator[None]:
    """Answer at `http://host:port`; when the block ends, finish the requests that are here and stop.

    Raises: SettingsError when the port is taken, or callers beyond this machine would need no token; PromptBankError
    with the reason why there is nothing to serve.
    """
    settings = settle_authentication(settings, host)
    try:
        listening = socket.create_server((host, port), backlog=2048)
    except OSError as error:
        raise SettingsError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    with listening:
        torch.set_num_threads(max(1, math.floor(settings.cpus_per_replica)))
        replica, token = Replica(settings, "alone"), secrets.token_urlsafe()
        os.environ.update(proxy.environment(token, settings.request_s))  # which the two below read
        server = uvicorn.Server(
            uvicorn.Config(
                proxy.DrainMiddleware(replica.api(), token),
                http=proxy.HeadTimeoutProtocol,
                lifespan="off",
                log_level="warning",
                access_log=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,  # by then all is answered, or has had its time
            )
        )
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
