"""Who is let in while the bank's store is slow: the routes on a real loop and model, and no Ray."""

import asyncio
import threading

import httpx
import pytest

from pipeline.bank import PromptBank
from pipeline.serving import PromptedModel, load_backbone
from pipeline.serving.api import make_api
from tests.serving.local_service import LocalService
from tests.serving.prompts import new_prompt
from tests.tiny import make_model

MOST = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answering")
    backbone = load_backbone(str(make_model(folder / "model", "llama", seed=1, scale=2.0)))
    bank = PromptBank.open(folder / "bank", create=True)
    bank.publish([new_prompt("film", 3)], backbone.identity, "test", {}, "latest")
    bank.promote(1, "prod", "test")
    made = PromptedModel(backbone, PromptBank.open(folder / "bank"))
    made.classify(["good"], ["film"])  # so that the prompt is in memory
    return made


@pytest.fixture
def stuck(model, monkeypatch):
    """An event that the bank's store waits for when it is asked for an alias, and how often it was asked."""
    released, asked, at = threading.Event(), [], model.bank.at

    def slow(revision):
        if revision == "prod":
            asked.append(revision)
            assert released.wait(60)
        return at(revision)

    monkeypatch.setattr(model.bank, "at", slow)
    return released, asked


def _body(path, task):
    if path.startswith("/v1/completions"):
        return {"model": task, "prompt": "good film", "max_tokens": 3, "stream": path.endswith("stream")}
    if path == "/v1/chat/completions":
        return {"model": task, "messages": [{"role": "user", "content": "good film"}], "max_tokens": 3}
    return {"rows": [{"task": task, "text": "good film"}]}


@pytest.mark.parametrize(
    "path",
    ["/v1/completions", "/v1/completions?stream", "/v1/chat/completions", "/v1/generate", "/v1/classify", "/v1/models"],
)
def test_no_more_requests_wait_for_a_slow_store_than_for_the_model(model, stuck, path):
    released, asked = stuck

    async def ask_many():
        transport = httpx.ASGITransport(make_api(LocalService(model, max_waiting=MOST)))
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=60) as client:

            async def ask():
                if path == "/v1/models":
                    return (await client.get("/v1/models/film@prod")).status_code
                return (await client.post(path, json=_body(path, "film@prod"))).status_code

            asking = [asyncio.create_task(ask()) for _ in range(20)]
            while sum(task.done() for task in asking) < 20 - MOST:
                await asyncio.sleep(0.01)
            refused = [task.result() for task in asking if task.done()]
            released.set()
            return refused, sorted(await asyncio.gather(*asking))

    refused, statuses = asyncio.run(ask_many())
    assert refused == [503] * (20 - MOST) and statuses == [200] * MOST + [503] * (20 - MOST)
    assert asked == ["prod"] * MOST


def test_a_task_in_memory_is_answered_while_as_many_as_there_are_threads_wait_for_the_store(model, stuck):
    released, asked = stuck

    async def ask_both():
        transport = httpx.ASGITransport(make_api(LocalService(model, max_waiting=1000)))
        async with httpx.AsyncClient(transport=transport, base_url="http://service", timeout=60) as client:
            path = "/v1/completions"
            behind = [asyncio.create_task(client.post(path, json=_body(path, "film@prod"))) for _ in range(60)]
            while not asked:
                await asyncio.sleep(0.01)
            first = await client.post(path, json=_body(path, "film"))
            waited = not any(task.done() for task in behind)
            released.set()
            return first.status_code, waited, {reply.status_code for reply in await asyncio.gather(*behind)}

    assert asyncio.run(ask_both()) == (200, True, {200})
