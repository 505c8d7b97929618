"""What stands before Serve's routes, before a real uvicorn without Serve; with it, see serving/test_app.py."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from pipeline import proxy


@pytest.fixture
def gate() -> threading.Event:
    """Holds answers of /slow back until it is set."""
    return threading.Event()


@pytest.fixture
def arrived() -> threading.Semaphore:
    """Counts requests that /slow has."""
    return threading.Semaphore(0)


@pytest.fixture
def port(gate: threading.Event, arrived: threading.Semaphore, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of a server as Serve starts its own."""

    async def slow(request: Request) -> PlainTextResponse:
        arrived.release()
        await asyncio.to_thread(gate.wait, 30)
        return PlainTextResponse("answered")

    async def quick(request: Request) -> PlainTextResponse:
        return PlainTextResponse("quick")

    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    for name, value in proxy.environment("secret", 0.5).items():
        monkeypatch.setenv(name, value)
    app = Starlette(routes=[Route("/slow", slow), Route("/", quick)], middleware=proxy.proxy_middleware())
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level=None, log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        yield listening.getsockname()[1]
        gate.set()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def start(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def test_told_to_end_it_answers_who_is_there_and_tells_others_to_come_back(port, gate, arrived):
    url, answers = f"http://127.0.0.1:{port}", []
    asking = [start(lambda: answers.append(httpx.get(f"{url}/slow", timeout=30))) for _ in range(3)]
    assert all(arrived.acquire(timeout=30) for _ in asking)
    ending = start(lambda: proxy.drain("0.0.0.0", port, "secret", 30))
    with httpx.Client(base_url=url) as client:
        while client.get("/").status_code == 200:
            pass
        for path in ("/", "/slow", "/no-route"):
            told = client.get(path)
            assert told.status_code == 503 and told.headers["retry-after"] == "1" and told.json()["error"]
    assert ending.is_alive() and not answers
    gate.set()
    for thread in (*asking, ending):
        thread.join(30)
    assert [answer.text for answer in answers] == ["answered"] * 3


def test_only_who_knows_the_token_may_end_it(port):
    proxy.drain("127.0.0.1", port, "guessed", 5)
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200


def test_a_front_that_is_gone_is_no_error():
    proxy.drain("127.0.0.1", 1, "secret", 5)


@pytest.mark.parametrize("half", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n"])
@pytest.mark.parametrize("second", [False, True])
def test_a_head_that_does_not_come_ends(port, half, second):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        if second:
            connection.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            while not connection.recv(2**16).endswith(b"quick"):
                pass
        connection.sendall(half)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert answer.startswith(b"HTTP/1.1 408") or (second and not half and not answer)  # a connection kept alive


def test_a_head_that_comes_byte_by_byte_without_end_is_not_waited_for(port):
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection, pytest.raises(OSError):
        for _ in range(600):
            connection.sendall(b"x")
            time.sleep(0.05)
    assert httpx.get(f"http://127.0.0.1:{port}/").status_code == 200


def test_an_answer_may_take_longer_than_a_head(port, gate):
    threading.Timer(1.5, gate.set).start()
    assert httpx.get(f"http://127.0.0.1:{port}/slow", timeout=30).text == "answered"
