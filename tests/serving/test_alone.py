"""A service in this process, without Ray."""

import os
import socket
import threading
import time

import httpx
import pytest
import torch

from pipeline.bank import PromptBank
from pipeline.serving import alone, load_backbone
from pipeline.serving.service_settings import ServiceSettings
from tests.ray_cluster import free_port
from tests.serving.prompts import new_prompt
from tests.tiny import make_model


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Settings of a service of a tiny model and a bank with one task, which answers any text."""
    folder = tmp_path_factory.mktemp("served")
    model = str(make_model(folder / "model", "llama", seed=1, scale=2.0))
    bank = PromptBank.open(folder / "bank", create=True)
    bank.publish([new_prompt("open", 3)], load_backbone(model).identity, "test", {}, "latest")
    return ServiceSettings(bank=bank.uri, model=model, ray=False, request_s=0.5, max_waiting=1)


@pytest.fixture
def port():
    return free_port()


def test_it_leaves_the_process_as_it_was(served, port):
    def state():
        return dict(os.environ), torch.get_num_threads(), set(threading.enumerate())

    before = state()
    with alone.serving_alone(served, "127.0.0.1", port):
        assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    assert state() == before
    socket.create_server(("127.0.0.1", port)).close()


def test_a_caller_who_reads_nothing_of_a_stream_keeps_no_one_out_for_long(served, port, monkeypatch):
    listen = socket.create_server

    def listen_with_little_memory(*args, **options):
        listening = listen(*args, **options)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # of every connection
        return listening

    monkeypatch.setattr(alone.socket, "create_server", listen_with_little_memory)
    asked = {"model": "open", "prompt": ["good film"] * 64, "max_tokens": 64, "stream": True}
    request = httpx.Request("POST", f"http://127.0.0.1:{port}/v1/completions", json=asked)
    head = [b"POST /v1/completions HTTP/1.1", *(name + b": " + value for name, value in request.headers.raw), b"", b""]
    with alone.serving_alone(served, "127.0.0.1", port), socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(b"\r\n".join(head) + request.content)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        statuses = [_status(port)]
        deadline = time.monotonic() + 30
        while statuses[-1] != 200:
            assert time.monotonic() < deadline, "waited in vain"
            time.sleep(0.05)
            statuses.append(_status(port))
    assert statuses[0] == 503


def _status(port):
    asked = {"model": "open", "prompt": "good film", "max_tokens": 1}
    return httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=asked).status_code
