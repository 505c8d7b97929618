"""A service under load while a new version is published every second: PROMPT_BANK_SOAK_SECONDS (60) long."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from pipeline.bank import PromptBank
from pipeline.serving import PromptedModel, load_backbone
from tests.serving.prompts import LABELS, new_prompt
from tests.tiny import make_model

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SECONDS = float(os.environ.get("PROMPT_BANK_SOAK_SECONDS", "60"))
ALLOWED_GROWTH = 64 * 2**20
QUESTIONS = [
    ("classify", ["film", "colour", "film"], ["good film", "the red story", "bad food with music"]),
    ("generate", ["open", "film", "open"], ["good film", "one", "bad food with music"]),
]


@pytest.fixture(scope="module", params=["two replicas", "without Ray"])
def replicas(request):
    return 2 if request.param == "two replicas" else 1


@pytest.fixture(scope="module")
def direct(replicas, tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    backbone = load_backbone(str(make_model(folder / "model", "llama", seed=1, scale=2.0)))
    PromptBank.open(folder / "bank", create=True).publish(_version(1), backbone.identity, "test", {}, "latest")
    return PromptedModel(backbone, PromptBank.open(folder / "bank"))


@pytest.fixture(scope="module")
def service(replicas, direct, tmp_path_factory):
    """The process of a service, and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bank, log = Path(direct.bank.uri), tmp_path_factory.mktemp("log") / "service.log"
    command = [
        sys.executable, str(ROOT / "jobs/serve_prompts.py"), "--bank", str(bank), "--model", str(bank.parent / "model"),
        "--port", str(port), "--replicas", str(replicas), "--watch-every", "0.3",
        "--set", f"ray={str(replicas > 1).lower()}",
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    deadline = time.monotonic() + 240
    try:
        while "Serving version 1" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield process, f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(120)


def _version(number):
    return [new_prompt(name, 3 + i, seed=number) for i, name in enumerate(LABELS)]


def _ask(url, until, first, replies):
    with httpx.Client(base_url=url, timeout=120) as client:
        for number in range(first, 10**9):
            question = number % len(QUESTIONS)
            kind, tasks, texts = QUESTIONS[question]
            body = {"rows": [{"task": task, "text": text} for task, text in zip(tasks, texts, strict=True)]}
            try:
                reply = client.post(f"/v1/{kind}", json=body | ({"max_new_tokens": 4} if kind == "generate" else {}))
                replies.append((question, reply.status_code, reply.json()))
            except (httpx.HTTPError, ValueError) as error:
                replies.append((question, 0, repr(error)))
            if time.monotonic() > until:
                return


def _replica_bytes(process, replicas):
    """Resident memory of each replica."""
    if replicas == 1:
        return [process.memory_info().rss]
    found = []
    for child in process.children(recursive=True):
        try:
            if "PromptService" in " ".join(child.cmdline()) or "ServeReplica" in child.name():
                found.append(child.memory_info().rss)
        except psutil.NoSuchProcess:
            continue
    return found


def _watch(process, url, replicas, until, memory, names):
    with httpx.Client(base_url=url, timeout=120) as client:
        while time.monotonic() < until:
            memory.append(sum(_replica_bytes(process, replicas)))
            names |= set(re.findall(r'promptbank_bank_version{replica="([^"]+)"}', client.get("/metrics").text))
            time.sleep(1)


def _publish_every_second(direct, until):
    """-> the last version. What a publication takes is no part of the second."""
    version, due = 1, time.monotonic()
    while time.monotonic() < until:
        version += 1
        assert direct.bank.publish(_version(version), direct.backbone.identity, "test", {}, "latest") == version
        due += 1
        time.sleep(max(0.0, due - time.monotonic()))
    return version


def test_swaps_under_load_fail_no_request_mix_no_versions_and_leave_memory_flat(service, direct, replicas):
    process, url = psutil.Process(service[0].pid), service[1]
    replies, memory, names = [], [], set()
    until = time.monotonic() + SECONDS
    threads = [threading.Thread(target=_ask, args=(url, until, first, replies)) for first in range(4)]
    threads.append(threading.Thread(target=_watch, args=(process, url, replicas, until, memory, names)))
    for thread in threads:
        thread.start()
    version = _publish_every_second(direct, until)
    for thread in threads:
        thread.join()

    assert [reply for reply in replies if reply[1] != 200] == []
    assert len(_replica_bytes(process, replicas)) == len(names) == replicas
    seen = {reply["version"] for _, _, reply in replies}
    assert len(seen) > 5 and max(seen) > version / 2
    expected = {}
    for question, _, reply in replies:
        kind, tasks, texts = QUESTIONS[question]
        if (question, reply["version"]) not in expected:
            named = [f"{task}@{reply['version']}" for task in tasks]
            asked = direct.generate(texts, named, 4) if kind == "generate" else direct.classify(texts, named)
            expected[question, reply["version"]] = asked
        for row, answer in zip(reply["rows"], expected[question, reply["version"]], strict=True):
            assert row.get("text") == answer or row.get("log_likelihoods") == pytest.approx(answer, rel=1e-4)
    third = len(memory) // 3
    assert max(memory[-third:]) - max(memory[:third]) <= ALLOWED_GROWTH, memory
    print(f"{len(replies)} requests, {version} versions, {len(seen)} seen, MiB {[m >> 20 for m in memory[::third]]}")
