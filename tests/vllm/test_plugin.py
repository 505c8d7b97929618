"""The plugin in vLLM's real server: a bank's tasks beside the model, each with the answers of `PromptedModel`."""

import base64
import io
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient

from pipeline.backbone import prompted
from pipeline.bank import PromptBank, Template
from pipeline.serving.api import make_api
from tests.serving.local_service import LocalService
from tests.vllm import server
from tests.word_prompts import EVERY_ROW, INSTRUCTIONS, MOST, ROWS, TURN, columns_of, new_prompt

pytestmark = server.MARKS


@pytest.fixture(scope="module")
def vllm(tuned, tmp_path_factory):
    with server.serving(tuned.folder, tuned.uri, tmp_path_factory.mktemp("vllm") / "log") as client:
        yield client


def complete(client, **body):
    reply = client.post("/v1/completions", json={"max_tokens": MOST, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()


def text_of(client, task, row, **more):
    return complete(client, model=task, prompt=row, **more)["choices"][0]["text"].strip()


def refusal(client, path="completions", **body):
    reply = client.post(f"/v1/{path}", json=body)
    return reply.status_code, reply.json()["error"]["message"]


@pytest.fixture(scope="module")
def expected(tuned):
    return [tuned.answer(task, row) for task, row in EVERY_ROW]


def test_rows_of_many_tasks_in_one_batch_get_the_answers_of_the_prompted_model(vllm, expected):
    assert sum(answer.strip() != "" for answer in expected) == len(expected) and len(set(expected)) > 12
    with ThreadPoolExecutor(len(EVERY_ROW)) as pool:
        answers = list(pool.map(lambda row: text_of(vllm, *row), EVERY_ROW))
        again = list(pool.map(lambda row: text_of(vllm, *row), reversed(EVERY_ROW)))
    assert answers == expected
    assert again == expected[::-1], "what vLLM has cached is another prompt's"


def test_an_answer_has_the_likelihood_of_the_prompted_model_with_the_token_that_ends_it(vllm, tuned):
    ended = 0
    for task, row in EVERY_ROW[::4]:
        (choice,) = complete(vllm, model=task, prompt=row, logprobs=0, return_token_ids=True)["choices"]
        prompt = tuned.model.bank.load(task)
        columns = columns_of(row) if task == "pair" else {"text": row}
        ids = tuned.model.backbone.tokenizer(prompt.record.template.input.format(**columns)).input_ids
        rows = prompted.Rows([torch.tensor(prompt.array)], [0], [np.array(ids)])
        target = np.array(choice["token_ids"])
        ((own,),) = tuned.model.backbone.backbone.run(prompted.label_log_likelihoods, rows, [[target]])
        assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(float(own), abs=1e-3)
        ended += target[-1] == tuned.model.backbone.tokenizer.eos_token_id
    assert ended, "no answer ended, so that its last token was never compared"


def test_a_stream_a_list_of_rows_and_a_chat_have_the_answers_of_single_rows(vllm, expected):
    rows = ROWS["capital"]
    listed = complete(vllm, model="capital", prompt=rows)["choices"]
    assert [choice["text"].strip() for choice in listed] == expected[: len(rows)]
    assert [choice["index"] for choice in listed] == list(range(len(rows)))
    for path, asked, told in (
        ("completions", {"prompt": "Italy"}, lambda choice: choice["text"]),
        ("chat/completions", {"messages": [{"role": "user", "content": "Italy"}]}, lambda c: c["delta"].get("content")),
    ):
        body = {"model": "capital", "max_tokens": MOST, "stream": True, **asked}
        with vllm.stream("POST", f"/v1/{path}", json=body) as stream:
            lines = [line.removeprefix("data: ") for line in stream.iter_lines() if line]
        assert lines[-1] == "[DONE]" and len(lines) > 2
        chunks = [json.loads(line) for line in lines[:-1]]
        assert {chunk["model"] for chunk in chunks} == {"capital@1"}
        assert "".join(told(chunk["choices"][0]) or "" for chunk in chunks).strip() == expected[1]


def test_a_chat_has_the_answer_of_its_one_message_and_of_a_prompt_that_was_tuned_on_chats(vllm, tuned, expected):
    for task, text, answer in (
        ("capital", "France", expected[0]),
        ("pair", ROWS["pair"][0], expected[16]),
        ("shout", "good morning", tuned.answer("shout", "good morning")),
    ):
        for content in (text, [{"type": "text", "text": text}]):
            body = {"model": task, "max_tokens": MOST, "messages": [{"role": "user", "content": content}]}
            reply = vllm.post("/v1/chat/completions", json=body).json()
            assert reply["model"] == f"{task}@1"
            assert reply["choices"][0]["message"]["content"].strip() == answer


def test_n_answers_are_drawn_for_every_row(vllm):
    drawn = complete(vllm, model="opposite", prompt=["hot", "up"], n=3, temperature=1.5, seed=1)["choices"]
    assert [choice["index"] for choice in drawn] == list(range(6))
    assert len({choice["text"] for choice in drawn}) > 2


def test_tasks_stand_beside_the_base_model_which_answers_as_ever(vllm, tuned):
    from transformers import AutoModelForCausalLM

    models = {model["id"]: model["parent"] for model in vllm.get("/v1/models").json()["data"]}
    assert models["base"] is None and {name: models[name] for name in (*INSTRUCTIONS, "shout")} == dict.fromkeys(
        (*INSTRUCTIONS, "shout"), "base"
    )
    plain = AutoModelForCausalLM.from_pretrained(tuned.folder, dtype=torch.float32).eval()
    tokenizer = tuned.model.backbone.tokenizer
    asked = tokenizer("The capital of France is", return_tensors="pt")
    out = plain.generate(**asked, do_sample=False, max_new_tokens=8)[0, asked.input_ids.shape[1] :]
    reply = complete(vllm, model="base", prompt="The capital of France is", temperature=0, max_tokens=8)
    assert reply["choices"][0]["text"] == tokenizer.decode(out) and reply["model"] == "base"


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ("capitol", "versions/1.json holds no prompt 'capitol'; did you mean 'capital'?"),
        ("capital@7", "versions/7.json is missing"),
        ("capital@canary", "the bank has no alias 'canary'; known: latest"),
        ("a b", "the prompt name 'a b' is refused"),
    ],
)
def test_a_task_version_or_alias_that_is_not_there_is_404_with_a_sentence(vllm, task, sentence):
    for path, asked in (
        ("completions", {"prompt": "x"}),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ):
        code, message = refusal(vllm, path, model=task, **asked)
        assert code == 404 and sentence in message and "\n" not in message


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"prompt": [1, 2]}, "takes texts and not token ids"),
        ({"prompt": "x", "echo": True}, "'echo' cannot be had for a task of the prompt bank"),
        ({"prompt": "x", "max_tokens": 600}, f"where {server.LONGEST} fit; shorten the text"),
        ({"prompt": "Italy", "model": "pair"}, 'send it as a JSON object, {"one": "…", "other": "…"}'),
        ({"prompt": '{"one": "a cat"}', "model": "pair"}, "needs the column(s) other"),
    ],
)
def test_a_row_that_does_not_fit_its_task_is_400_with_a_sentence(vllm, asked, sentence):
    code, message = refusal(vllm, **{"model": "capital", **asked})
    assert code == 400 and sentence in message


def test_a_chat_of_more_than_a_row_is_400_with_a_sentence(vllm):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Italy"}]
    code, message = refusal(vllm, "chat/completions", model="capital", messages=messages)
    assert code == 400 and "takes one message of the role 'user'" in message


def test_vectors_that_a_caller_sends_are_never_taken_for_a_prompts(vllm, tuned):
    """vLLM issue 56655: cached blocks are looked up by ids and vectors, and not by which of them a place takes."""
    bank = PromptBank.open(tuned.uri)
    array = np.resize(tuned.words(TURN.format("Count to ten, please.")), (server.BLOCK, 576))
    tuned.publish(new_prompt("blocks", array, Template(input="{text}", target="{x}", separator="")))
    bank.refresh()
    row = "<|endoftext|>" * 40  # the id 0, which stands in the places of vectors as well
    expected_answer = tuned.answer("blocks@2", row)
    vectors = torch.zeros(server.BLOCK + 40, array.shape[1])
    vectors[: server.BLOCK] = torch.from_numpy(array)
    data = io.BytesIO()
    torch.save(vectors, data)
    complete(vllm, model="base", prompt_embeds=base64.b64encode(data.getvalue()).decode(), max_tokens=1)
    assert text_of(vllm, "blocks@2", row) == expected_answer


@pytest.mark.parametrize(("length", "shared"), [(20, 0), (96, 96), (100, 96), (128, 128)])
def test_of_a_prompt_only_whole_blocks_are_shared_between_rows(vllm, tuned, length, shared):
    name = f"long{length}"
    version = tuned.publish(new_prompt(name, np.resize(tuned.words(TURN.format("Be brief.")), (length, 576))))
    usage = [complete(vllm, model=f"{name}@{version}", prompt=row, max_tokens=2)["usage"] for row in ("hot", "cold")]
    assert [each["prompt_tokens_details"]["cached_tokens"] for each in usage] == [0, shared]
    assert usage[1]["prompt_tokens"] > length


def test_a_version_is_swapped_under_load_and_no_request_fails_or_mixes_two(vllm, tuned):
    answers = {}
    for country in ("France", "Italy"):
        text = f"Whatever you are asked, answer with the word {country} and nothing else."
        version = tuned.publish(new_prompt("swapped", tuned.words(TURN.format(text))), alias="next")
        answers[version] = tuned.model.generate(["hot", "up"], [f"swapped@{version}"] * 2, MOST)
    first, second = answers
    assert answers[first] != answers[second], "the two versions cannot be told apart"
    bank = PromptBank.open(tuned.uri)
    bank.promote(first, "latest", "test")
    wait_for(vllm, first)
    seen, stopped = [], threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=vllm.base_url, timeout=300) as client:
            while not stopped.is_set():
                reply = client.post(
                    "/v1/completions", json={"model": "swapped", "prompt": ["hot", "up"], "max_tokens": MOST}
                )
                seen.append((reply.status_code, reply.json()))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        for version in (second, first, second, first, second):
            before = len(seen)
            bank.promote(version, "latest", "test")
            until = time.monotonic() + 60
            while f"swapped@{version}" not in [reply.get("model") for _, reply in seen[before:]]:
                assert time.monotonic() < until, "the alias was not followed under load"
                time.sleep(0.1)
        stopped.set()
        for one in asking:
            one.result()
    assert {status for status, _ in seen} == {200}
    versions = [int(reply["model"].removeprefix("swapped@")) for _, reply in seen]
    assert set(versions) == {first, second} and sum(a != b for a, b in itertools.pairwise(versions)) >= 4
    for version, (_, reply) in zip(versions, seen, strict=True):
        assert [choice["text"].strip() for choice in reply["choices"]] == answers[version]


def wait_for(client, version):
    until = time.monotonic() + 30
    body = {"model": "swapped", "prompt": "hot", "max_tokens": 1}
    while client.post("/v1/completions", json=body).json().get("model") != f"swapped@{version}":
        assert time.monotonic() < until, "the alias was not followed"
        time.sleep(0.2)


def test_a_bank_of_another_model_ends_the_server_before_it_listens(tuned, tmp_path):
    other = tuned.model.backbone.identity.model_copy(update={"fingerprint": "0" * 64, "weights": "0" * 64})
    bank = PromptBank.open(tmp_path / "bank", create=True)
    bank.publish([new_prompt("capital", tuned.words("Paris"))], other, "test", {}, "latest")
    log = tmp_path / "log"
    process = server.start(tuned.folder, tmp_path / "bank", log, 1)
    assert process.wait(900) != 0
    assert "belongs to another backbone" in log.read_text() or "differ in" in log.read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--load-format", "dummy"), "--load-format dummy: vLLM would run another model than the one that is held"),
        (("--hf-overrides", '{"rope_theta": 5000}'), "--hf-overrides {'rope_theta': 5000"),
        (("--served-model-name", "capital"), "the model that vLLM serves as 'capital' would answer in place of"),
    ],
)
def test_a_flag_that_makes_it_another_model_or_hides_a_task_ends_the_server(tuned, tmp_path, flags, sentence):
    log = tmp_path / "log"
    assert server.start(tuned.folder, tuned.uri, log, 1, *flags).wait(900) != 0
    assert sentence in log.read_text()


@pytest.mark.parametrize("task", ["capital", "pair", "shout"])
def test_our_own_service_gives_openais_client_the_same_replies(vllm, tuned, task):
    """So that a client changes nothing when it moves between the two."""
    row = ROWS["pair"][0] if task == "pair" else "Italy"
    own = TestClient(make_api(LocalService(tuned.model)))
    asked = [
        ("completions", {"prompt": [row, row], "max_tokens": MOST}),
        ("completions", {"prompt": row, "max_tokens": 2}),
        ("completions", {"prompt": row, "max_tokens": MOST, "stop": ["e", "o"]}),
        ("completions", {"prompt": row}),
        ("chat/completions", {"messages": [{"role": "user", "content": row}], "max_completion_tokens": MOST}),
        ("completions", {"prompt": row, "model": f"{task}@7"}),
        ("completions", {"prompt": row, "model": "capitol"}),
        ("completions", {"prompt": [1, 2]}),
        ("completions", {"prompt": row, "echo": True}),
        ("chat/completions", {"messages": []}),
    ]
    for path, body in asked:
        replies = [client.post(f"/v1/{path}", json={"model": task, **body}) for client in (vllm, own)]
        assert replies[0].status_code == replies[1].status_code, (body, replies[0].text, replies[1].text)
        assert what_counts(replies[0].json()) == what_counts(replies[1].json()), body


def what_counts(reply):
    """What a client reads of a reply, and not what is of the moment or of vLLM alone."""
    if "error" in reply:
        return reply["error"]
    choices = [
        (choice["index"], choice.get("text"), (choice.get("message") or {}).get("content"), choice["finish_reason"])
        for choice in reply["choices"]
    ]
    counted = [reply["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    return reply["object"], reply["model"], choices, counted
