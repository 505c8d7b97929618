"""What a caller is told when the service itself is in trouble; the routes without Ray. See also test_app.py."""

import asyncio
import json
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from fastapi.testclient import TestClient

from pipeline.errors import BankError, OverloadedError
from pipeline.serving.api import make_api
from pipeline.serving.prompted_model import Completion
from pipeline.serving.service import VersionedAnswers
from pipeline.serving.service_metrics import ServiceMetrics
from pipeline.serving.service_settings import ServiceSettings

BODY = {"rows": [{"task": "film", "text": "good"}]}


class InTrouble:
    """A service that fails as it is told to."""

    def __init__(self, error=None):
        self.settings = ServiceSettings(bank="bank", model="model")
        self.metrics = ServiceMetrics("r1")
        self.tasks = SimpleNamespace(bank=SimpleNamespace(uri="some/bank"))
        self.error = error

    def snapshot(self):
        raise self.error

    def watch_error(self):
        return None

    def admitted(self):
        return nullcontext()

    async def complete(self, request):
        if self.error:
            raise self.error
        return VersionedAnswers(3, [Completion(" fine", 7, 2, True)] * len(request.tasks))


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        (OverloadedError("7 requests wait"), 503, "7 requests wait"),
        (BankError("blobs/x is damaged"), 503, "blobs/x is damaged"),
        (ZeroDivisionError("division by zero"), 500, "the service failed on this request; its log tells why"),
    ],
)
def test_trouble_is_one_sentence_and_is_counted(error, status, sentence):
    service = InTrouble(error)
    client = TestClient(make_api(service), raise_server_exceptions=False)
    reply = client.post("/v1/generate", json=BODY)
    assert reply.status_code == status and reply.json() == {"error": sentence}
    assert ("retry-after" in reply.headers) == isinstance(error, OverloadedError)
    counted = f'promptbank_requests_total{{replica="r1",route="/v1/generate",status="{status}"}} 1.0'
    assert counted in client.get("/metrics").text


def test_a_replica_that_cannot_serve_is_not_healthy():
    reply = TestClient(make_api(InTrouble(BankError("version 2 belongs to another model")))).get("/healthz")
    assert reply.status_code == 503 and reply.json() == {"error": "version 2 belongs to another model"}


def test_a_reply_names_the_version_that_answered():
    reply = TestClient(make_api(InTrouble())).post("/v1/generate", json=BODY)
    assert reply.json() == {"version": 3, "rows": [{"task": "film", "text": "fine"}]}


@pytest.mark.processes
def test_a_program_that_serves_itself_needs_no_ray():
    code = "import sys, pipeline.serving; sys.exit('ray' in sys.modules or 'fastapi' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_client_that_leaves_is_not_counted_as_a_failure_of_the_service():
    service = InTrouble(asyncio.CancelledError())
    scope = {"type": "http", "method": "POST", "path": "/v1/generate", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]
    body = json.dumps({"rows": [{"task": "film", "text": "good"}]}).encode()

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        raise AssertionError("nobody is there to be answered")

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(make_api(service)(scope, receive, send))
    told = service.metrics.text().decode()
    assert 'status="499"' in told and 'status="500"' not in told


def test_a_body_that_does_not_come_ends():
    service = InTrouble()
    service.settings = ServiceSettings(bank="bank", model="model", request_s=0.2)
    scope = {"type": "http", "method": "POST", "path": "/v1/generate", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]
    told = []

    async def receive():
        if told:
            await asyncio.sleep(60)
        told.append("half a body")
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message):
        told.append(message)

    asyncio.run(asyncio.wait_for(make_api(service)(scope, receive, send), 30))
    assert told[1]["status"] == 408 and (b"connection", b"close") in told[1]["headers"]
    assert b"was not there after 0.2 s" in told[2]["body"]


def test_head_is_answered_as_get_without_a_body():
    client = TestClient(make_api(InTrouble()))
    asked, got = client.head("/metrics"), client.get("/metrics")
    assert asked.status_code == got.status_code == 200 and asked.content == b"" and got.content
    assert 'route="/metrics",status="200"' in got.text
    assert client.head("/v1/generate").status_code == 405
