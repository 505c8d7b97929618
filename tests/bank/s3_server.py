"""An S3 server of our own for tests: moto's, in a process of its own.

What it cannot show: real S3's concurrency (requests are served one at a time, see `_one_at_a_time`; it never
answers "409, conflict"), its latency and its failures, credentials and permissions (any are accepted, and
signatures are not checked), TLS, regions, and what the stores that only speak S3's protocol do otherwise.
"""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from threading import Lock, Thread
from typing import Any

import pytest

_BUCKET = "prompts"


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    _numbers: Iterator[int] = field(default_factory=count)

    @property
    def environment(self) -> Mapping[str, str]:
        """What a process needs in its environment to reach the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "NO_PROXY": "127.0.0.1",
        }

    def new_uri(self) -> str:
        """An address where nothing lies yet."""
        return f"s3://{_BUCKET}/bank-{next(self._numbers)}"

    def put(self, uri: str, data: bytes = b"") -> None:
        """Write an object past the code under test."""
        url = f"{self.endpoint}/{uri.removeprefix('s3://')}"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        # urllib's own type is a form's, and moto waits for ever for the rest of a form.
        headers = {"Content-Type": "application/octet-stream"}
        opener.open(urllib.request.Request(url, data, headers, method="PUT"), timeout=30).close()


@contextmanager
def serve_s3() -> Iterator[S3Server]:
    """Start the server on a free port, with a bucket; stop it at the end."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # moto looks into botocore, which would read this user's own settings.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)
    try:
        port = process.stdout.readline().strip()
        assert port, f"moto's server did not start (exit code {process.wait()}): install the extra 'dev'"
        server = S3Server(f"http://127.0.0.1:{port}")
        server.put(f"s3://{_BUCKET}")
        yield server
    finally:
        process.terminate()
        process.communicate(timeout=10)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with serve_s3() as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The server, and an environment that leads to it and to nothing else."""
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


def _one_at_a_time(application: Callable[..., Iterable[bytes]]) -> Callable[..., list[bytes]]:
    """moto checks `If-None-Match` and writes afterwards: of two puts at once, both may win. The lock prevents that."""
    lock = Lock()

    def locked(*args: Any) -> list[bytes]:
        with lock:
            return list(application(*args))

    return locked


def _serve() -> None:
    import logging

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application = _one_at_a_time(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=MotoRequestHandler)
    print(server.port, flush=True)
    Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()  # until the tests are gone, however they went


if __name__ == "__main__":
    _serve()
