"""OpenAI's own client on the routes of a service: it gets the answers of `PromptedModel`, and OpenAI's errors."""

import itertools
import json
import logging
import shutil
import threading
import time
from datetime import UTC, datetime

import httpx
import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.bank import PromptBank
from pipeline.errors import BankError, OverloadedError
from pipeline.serving import PromptedModel, load_backbone
from tests.chats import CHATML, make_chat_model
from tests.serving.local_service import LocalService, listening
from tests.serving.prompts import LABELS, new_prompt
from tests.serving.test_chats import prompt_of_chat

TEXTS = ["good film", "bad food with music", "the red story", "one two three"]
MOST_NEW, MOST_ROWS = 40, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Version 1 has every task, `prod` is on it; version 2 has another `film`."""
    folder = tmp_path_factory.mktemp("openai")
    plain = AutoModelForCausalLM.from_pretrained(make_chat_model(folder / "model", CHATML))
    with torch.no_grad():
        plain.lm_head.weight[plain.config.eos_token_id] *= 1.5  # so that some answers end and others go on
    plain.save_pretrained(folder / "model")
    served = load_backbone(str(folder / "model"), weights="full")
    bank = PromptBank.open(folder / "bank", create=True)
    pair = new_prompt("pair", 5, like="film", template="{left} is {right}")
    chat = prompt_of_chat("chat", served.tokenizer)
    first = [*(new_prompt(name, 3 + i) for i, name in enumerate(LABELS)), pair, chat]
    bank.publish(first, served.identity, "test", {}, "latest")
    bank.promote(1, "prod", "test")
    bank.publish([new_prompt("film", 6, seed=3)], served.identity, "test", {}, "latest")
    return PromptedModel(served, PromptBank.open(folder / "bank"))


@pytest.fixture(scope="module")
def service(model):
    return LocalService(model, max_new_tokens=MOST_NEW, max_rows=MOST_ROWS)


@pytest.fixture(scope="module")
def url(service):
    with listening(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def plainly(model, task, text, most):
    """Token ids of the answer by transformers' own generate, with the token that ended it, and how many went in."""
    loaded, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model.backbone.identity.model).eval(),
        model.backbone.tokenizer,
    )
    ids = torch.tensor(tokenizer(text).input_ids)
    embeds = torch.cat([torch.tensor(model.bank.load(task).array), loaded.get_input_embeddings()(ids)])
    out = loaded.generate(inputs_embeds=embeds[None], max_new_tokens=most, do_sample=False, pad_token_id=0)
    return out[0].tolist(), len(embeds)


@pytest.mark.parametrize("task", ["film", "open", "colour", "film@1", "film@prod"])
def test_a_completion_is_the_answer_of_the_prompted_model(client, model, task):
    for text in TEXTS:
        reply = client.completions.create(model=task, prompt=text, max_tokens=9)
        (choice,) = reply.choices
        assert choice.text.strip() == model.generate([text], [task], 9)[0]
        assert reply.object == "text_completion" and reply.id.startswith("cmpl-")
        assert reply.model == task.partition("@")[0] + ("@2" if "@" not in task else "@1")


def test_tokens_are_counted_and_the_end_is_told_as_it_was(client, model):
    """Against transformers' own generate. The soft prompt counts as input, the token that ends an answer as output."""
    tokenizer, reasons = model.backbone.tokenizer, set()
    for task, text in itertools.product(LABELS, TEXTS):
        reply = client.completions.create(model=task, prompt=text, max_tokens=MOST_NEW)
        ids, read = plainly(model, task, text, MOST_NEW)
        (choice,) = reply.choices
        assert choice.text == tokenizer.decode(ids, skip_special_tokens=True)
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (read, len(ids))
        assert reply.usage.total_tokens == read + len(ids)
        assert choice.finish_reason == ("stop" if ids[-1] == tokenizer.eos_token_id else "length")
        reasons.add(choice.finish_reason)
    assert reasons == {"stop", "length"}


def test_a_stop_cuts_the_answer_before_it_and_counts_the_tokens_up_to_it(client, model):
    """Whatever word of an answer is the stop; a stop that is not in it changes nothing."""
    tokenizer = model.backbone.tokenizer
    (whole,) = (c := client.completions.create(model="open", prompt=TEXTS[0], max_tokens=12)).choices
    words = whole.text.split()
    assert len(words) > 3
    for stop in words:
        for stops in (stop, ["never in it", stop]):
            reply = client.completions.create(model="open", prompt=TEXTS[0], max_tokens=12, stop=stops)
            (choice,) = reply.choices
            assert choice.text == whole.text[: whole.text.index(stop)] and choice.finish_reason == "stop"
            until = tokenizer(whole.text[: whole.text.index(stop) + len(stop)], add_special_tokens=False).input_ids
            assert reply.usage.completion_tokens == len(until)
    again = client.completions.create(model="open", prompt=TEXTS[0], max_tokens=12, stop=["never in it"])
    assert (again.choices, again.usage) == (c.choices, c.usage)


def test_as_many_stops_as_are_allowed_are_taken(client):
    plain = client.completions.create(model="open", prompt=TEXTS[0], max_tokens=12)
    stops = [f"{place:0256}" for place in range(16)]
    reply = client.completions.create(model="open", prompt=TEXTS[0], max_tokens=12, stop=stops)
    assert (reply.choices, reply.usage) == (plain.choices, plain.usage)


def test_rows_in_a_list_are_choices_in_their_order(client, model):
    reply = client.completions.create(model="open", prompt=TEXTS, max_tokens=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(model="open", prompt=text, max_tokens=7) for text in TEXTS]
    assert [c.text for c in reply.choices] == [one.choices[0].text for one in alone]
    assert [c.text.strip() for c in reply.choices] == model.generate(TEXTS, ["open"] * 4, 7)
    for field in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert getattr(reply.usage, field) == sum(getattr(one.usage, field) for one in alone)


def test_a_row_of_several_columns_is_json_in_text(client, model):
    row = {"left": "the film", "right": "good"}
    (choice,) = client.completions.create(model="pair", prompt=json.dumps(row), max_tokens=6).choices
    assert choice.text.strip() == model.generate([row], ["pair"], 6)[0]


def test_a_stream_has_the_answer_the_reason_and_the_usage_of_the_reply(client, model):
    asked = {"model": "open", "prompt": TEXTS, "max_tokens": 9}
    whole = client.completions.create(**asked)
    chunks = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    told = [choice for chunk in chunks for choice in chunk.choices]
    for choice in whole.choices:
        of_row = [(c.text, c.finish_reason) for c in told if c.index == choice.index]
        assert "".join(text for text, _ in of_row) == choice.text
        assert [reason for _, reason in of_row] == [None] * (len(of_row) - 1) + [choice.finish_reason]
    assert [c.index for c in told] != sorted(c.index for c in told)  # rows are written side by side
    assert chunks[-1].usage == whole.usage and {chunk.model for chunk in chunks} == {"open@2"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in client.completions.create(**asked, stream=True))


def test_a_stream_of_a_chat_has_the_answer_and_the_reason_of_the_reply(client):
    asked = {"model": "chat", "messages": [{"role": "user", "content": TEXTS[0]}], "max_tokens": 9}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    assert "".join(c.delta.content or "" for c in deltas) == whole.choices[0].message.content
    assert [c.finish_reason for c in deltas if c.finish_reason] == [whole.choices[0].finish_reason]
    assert chunks[-1].usage == whole.usage


@pytest.mark.parametrize(
    ("path", "asked"),
    [("completions", {"prompt": "good"}), ("chat/completions", {"messages": [{"role": "user", "content": "good"}]})],
)
def test_a_stream_is_server_sent_events_that_end_with_done(url, path, asked):
    with httpx.stream(
        "POST", f"{url}/v1/{path}", json={"model": "film", "stream": True, **asked}, timeout=60
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = list(stream.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""] and set(lines[1::2]) == {""}
    assert all(json.loads(line.removeprefix("data: "))["model"] == "film@2" for line in lines[:-2:2])


@pytest.mark.parametrize("task", ["film", "open", "colour", "chat"])
def test_a_streams_pieces_are_the_answer_whatever_stops_it(client, model, task):
    """The random model's answers are full of bytes that are no characters."""
    asked = {"model": task, "prompt": TEXTS[1], "max_tokens": MOST_NEW}
    text = client.completions.create(**asked).choices[0].text
    for stop in (None, text[5:7], [text[-3:], text[8:12]], ["\ufffd"]):
        (whole,) = client.completions.create(**asked, stop=stop).choices
        told = [chunk.choices[0] for chunk in client.completions.create(**asked, stop=stop, stream=True)]
        assert "".join(choice.text for choice in told) == whole.text and told[-1].finish_reason == whole.finish_reason


def test_the_first_event_comes_before_the_second_token_is_made(client, model, monkeypatch):
    arrived, made, step = threading.Event(), [], model.step

    def after_the_first_event(running):
        assert arrived.wait(60), "the first event did not come"
        made.append(1)
        return step(running)

    monkeypatch.setattr(model, "step", after_the_first_event)
    stream = client.completions.create(model="open", prompt=TEXTS[0], max_tokens=9, stream=True)
    first = next(iter(stream))
    assert first.choices[0].text and not made
    arrived.set()
    assert [chunk.choices[0].finish_reason for chunk in stream][-1] and len(made) == 8


def test_a_client_that_leaves_in_the_middle_frees_its_row_and_its_place(model, monkeypatch):
    service, arrived, rows, step = LocalService(model, max_new_tokens=200), threading.Event(), [], model.step

    def counted(running):
        assert arrived.wait(60)
        rows.append(len(running))
        return step(running)

    monkeypatch.setattr(model, "step", counted)
    long = {"model": "film", "prompt": "good film", "max_tokens": 200, "stream": True}
    with listening(service) as address:
        with httpx.stream("POST", f"{address}/v1/completions", json=long, timeout=60) as stream:
            next(stream.iter_lines())
        arrived.set()
        while 'status="200"' not in (told := httpx.get(f"{address}/metrics").text) and 'status="499"' not in told:
            time.sleep(0.01)
        with service.admitted():
            assert service._admitted == 1
        taken = len(rows)
        httpx.post(f"{address}/v1/completions", json={"model": "film", "prompt": "one", "max_tokens": 3}, timeout=60)
    assert taken < 190 and set(rows[taken + 1 :]) <= {1}


def test_a_failure_in_the_middle_of_a_stream_is_an_event_with_the_error(model, monkeypatch):
    step, made = model.step, []

    def breaks(running):
        if len(made) == 3:
            raise MemoryError("no room")
        made.append(1)
        return step(running)

    monkeypatch.setattr(model, "step", breaks)
    told = []
    with (
        listening(LocalService(model)) as address,
        openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client,
        pytest.raises(openai.APIError, match="the service failed on this request; its log tells why") as failed,
    ):
        told.extend(client.completions.create(model="open", prompt=TEXTS[0], max_tokens=9, stream=True))
    assert len(told) > 2 and (failed.value.type, failed.value.body["code"]) == ("InternalServerError", 500)


@pytest.mark.parametrize("stream", [False, True])
def test_a_mistake_has_its_own_status_with_and_without_a_stream(client, stream):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="flim", prompt="good", stream=stream)
    with pytest.raises(openai.BadRequestError, match="send it as a JSON object"):
        client.completions.create(model="pair", prompt="x", stream=stream)
    with pytest.raises(openai.BadRequestError, match="too long"):
        client.completions.create(model="film", prompt="good " * 600, stream=stream)


@pytest.mark.parametrize("task", ["chat", "film", "pair"])
def test_a_chat_is_the_answer_to_its_one_message(client, model, task):
    row = json.dumps({"left": "it", "right": "bad"}) if task == "pair" else TEXTS[1]
    expected = model.generate([json.loads(row) if task == "pair" else row], [task], 8)[0]
    for content in (row, [{"type": "text", "text": row}]):
        messages = [{"role": "user", "content": content}]
        for limit in ({"max_tokens": 8}, {"max_completion_tokens": 8}, {"max_tokens": 3, "max_completion_tokens": 8}):
            reply = client.chat.completions.create(model=task, messages=messages, **limit)
            (choice,) = reply.choices
            assert choice.message.role == "assistant" and choice.message.content.strip() == expected
            assert reply.object == "chat.completion" and reply.id.startswith("chatcmpl-")


def test_without_a_limit_a_completion_has_16_tokens_and_a_chat_as_many_as_fit(client, model):
    long = next(t for t in TEXTS if len(plainly(model, "open", t, MOST_NEW)[0]) == MOST_NEW)
    assert client.completions.create(model="open", prompt=long).usage.completion_tokens == 16
    messages = [{"role": "user", "content": long}]
    reply = client.chat.completions.create(model="open", messages=messages)
    assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (MOST_NEW, "length")
    longer = {"role": "user", "content": f"{long} " + "film " * (model.longest - reply.usage.prompt_tokens - 5)}
    shortened = client.chat.completions.create(model="open", messages=[longer])
    assert shortened.usage.total_tokens == model.longest and shortened.usage.completion_tokens < MOST_NEW


def test_models_are_the_tasks_and_every_version_of_them_is_found(client, model):
    assert [card.id for card in client.models.list()] == ["chat", "colour", "film", "open", "pair"]
    times = {}
    for name in ("film", "film@1", "film@prod", "film@2", "film@latest"):
        card = client.models.retrieve(name)
        assert (card.id, card.object, card.owned_by) == (name, "model", "promptbank")
        times[name] = card.created
    written = {version: model.bank.manifest(version).time for version in (1, 2)}
    for name, version in {"film": 2, "film@1": 1, "film@prod": 1}.items():
        assert datetime.fromtimestamp(times[name], UTC).strftime("%Y-%m-%dT%H:%M:%SZ") == written[version]


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("flim", "holds no prompt 'flim'; did you mean 'film'?"),
        ("film@7", "versions/7.json is missing"),
        ("film@canary", "has no alias 'canary'; known: latest, prod"),
        ("a b", "the prompt name 'a b' is refused"),
    ],
)
def test_a_task_version_or_alias_that_is_not_there_is_not_found(client, model, task, sentence):
    for ask in (
        lambda: client.completions.create(model=task, prompt="good"),
        lambda: client.chat.completions.create(model=task, messages=[{"role": "user", "content": "good"}]),
        lambda: client.models.retrieve(task),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            ask()
        assert sentence in refused.value.body["message"] and model.bank.uri not in str(refused.value)
        assert (refused.value.type, refused.value.param, refused.value.body["code"]) == ("NotFoundError", "model", 404)


@pytest.mark.parametrize(
    ("asked", "param", "sentence"),
    [
        ({"prompt": [1, 2]}, None, "takes texts and not token ids"),
        ({"prompt": [[1, 2]]}, None, "takes texts and not token ids"),
        ({"prompt": []}, None, "send 'prompt' as text"),
        ({"prompt": {"a": 1}}, None, "'prompt' must be a text or a list of texts"),
        ({"prompt": 7}, None, "'prompt' must be a text or a list of texts"),
        ({"prompt": None}, None, "'prompt' must be a text or a list of texts"),
        ({"prompt": "x", "echo": True}, None, "'echo' cannot be had for a task of the prompt bank"),
        ({"prompt": "x", "suffix": "y"}, None, "'suffix' cannot be had for a task of the prompt bank"),
        ({"prompt": "x", "temperature": 0.7}, "temperature", "one greedy answer to a row and cannot do this"),
        ({"prompt": "x", "n": 2}, "n", "leave it out, or set it to 1"),
        ({"prompt": "x", "best_of": 3}, "best_of", "leave it out, or set it to 1"),
        ({"prompt": "x", "logprobs": 0}, "logprobs", "leave it out, or set it to false"),
        ({"prompt": "x", "frequency_penalty": 1}, "frequency_penalty", "set it to 0"),
        ({"prompt": "x", "logit_bias": {"7": 1}}, "logit_bias", "set it to {}"),
        ({"prompt": "x", "stop": ""}, "stop", "an empty text would end every answer"),
        ({"prompt": "x", "stop": ["y"] * 17}, "stop", "body.stop: 16 texts of at most 256 characters each are allowed"),
        ({"prompt": "x", "stop": ["y", "z" * 257]}, "stop", "are allowed: send fewer, or shorter ones"),
        ({"prompt": "x", "stop": "z" * 257}, "stop", "are allowed: send fewer, or shorter ones"),
        ({"prompt": "x", "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"prompt": "x", "max_tokens": MOST_NEW + 1}, None, f"max_tokens is 41 where {MOST_NEW} are allowed"),
        ({"prompt": "good " * 300}, None, "fit; shorten the text"),
        ({"prompt": ["x"] * (MOST_ROWS + 1)}, None, f"has 9 rows where {MOST_ROWS} are allowed"),
        ({"prompt": "x", "sampler": "beam"}, "sampler", "body.sampler: extra inputs are not permitted"),
        ({"prompt": "x", "model": "pair"}, None, 'send it as a JSON object, {"left": "…", "right": "…"}'),
        ({"prompt": '{"left": "x"}', "model": "pair"}, None, "needs the column(s) right"),
        ({"prompt": '{"left": "x", "right": [1]}', "model": "pair"}, None, "the column 'right' must be a text"),
        ({"prompt": '{"left": "x", "right": NaN}', "model": "pair"}, None, "the column 'right' must be a text"),
        ({"prompt": "[" * 100_000, "model": "pair"}, None, "send it as a JSON object"),
        ({}, "prompt", "body.prompt: field required"),
    ],
)
def test_what_cannot_be_had_is_a_bad_request_with_one_sentence(client, asked, param, sentence):
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/completions", body={"model": "film", **asked}, cast_to=object)
    assert sentence in refused.value.body["message"] and "\n" not in refused.value.body["message"]
    assert (refused.value.type, refused.value.param, refused.value.body["code"]) == ("BadRequestError", param, 400)


def test_settings_that_change_no_greedy_answer_are_taken(client):
    plain = client.completions.create(model="film", prompt=TEXTS[0])
    neutral = {
        "n": 1, "best_of": 1, "temperature": 0.0, "top_p": 0.9, "seed": 3, "presence_penalty": 0.0, "logit_bias": {},
        "logprobs": None, "echo": False, "suffix": None, "user": "me", "stop": None, "stream": False,
    }  # fmt: skip
    given = client.completions.create(model="film", prompt=TEXTS[0], **neutral, extra_body={"top_k": 5, "min_p": 0.1})
    assert (given.choices, given.usage) == (plain.choices, plain.usage)


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "good"}],
        [{"role": "assistant", "content": "good"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
        [{"role": "user", "content": [{"type": "image_url", "text": "good"}]}],
        [{"role": "user"}],
        [],
    ],
)
def test_a_chat_of_more_or_less_than_a_row_is_a_bad_request(client, messages):
    with pytest.raises(openai.BadRequestError, match="takes one message of the role 'user' with a row's text"):
        client.chat.completions.create(model="chat", messages=messages)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("logprobs", True),
        ("n", 2),
        ("temperature", 1),
    ],
)
def test_a_chat_that_asks_for_more_than_a_greedy_answer_is_a_bad_request(client, name, value):
    messages = [{"role": "user", "content": "good"}]
    with pytest.raises(openai.BadRequestError, match=f"body.{name}: this service gives one greedy answer") as refused:
        client.chat.completions.create(model="chat", messages=messages, **{name: value})
    assert refused.value.param == name


def test_settings_of_chats_that_ask_for_nothing_more_are_taken(client):
    messages = [{"role": "user", "content": "good"}]
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"]}
    given = client.chat.completions.create(model="chat", messages=messages, logprobs=False, top_logprobs=0, **neutral)
    assert given.choices == client.chat.completions.create(model="chat", messages=messages).choices


@pytest.mark.parametrize(
    ("error", "kind", "status", "sentence"),
    [
        (OverloadedError("7 requests wait"), "ServiceUnavailableError", 503, "7 requests wait"),
        (BankError("blobs/x is damaged"), "ServiceUnavailableError", 503, "blobs/x is damaged"),
        (ZeroDivisionError("x"), "InternalServerError", 500, "the service failed on this request; its log tells why"),
    ],
)
def test_trouble_of_the_service_has_openais_form(model, error, kind, status, sentence):
    class InTrouble(LocalService):
        async def complete(self, request):
            raise error

    with listening(InTrouble(model)) as address, openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        with pytest.raises(openai.InternalServerError) as told:
            client.with_options(max_retries=0).completions.create(model="film", prompt="good")
        assert told.value.status_code == status and told.value.body["message"] == sentence
        assert (told.value.type, told.value.body["code"]) == (kind, status)
        assert ("retry-after" in told.value.response.headers) == isinstance(error, OverloadedError)


def test_a_body_that_is_no_json_and_a_method_that_is_not_there_have_openais_form(url):
    reply = httpx.post(f"{url}/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert reply.status_code == 400 and "the body is not JSON" in reply.json()["error"]["message"]
    assert httpx.get(f"{url}/v1/completions").json()["error"]["type"] == "MethodNotAllowedError"


@pytest.mark.parametrize("path", ["models", "tasks", "generate"])
def test_a_bank_that_cannot_be_read_is_told_without_its_address(model, tmp_path, path):
    shutil.copytree(model.bank.uri, tmp_path / "bank")
    bank = PromptBank.open(tmp_path / "bank")
    place = tmp_path / "bank/versions/2.json"
    place.write_bytes(place.read_bytes()[::-1])
    service = LocalService(PromptedModel(model.backbone, bank))
    with listening(service) as address:
        body = {"json": {"rows": [{"task": "film", "text": "good"}]}} if path == "generate" else {}
        reply = httpx.request("POST" if body else "GET", f"{address}/v1/{path}", **body, timeout=60)
    assert reply.status_code == 503 and "versions/2.json is damaged" in reply.text and bank.uri not in reply.text


def test_head_is_answered_by_a_real_server_without_a_body_or_a_traceback(service, url, caplog):
    server = logging.getLogger("uvicorn.error")
    server.addHandler(caplog.handler)
    try:
        with httpx.Client() as client:
            for path, status in {"/metrics": 200, "/v1/models": 200, "/v1/tasks": 200, "/v1/completions": 405}.items():
                reply = client.head(url + path)
                assert (reply.status_code, reply.content) == (status, b"")
                assert int(reply.headers["content-length"]) > 0
    finally:
        server.removeHandler(caplog.handler)
    assert not caplog.records
    assert 'route="/v1/models",status="200"' in service.metrics.text().decode()


def test_classification_is_as_it_was(url, model):
    reply = httpx.post(f"{url}/v1/classify", json={"rows": [{"task": "flim", "text": "x"}]})
    assert reply.status_code == 404 and "did you mean 'film'" in reply.json()["error"]
    reply = httpx.post(f"{url}/v1/classify", json={"rows": [{"task": "film", "text": "good film"}]}, timeout=60)
    (expected,) = model.classify(["good film"], ["film"])
    assert reply.json()["rows"][0]["log_likelihoods"] == pytest.approx(expected)
