"""Who is let in: callers with a token of the environment or of a file that may change, and nobody without."""

import asyncio
import json
import logging
import os

import openai
import pytest
from fastapi.testclient import TestClient

from pipeline.bank import PromptBank
from pipeline.errors import SettingsError
from pipeline.serving import PromptedModel, authentication, load_backbone
from pipeline.serving.api import make_api
from pipeline.serving.authentication import Tokens, open_tokens, require_tokens, settle_authentication
from pipeline.serving.service_settings import make_settings
from tests.serving.local_service import LocalService, listening
from tests.serving.prompts import new_prompt
from tests.tiny import make_model

TOKEN = "a-token.of_32~signs+and/some=more"
ROUTES = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/film"),
    ("POST", "/v1/generate"),
    ("POST", "/v1/classify"),
    ("GET", "/v1/tasks"),
    ("GET", "/metrics"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("HEAD", "/metrics"),
    ("GET", "/no/such/route"),
]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    served = load_backbone(str(make_model(folder / "model")))
    bank = PromptBank.open(folder / "bank", create=True)
    bank.publish([new_prompt("film", 3)], served.identity, "test", {}, "latest")
    return LocalService(PromptedModel(served, bank))


@pytest.fixture
def client(service):
    return TestClient(make_api(service, Tokens([TOKEN.encode(), b"another"])))


def settings(**given):
    return make_settings({"bank": "b", "model": "m", **given})


def with_token(token):
    return {"authorization": f"Bearer {token}"}


def test_openais_client_is_let_in_with_the_token_and_refused_without(service):
    with listening(service, Tokens([TOKEN.encode()])) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=TOKEN) as client:
            assert client.completions.create(model="film", prompt="good").model == "film@1"
            assert [model.id for model in client.models.list()] == ["film"]
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError) as refused:
                client.completions.create(model="film", prompt="good")
            assert (refused.value.type, refused.value.body["code"]) == ("UnauthorizedError", 401)
            with pytest.raises(openai.AuthenticationError, match="the token is not one of this service's"):
                list(client.chat.completions.create(model="film", messages=[], stream=True))


def test_every_route_of_the_service_is_among_those_that_are_tried(service):
    routes = {route.path for route in make_api(service).routes if hasattr(route, "path")}
    tried = {path for _, path in ROUTES} | {"/healthz", "/v1/models/{model}", "/docs/oauth2-redirect", "/redoc"}
    assert routes <= tried


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        with_token(""),
        with_token("wrong"),
        with_token(TOKEN[:-1]),
        with_token(f"{TOKEN}x"),
        with_token(f"{TOKEN} x"),
        with_token(TOKEN.upper()),
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        [("authorization", f"Bearer {TOKEN}"), ("authorization", "Bearer wrong")],
        {"authorization": "Bearer t\u00f6ken".encode("latin-1")},
        {"x-api-key": TOKEN},
    ],
)
def test_without_a_token_every_route_says_one_sentence_and_what_to_send(client, method, path, headers):
    reply = client.request(method, path, headers=headers)
    assert reply.status_code == 401 and reply.headers["www-authenticate"].startswith("Bearer")
    if method != "HEAD":
        told = reply.json()["error"]
        sentence = told["message"] if isinstance(told, dict) else told
        assert isinstance(told, dict) == path.startswith(("/v1/completions", "/v1/chat", "/v1/models"))
        assert sentence.startswith(f"{method} {path}: ") and "\n" not in sentence and TOKEN not in reply.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
@pytest.mark.parametrize("token", [TOKEN, "another"])
@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_each_token_opens_every_route(client, method, path, token, scheme):
    assert client.request(method, path, headers={"authorization": f"{scheme} {token}"}).status_code != 401


def test_health_is_told_to_everybody(client):
    assert client.get("/healthz").json() == {"version": 1, "watch_error": None}
    assert client.get("/healthz/x").status_code == 401


def test_below_a_prefix_health_alone_is_open(service):
    client = TestClient(make_api(service, Tokens([b"token"])), root_path="/bank")
    assert client.get("/bank/healthz").status_code == 200
    assert client.get("/bank/v1/tasks").status_code == 401
    told = client.get("/bank/v1/models").json()["error"]
    assert told["type"] == "UnauthorizedError"


def test_a_refused_body_is_not_read(service):
    """An upload of somebody without a token takes no memory and no time."""
    read, told = [], []
    api = make_api(service, Tokens([b"token"]))
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}

    async def receive():
        read.append("asked")
        return {"type": "http.request", "body": b"{", "more_body": True}

    async def send(message):
        told.append(message)

    asyncio.run(api(scope, receive, send))
    assert told[0]["status"] == 401 and not read


def test_tokens_are_compared_in_constant_time_and_each_with_all(service, monkeypatch):
    compared = []
    real = authentication.hmac.compare_digest
    monkeypatch.setattr(authentication.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    tokens = Tokens([b"one", b"two", b"three"])
    assert [tokens.accept(offered) for offered in (b"one", b"", b"\xff" * 9999)] == [True, False, False]
    assert len(compared) == 9 and {len(each) for pair in compared for each in pair} == {32}


def test_a_file_has_tokens_one_a_line(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("# of the web shop\nfirst\n\n  second  \r\n#third\n")
    tokens = open_tokens(settings(token_file=str(path)))
    assert [tokens.accept(t) for t in (b"first", b"second", b"third", b"#third", b"", b"# of the web shop")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_a_file_that_changes_is_read_again(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("old")
    tokens = open_tokens(settings(token_file=str(path)))
    path.write_text("old\nnew")  # in place
    assert tokens.accept(b"old") and tokens.accept(b"new")
    (tmp_path / "next").write_text("new")  # as a secret of Kubernetes is swapped, of any age
    os.utime(tmp_path / "next", (0, 0))
    os.replace(tmp_path / "next", path)
    assert tokens.accept(b"new") and not tokens.accept(b"old")


@pytest.mark.parametrize("broken", ["", "# none\n", "two words\n", None])
def test_a_file_that_is_gone_or_half_written_leaves_the_tokens_in_force_and_is_told_once(tmp_path, caplog, broken):
    path = tmp_path / "tokens"
    path.write_text("good-token")
    tokens = open_tokens(settings(token_file=str(path)))
    path.unlink() if broken is None else path.write_text(broken)
    with caplog.at_level(logging.WARNING):
        assert [tokens.accept(offered) for offered in (b"good-token", b"two", b"good-token")] == [True, False, True]
    (warned,) = [record.getMessage() for record in caplog.records]
    assert "stay in force" in warned and "good-token" not in warned and "two words" not in warned
    path.write_text("next-token")
    assert tokens.accept(b"next-token") and not tokens.accept(b"good-token")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "has no token: write one a line"),
        (b"# none\n\n", "has no token: write one a line"),
        (b"fine\nsecret words", "line 2, is empty, or has a space or a sign that no header can carry"),
        ("s\u00e9cret".encode(), "line 1, is empty, or has a space or a sign"),
        (b"s\x00cret", "line 1, is empty, or has a space or a sign"),
        (b"x" * (2**20 + 1), "is larger than 1,048,576 bytes"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_without_tokens_is_refused_by_its_line_and_without_its_text(tmp_path, content, told):
    path = tmp_path / "tokens"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError) as refused:
        open_tokens(settings(token_file=str(path)))
    said = str(refused.value)
    assert said.startswith(f"token_file {path}") and told in said and "cret" not in said and "\n" not in said


def test_a_folder_and_a_pipe_are_no_files_of_tokens(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(SettingsError, match="is no plain file"):
            open_tokens(settings(token_file=str(path)))


def test_the_environment_names_the_token_where_no_file_does(tmp_path):
    path = tmp_path / "tokens"
    path.write_text("of-the-file")
    environment = {"PROMPT_BANK_TOKEN": "of-the-environment\n"}
    tokens = open_tokens(settings(), environment)
    assert tokens.accept(b"of-the-environment") and not tokens.accept(b"of-the-environment\n")
    tokens = open_tokens(settings(token_file=str(path)), environment)
    assert tokens.accept(b"of-the-file") and not tokens.accept(b"of-the-environment")
    assert open_tokens(settings(no_authentication=True), environment) is None
    assert open_tokens(settings(), {}) is None


@pytest.mark.parametrize("token", ["", "  ", "my secret", "s\u00e9cret", "secret\nsecret"])
def test_an_environment_with_no_token_in_it_is_refused(token):
    with pytest.raises(SettingsError, match="PROMPT_BANK_TOKEN is empty, or has a space") as refused:
        open_tokens(settings(), {"PROMPT_BANK_TOKEN": token})
    assert "cret" not in str(refused.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_a_loopback_address_no_token_is_needed(host, monkeypatch):
    monkeypatch.delenv("PROMPT_BANK_TOKEN", raising=False)
    assert settle_authentication(settings(), host).no_authentication
    monkeypatch.setenv("PROMPT_BANK_TOKEN", TOKEN)
    settled = settle_authentication(settings(), host)
    assert not settled.no_authentication and require_tokens(settled).accept(TOKEN.encode())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "2001:db8::1", "no.such.host.invalid"])
def test_beyond_it_a_service_without_a_token_does_not_start(host, monkeypatch, tmp_path):
    monkeypatch.delenv("PROMPT_BANK_TOKEN", raising=False)
    with pytest.raises(SettingsError) as refused:
        settle_authentication(settings(), host)
    assert "set PROMPT_BANK_TOKEN or --token-file" in str(refused.value) and "--no-authentication" in str(refused.value)
    assert settle_authentication(settings(no_authentication=True), host).no_authentication
    (tmp_path / "tokens").write_text(TOKEN)
    named = settings(token_file=str(tmp_path / "tokens"))
    assert settle_authentication(named, host) == named
    monkeypatch.setenv("PROMPT_BANK_TOKEN", TOKEN)
    assert settle_authentication(settings(), host) == settings()


def test_a_replica_that_does_not_know_who_reaches_it_wants_a_token_or_to_be_told(monkeypatch):
    monkeypatch.delenv("PROMPT_BANK_TOKEN", raising=False)
    with pytest.raises(SettingsError, match=r"set PROMPT_BANK_TOKEN in the environment .* or set no_authentication"):
        require_tokens(settings())
    assert require_tokens(settings(no_authentication=True)) is None
    monkeypatch.setenv("PROMPT_BANK_TOKEN", TOKEN)
    assert require_tokens(settings()).accept(TOKEN.encode())


def test_a_file_of_tokens_and_no_authentication_contradict_each_other():
    with pytest.raises(SettingsError, match=r"^token_file names who is let in, and no_authentication"):
        settings(token_file="tokens", no_authentication=True)


def test_settings_do_not_hold_the_token_of_the_environment(monkeypatch):
    """Ray stores them, and shows them."""
    monkeypatch.setenv("PROMPT_BANK_TOKEN", TOKEN)
    assert TOKEN not in settle_authentication(settings(), "0.0.0.0").model_dump_json()
    assert TOKEN not in repr(vars(require_tokens(settings())))
    assert json.loads(settings().model_dump_json())["token_file"] is None
