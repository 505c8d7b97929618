"""A real service, on a Ray of its own and without Ray, as `jobs/serve_prompts.py` starts it, asked over HTTP."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from pipeline.bank import PromptBank
from pipeline.serving import PromptedModel, load_backbone
from tests.corpora import reviews
from tests.serving.load import QUESTIONS
from tests.serving.prompts import LABELS, new_prompt
from tests.tiny import make_model

ROOT = Path(__file__).parents[2]
MAX_ROWS, MAX_BODY, MAX_WAITING = 32, 20_000, 20


@pytest.fixture(scope="module", params=["ray=true", "ray=false"])
def way(request):
    return request.param


@pytest.fixture(scope="module")
def direct(way, tmp_path_factory):
    """The model in this process, and the bank that the service follows, at its first version."""
    folder = tmp_path_factory.mktemp("service")
    backbone = load_backbone(str(make_model(folder / "model", "llama", seed=1, scale=2.0)))
    bank = PromptBank.open(folder / "bank", create=True)
    prompts = [new_prompt(name, 3 + i) for i, name in enumerate(LABELS)]
    pair = new_prompt("pair", 5, like="film", template="{left} is {right}")
    bank.publish([*prompts, pair], backbone.identity, "test", {}, "latest")
    return PromptedModel(backbone, bank)


@pytest.fixture(scope="module")
def service(way, direct, tmp_path_factory):
    """The process of the service and its URL."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    bank = Path(direct.bank.uri)
    log = tmp_path_factory.mktemp("log") / "service.log"
    settings = [f"max_rows={MAX_ROWS}", f"max_body_bytes={MAX_BODY}", f"max_waiting={MAX_WAITING}", "request_s=2", way]
    command = [
        sys.executable, str(ROOT / "jobs/serve_prompts.py"), "--bank", str(bank), "--model", str(bank.parent / "model"),
        "--port", str(port), "--watch-every", "0.3", *(part for text in settings for part in ("--set", text)),
    ]  # fmt: skip
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until(lambda: "Serving version 1" in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()
        yield process, url
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def client(service):
    with httpx.Client(base_url=service[1], timeout=60) as opened:
        yield opened


def _wait_until(done, seconds, every=0.1):
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(every)


def _together(threads):
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_rows_of_many_tasks_are_answered_as_the_model_answers_directly(client, direct):
    rows = [{"task": "film", "text": "good film"}, {"task": "pair", "columns": {"left": "it", "right": "bad"}}]
    rows += [{"task": "colour@1", "text": text} for text in ("red", "the music was poor")]
    reply = client.post("/v1/classify", json={"rows": rows}).json()
    expected = direct.classify([row.get("text", row.get("columns")) for row in rows], [row["task"] for row in rows])
    assert reply["version"] == 1 and [row["task"] for row in reply["rows"]] == [row["task"] for row in rows]
    for row, scores in zip(reply["rows"], expected, strict=True):
        assert row["log_likelihoods"] == pytest.approx(scores, rel=1e-4)
        assert row["label"] == max(scores, key=scores.get)
    tasks, texts = ["open", "film", "open"], ["good film", "bad food with music", "one"]
    asked = [{"task": task, "text": text} for task, text in zip(tasks, texts, strict=True)]
    reply = client.post("/v1/generate", json={"rows": asked, "max_new_tokens": 7}).json()
    assert [row["text"] for row in reply["rows"]] == direct.generate(texts, tasks, 7)


@pytest.mark.parametrize(
    ("route", "body", "status", "sentence"),
    [
        ("classify", {"rows": [{"task": "flim", "text": "x"}]}, 404, "did you mean 'film'"),
        ("classify", {"rows": [{"task": "film@9", "text": "x"}]}, 404, "9"),
        ("classify", {"rows": [{"task": "film@0", "text": "x"}]}, 404, "'0' is refused: a number stands for a version"),
        ("classify", {"rows": [{"task": f"film@{10**21}", "text": "x"}]}, 404, "a number stands for a version"),
        ("classify", {"rows": [{"task": "film@", "text": "x"}]}, 404, "alias name"),
        ("classify", {"rows": [{"task": "open", "text": "x"}]}, 422, "without a label set"),
        ("classify", {"rows": [{"task": "pair", "columns": {"left": "x"}}]}, 422, "needs the column(s) right"),
        ("classify", {"rows": [{"task": "pair", "text": "x"}]}, 422, "the columns left, right"),
        ("classify", {"rows": [{"task": "film", "text": " "}]}, 422, "is empty"),
        ("classify", {"rows": [{"task": "film"}]}, 422, "body.rows.0: give either text or columns"),
        ("classify", {"rows": []}, 422, "body.rows: "),
        ("classify", {"lines": []}, 422, "body.rows: field required"),
        ("generate", {"rows": [{"task": "film", "text": 3}]}, 422, "body.rows.0.text: "),
        ("generate", {"rows": [{"task": "film", "text": "x"}], "max_new_tokens": 0}, 422, "max_new_tokens"),
        ("generate", {"rows": [{"task": "film", "text": "x"}], "max_new_tokens": 9999}, 413, "max_new_tokens"),
        ("generate", {"rows": [{"task": "film", "text": "good " * 300}]}, 413, "is too long"),
        ("generate", {"rows": [{"task": "film", "text": "x"}] * (MAX_ROWS + 1)}, 413, f"{MAX_ROWS} are allowed"),
        ("generate", {"rows": [{"task": "film", "text": "good " * MAX_BODY}]}, 413, f"above {MAX_BODY:,} bytes"),
        ("answer", {}, 404, "POST /v1/answer: Not Found"),
    ],
)
def test_what_cannot_be_answered_gets_one_sentence(client, direct, route, body, status, sentence):
    reply = client.post(f"/v1/{route}", json=body)
    assert reply.status_code == status, reply.text
    (key, told), = reply.json().items()  # fmt: skip
    assert key == "error" and sentence in told and "\n" not in told and direct.bank.uri not in told


def test_a_body_that_is_no_json_or_does_not_tell_its_length(client):
    reply = client.post("/v1/classify", content=b'{"rows": [', headers={"content-type": "application/json"})
    assert reply.status_code == 422 and "not JSON" in reply.json()["error"]
    endless = (b" " * 1000 for _ in range(MAX_BODY // 1000 + 5))
    reply = client.post("/v1/classify", content=endless, headers={"content-type": "application/json"})
    assert reply.status_code == 413 and "bytes" in reply.json()["error"]


def test_a_bad_row_fails_its_own_request_alone(client, direct):
    expected = direct.generate(["good film"], ["film"], 5)
    replies: dict[int, httpx.Response] = {}

    def ask(number):
        rows = [{"task": "film", "text": "good film" if number % 2 else "good " * 300}]
        replies[number] = client.post("/v1/generate", json={"rows": rows, "max_new_tokens": 5})

    _together([threading.Thread(target=ask, args=(number,)) for number in range(16)])
    assert [replies[n].status_code for n in range(16)] == [413, 200] * 8
    assert all(replies[n].json()["rows"][0]["text"] == expected[0] for n in range(1, 16, 2))


def test_tasks_are_told_with_their_columns_and_labels(client):
    reply = client.get("/v1/tasks").json()
    assert [task["name"] for task in reply["tasks"]] == ["colour", "film", "open", "pair"]
    assert reply["tasks"][3] == {
        "name": "pair", "columns": ["left", "right"], "labels": ["negative", "positive"], "metric": "accuracy",
        "prompt_length": 5,
    }  # fmt: skip


def test_openapi_describes_routes_and_errors(client):
    api = client.get("/openapi.json").json()
    post = api["paths"]["/v1/generate"]["post"]
    openai = {"/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{model}"}
    assert set(api["paths"]) == openai | {"/v1/generate", "/v1/classify", "/v1/tasks", "/healthz", "/metrics"}
    assert set(post["responses"]) == {"200", "401", "404", "413", "422", "503"}
    for path in openai:
        (operation,) = api["paths"][path].values()
        assert set(operation["responses"]) == {"200", "400", "401", "404", "503", "default"}
        failure = operation["responses"]["404"]["content"]["application/json"]["schema"]
        assert failure["$ref"].endswith("/OpenAIFailure")
    assert post["responses"]["404"]["content"]["application/json"]["schema"]["$ref"].endswith("/Failure")
    assert "max_new_tokens" in api["components"]["schemas"]["GenerateBody"]["properties"]


# A random model may end any one text at once; of so many, some are long.
LONG = {"rows": [{"task": "open", "text": text} for text, _ in reviews(MAX_ROWS, 0)], "max_new_tokens": 200}


def _ask_for_long(url, replies):
    """Threads that ask for a second or more of the model's work, started, and one arrived."""

    def ask():
        try:
            replies.append(httpx.post(f"{url}/v1/generate", json=LONG, timeout=60).status_code)
        except httpx.ConnectError:
            replies.append(0)

    asking = [threading.Thread(target=ask) for _ in range(6)]
    for thread in asking:
        thread.start()
    _wait_until(lambda: replies or _in_progress(url), 20, every=0.01)
    return asking


def _in_progress(url):
    """How many requests are being answered, without this one."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    (line,) = [line for line in lines if line.startswith("promptbank_requests_in_progress")]
    return int(float(line.split()[-1])) - 1


def test_health_is_told_while_the_model_runs(service, client):
    replies: list[int] = []
    asking = _ask_for_long(service[1], replies)
    assert client.get("/healthz").json() == {"version": 1, "watch_error": None}
    assert len(replies) < len(asking)
    for thread in asking:
        thread.join()
    assert replies == [200] * len(asking)


def test_more_requests_than_may_wait_are_told_to_come_back(service, client):
    busy = _ask_for_long(service[1], [])
    replies: list[httpx.Response] = []
    body = {"rows": [{"task": "film", "text": "good"}] * 8}
    asking = [
        threading.Thread(target=lambda: replies.append(client.post("/v1/classify", json=body))) for _ in range(80)
    ]
    _together(asking)
    for thread in busy:
        thread.join()
    assert {reply.status_code for reply in replies} == {200, 503}
    assert all(reply.headers["retry-after"] == "1" for reply in replies if reply.status_code == 503)


def test_metrics_count_requests_rows_and_batches(client):
    lines = client.get("/metrics").text.splitlines()
    samples = {line.partition("{")[0]: line for line in lines if not line.startswith("#")}
    assert any('route="/v1/classify",status="200"' in line for line in lines)
    assert any('route="/v1/classify",status="404"' in line for line in lines)
    assert any('promptbank_rows_total{replica="' in line and 'task="film"' in line for line in lines)
    assert float(samples["promptbank_bank_version"].split()[-1]) == 1
    assert {"promptbank_batch_rows_bucket", "promptbank_request_seconds_bucket"} <= set(samples)


def test_a_bank_that_cannot_be_read_is_told_while_the_version_before_is_served(client, direct):
    move = Path(direct.bank.uri) / "aliases" / "latest" / "99.json"
    move.write_text("{}")
    try:
        _wait_until(lambda: client.get("/healthz").json()["watch_error"], 20)
        assert client.get("/healthz").status_code == 200
        assert 'promptbank_watch_error{error="' in client.get("/metrics").text
        assert client.post("/v1/classify", json={"rows": [{"task": "film", "text": "good"}]}).status_code == 200
    finally:
        move.unlink()
    _wait_until(lambda: client.get("/healthz").json()["watch_error"] is None, 20)


def test_a_new_version_under_load_fails_no_request_and_answers_from_then_on(service, client, direct):
    command = [sys.executable, str(Path(__file__).with_name("load.py")), service[1], "6", "6"]
    load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    time.sleep(2.5)
    prompts = [new_prompt(name, 5, seed=7) for name in LABELS]
    assert direct.bank.publish(prompts, direct.backbone.identity, "test", {}, "latest") == 2
    _wait_until(lambda: client.get("/healthz").json()["version"] == 2, 20)
    output, _ = load.communicate(timeout=60)
    replies = [json.loads(line) for line in output.splitlines()]
    assert [reply for reply in replies if reply["status"] != 200] == []
    assert {reply["version"] for reply in replies} == {1, 2} and len(replies) > 30
    expected = {(q, version): _directly(direct, q, version) for q in range(len(QUESTIONS)) for version in (1, 2)}
    assert all(expected[q, 1] != expected[q, 2] for q in range(len(QUESTIONS)))
    for reply in replies:
        (row,) = reply["rows"]
        answer = expected[reply["question"], reply["version"]]
        assert row.get("text") == answer or row.get("log_likelihoods") == pytest.approx(answer, rel=1e-4)


def _directly(direct, question, version):
    kind, task, text = QUESTIONS[question]
    if kind == "generate":
        return direct.generate([text], [f"{task}@{version}"], 4)[0]
    return direct.classify([text], [f"{task}@{version}"])[0]


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/v1/tasks", "/openapi.json", "/docs"])
def test_head_is_answered_as_get_without_a_body(client, path):
    asked, got = client.head(path), client.get(path)
    assert asked.status_code == got.status_code == 200 and asked.content == b""
    assert asked.headers["content-type"] == got.headers["content-type"]
    assert client.head("/v1/classify").status_code == 405


def test_a_stream_comes_token_by_token_and_is_the_answer(client):
    asked = {"model": "open", "prompt": "good film", "max_tokens": 40}
    (whole,) = client.post("/v1/completions", json=asked).json()["choices"]
    with client.stream("POST", "/v1/completions", json={**asked, "stream": True}) as reply:
        lines = [line.removeprefix("data: ") for line in reply.iter_lines() if line]
    told = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and len(told) > 5
    assert "".join(choice["text"] for choice in told) == whole["text"]
    assert told[-1]["finish_reason"] == whole["finish_reason"]


def test_what_a_caller_who_left_asked_for_ends_unanswered(service, client):
    body = json.dumps(LONG).encode()
    head = f"POST /v1/generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}"
    with socket.create_connection(("127.0.0.1", int(service[1].rpartition(":")[2]))) as connection:
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        _wait_until(lambda: _in_progress(service[1]), 10, every=0.01)
    unanswered = 'route="/v1/generate",status="499"'
    _wait_until(lambda: any(unanswered in line for line in client.get("/metrics").text.splitlines()), 10)


@pytest.mark.parametrize(
    "half",
    [
        b"",
        b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-",
        b"POST /v1/classify HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{",
    ],
    ids=["nothing", "half a head", "half a body"],
)
def test_half_a_request_ends(service, half):
    """After `request_s`, 2 seconds here."""
    port = int(service[1].rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(half)
        answer = b"".join(iter(lambda: connection.recv(2**16), b""))
    assert answer.startswith(b"HTTP/1.1 408")


def _until_refused(url, statuses):
    """Ask on and on, by a new connection each time, until nobody listens."""
    while True:
        try:
            reply = httpx.get(f"{url}/healthz", timeout=30)
        except httpx.ConnectError:
            return
        except httpx.TransportError:  # accepted by a proxy that then was ended
            statuses.append(0)
        else:
            statuses.append(reply.status_code)
            assert reply.status_code == 200 or reply.headers["retry-after"] == "1"


def test_told_to_end_it_finishes_what_it_has_and_leaves_nothing_behind(service):
    process, url = service
    replies: list[int] = []
    asking = _ask_for_long(url, replies)
    arrived = _in_progress(url)
    assert arrived
    statuses: list[int] = []
    callers = [threading.Thread(target=_until_refused, args=(url, statuses)) for _ in range(3)]
    for thread in callers:
        thread.start()
    process.send_signal(signal.SIGTERM)
    for thread in (*asking, *callers):
        thread.join()
    assert 503 in statuses and set(statuses) <= {200, 503, 0} and statuses.count(0) <= len(callers)
    assert len(replies) == len(asking) and replies.count(200) >= arrived, replies  # who came later is sent away
    assert process.wait(60) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
