"""A real service on a Ray of its own that other machines can reach: it answers OpenAI's client that has a token."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import openai
import pytest

from pipeline.bank import PromptBank
from pipeline.serving import PromptedModel, load_backbone
from tests.serving.prompts import LABELS, new_prompt
from tests.serving.test_app import ROOT, _wait_until
from tests.tiny import make_model

pytestmark = pytest.mark.slow

TOKEN = "the-token-that-nobody-may-see"
TEXTS = ["good film", "bad food with music", "the red story"]


@pytest.fixture(scope="module")
def direct(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guarded")
    backbone = load_backbone(str(make_model(folder / "model", "llama", seed=1, scale=2.0)))
    bank = PromptBank.open(folder / "bank", create=True)
    bank.publish([new_prompt(name, 3 + i) for i, name in enumerate(LABELS)], backbone.identity, "test", {}, "latest")
    return PromptedModel(backbone, bank)


def command(direct, port):
    bank = Path(direct.bank.uri)
    words = ["--bank", str(bank), "--model", str(bank.parent / "model"), "--host", "0.0.0.0", "--port", str(port)]
    return [sys.executable, str(ROOT / "jobs/serve_prompts.py"), *words]


def environment(**more):
    return {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "PROMPT_BANK_TOKEN")} | more


@pytest.fixture(scope="module")
def ray_folder():
    """Where Ray writes; its sockets want a short path."""
    folder = Path(tempfile.mkdtemp(prefix="r"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module", params=["environment", pytest.param("file", marks=pytest.mark.slow)])
def service(request, direct, ray_folder, tmp_path_factory):
    """Its address, its log, its process, and the file of its tokens if it has one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("log")
    log, tokens = folder / "service.log", folder / "tokens"
    if request.param == "file":
        tokens.write_text(f"# of this test\n{TOKEN}\n")
        words, more = ["--token-file", tokens.name], {}
    else:
        words, more = [], {"PROMPT_BANK_TOKEN": TOKEN}
    variables = environment(RAY_TMPDIR=str(ray_folder), PYTHONPATH=str(ROOT), **more)
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command(direct, port), *words], stdout=output, stderr=output, env=variables, cwd=folder,
            start_new_session=True,
        )  # fmt: skip
    try:
        _wait_until(lambda: "Serving version 1" in log.read_text() or process.poll() is not None, 180)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}", log, process, tokens if request.param == "file" else None
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


def test_openais_client_gets_the_answers_of_the_prompted_model(service, direct):
    with openai.OpenAI(base_url=f"{service[0]}/v1", api_key=TOKEN, max_retries=0) as client:
        for task in LABELS:
            expected = direct.generate(TEXTS, [task] * 3, 7)
            asked = {"model": task, "prompt": TEXTS, "max_tokens": 7}
            reply = client.completions.create(**asked)
            assert [choice.text.strip() for choice in reply.choices] == expected and reply.model == f"{task}@1"
            streamed = dict.fromkeys(range(len(TEXTS)), "")
            for chunk in client.completions.create(**asked, stream=True):
                for choice in chunk.choices:
                    streamed[choice.index] += choice.text
            assert list(streamed.values()) == [choice.text for choice in reply.choices]
            messages = [{"role": "user", "content": TEXTS[0]}]
            chat = client.chat.completions.create(model=task, messages=messages, max_tokens=7)
            assert chat.choices[0].message.content.strip() == expected[0]
        assert [model.id for model in client.models.list()] == sorted(LABELS)
        assert client.models.retrieve("film@1").id == "film@1"
        with pytest.raises(openai.NotFoundError, match="did you mean 'film'"):
            client.completions.create(model="flim", prompt="good")
        with pytest.raises(openai.BadRequestError, match="cannot do this"):
            client.completions.create(model="film", prompt="good", temperature=1)


def test_without_the_token_there_is_no_answer_but_health(service):
    url = service[0]
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="the token is not one of this service's"),
    ):
        client.completions.create(model="film", prompt="good")
    assert httpx.post(f"{url}/v1/classify", json={"rows": [{"task": "film", "text": "x"}]}).status_code == 401
    assert httpx.get(f"{url}/metrics").status_code == 401
    assert httpx.get(f"{url}/metrics", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert httpx.get(f"{url}/healthz").json() == {"version": 1, "watch_error": None}


def test_the_token_is_in_no_argument_of_a_process_and_in_nothing_that_is_written(service, ray_folder):
    _, log, _, _ = service
    assert TOKEN not in log.read_text()
    lines = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(place.read_bytes())
        except OSError:  # it has ended
            continue
    assert any(b"serve_prompts.py" in line for line in lines)
    assert not [line for line in lines if TOKEN.encode() in line]
    files = [path for path in ray_folder.rglob("*") if path.is_file()]
    assert len(files) > 10, "Ray has written elsewhere"
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []


def test_a_rotated_file_lets_the_next_token_in(service):
    url, _, _, tokens = service
    if tokens is None:
        pytest.skip("the token is in the environment, which does not change")
    tokens.write_text("the-next-token\n")

    def status(token):
        return httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {token}"}).status_code

    assert (status("the-next-token"), status(TOKEN)) == (200, 401)
    tokens.write_text(f"{TOKEN}\n")  # for other tests
    assert (status("the-next-token"), status(TOKEN)) == (401, 200)


def test_it_does_not_start_without_a_token_and_names_the_remedy(direct):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(command(direct, port), env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: whoever reaches 0.0.0.0 could ask the service: set PROMPT_BANK_TOKEN or ")
    assert len(done.stderr.splitlines()) == 1
