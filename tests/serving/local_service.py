"""A service in this process, behind a real socket: the routes as they are, and no Ray."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from pipeline.serving import PromptedModel
from pipeline.serving.answering import Answering
from pipeline.serving.api import make_api
from pipeline.serving.authentication import Tokens
from pipeline.serving.service_metrics import ServiceMetrics
from pipeline.serving.service_settings import ServiceSettings


class LocalService(Answering):
    def __init__(self, model: PromptedModel, **settings):
        super().__init__(ServiceSettings(bank="bank", model="model", **settings), model, ServiceMetrics("local"))

    def snapshot(self):
        return self.model.bank.current

    def watch_error(self):
        return None


@contextmanager
def listening(service: LocalService, tokens: Tokens | None = None) -> Iterator[str]:
    """The address of the service, which listens until the block ends."""
    server = uvicorn.Server(uvicorn.Config(make_api(service, tokens), port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
