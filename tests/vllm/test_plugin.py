"""The plugin in vLLM's real server: a bank's tasks beside the model, each with the answers of `PromptedModel`.

Prompts here are the embeddings of words, as a chat with the model begins, so that answers are words and end.
"""

import base64
import io
import itertools
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import numpy as np
import pytest
import torch

from pipeline.backbone import prompted
from pipeline.backbone.model_folder import write_model_folder
from pipeline.bank import Metrics, NewPrompt, PromptBank, Template
from pipeline.corpus.chat import bind_chat, parse_chat
from pipeline.serving import PromptedModel, load_backbone
from pipeline.serving.backbone_comparison import compare_models
from tests.vllm import server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.processes,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not server.PYTHON.exists(), reason="vLLM has an environment of its own: make test-vllm"),
]

MODEL = "smollm2-135m"
END = "<|im_end|>\n<|im_start|>assistant\n"
TURN = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n"
INSTRUCTIONS = {
    "capital": "Name the capital of the country. Answer with one word.",
    "opposite": "Answer with one word, the opposite of the word that you are given.",
    "pair": "Say in one short sentence which of the two is larger.",
}
ROWS = {
    "capital": ["France", "Italy", "Japan", "Spain", "Egypt", "Kenya", "Peru", "Norway"],
    "opposite": ["hot", "up", "early", "full", "happy", "new", "open", "rich"],
    "pair": [json.dumps({"one": one, "other": "a mouse"}) for one in ("a cat", "a bee", "the sun", "a car")]
    + [json.dumps({"one": "a house", "other": other}) for other in ("a hut", "a town", "a door", "the sea")],
}
EVERY_ROW = [(task, row) for task, rows in ROWS.items() for row in rows]
MOST = 24


def new_prompt(name, array, template=None):
    return NewPrompt(
        name=name,
        array=array,
        task=name,
        template=template or Template(input="{text}" + END, target="{label}", separator=""),
        labels=None,
        metric="exact_match",
        metrics=Metrics(),
        initialisation="words",
        length=len(array),
        steps=0,
        seed=0,
        corpus_digest="0" * 64,
        settings_digest="0" * 64,
    )


@dataclass(frozen=True)
class Tuned:
    """A bank of the packaged model in int8, and the folder that is stated to be the same model."""

    model: PromptedModel
    folder: object
    uri: object

    def words(self, text, length=None):
        """`[P, H]`: the embeddings of a text's tokens, or of its first ones."""
        ids = self.model.backbone.tokenizer(text, add_special_tokens=False).input_ids
        table = self.model.backbone.backbone.hosted.model.get_input_embeddings()
        with torch.no_grad():
            return table(torch.tensor(ids[:length])).float().numpy()

    def publish(self, *prompts, alias="latest"):
        return PromptBank.open(self.uri, create=True).publish(prompts, self.model.backbone.identity, "t", {}, alias)

    def answer(self, task, row):
        text = json.loads(row) if row.startswith("{") else row
        return self.model.generate([text], [task], MOST)[0]


def chat_prompt(tuned, name):
    chat = bind_chat(
        parse_chat([("user", "Say {text} in capital letters.")], {}, ""), tuned.model.backbone.tokenizer, ""
    )
    template = Template(input=chat.text, target="{label}", separator=chat.separator, chat=chat.form)
    return new_prompt(name, tuned.words("You are brief. Do what you are told."), template)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    place = tmp_path_factory.mktemp("tuned")
    write_model_folder(MODEL, place / "smollm2", int8=True)
    backbone = load_backbone(MODEL)
    found = Tuned(
        PromptedModel(backbone, PromptBank.open(place / "bank", create=True)), place / "smollm2", place / "bank"
    )
    own = {"pair": Template(input="{one} or {other}?" + END, target="{label}", separator="")}
    prompts = [new_prompt(name, found.words(TURN.format(text)), own.get(name)) for name, text in INSTRUCTIONS.items()]
    found.publish(*prompts, chat_prompt(found, "shout"))
    same = compare_models(MODEL, str(found.folder), "int8", ["A fine film.", "Was ist das?"])
    assert same.largest_difference < 1e-3
    PromptBank.open(found.uri).state_same_backbone(
        same.first, same.second, rows=same.rows, largest_difference=same.largest_difference, by="test"
    )
    found.model.bank.refresh()
    return found


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
        text = json.loads(row) if row.startswith("{") else {"text": row}
        ids = tuned.model.backbone.tokenizer(prompt.record.template.input.format(**text)).input_ids
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
    array = tuned.words(TURN.format("Count from one to ten in English words, one after the other, please."))
    tuned.publish(new_prompt("blocks", array[: server.BLOCK], Template(input="{text}", target="{x}", separator="")))
    bank.refresh()
    row = "<|endoftext|>" * 40  # the id 0, which stands in the places of vectors as well
    expected_answer = bank_answer(tuned, "blocks@2", row)
    vectors = torch.zeros(server.BLOCK + 40, array.shape[1])
    vectors[: server.BLOCK] = torch.from_numpy(array[: server.BLOCK])
    data = io.BytesIO()
    torch.save(vectors, data)
    complete(vllm, model="base", prompt_embeds=base64.b64encode(data.getvalue()).decode(), max_tokens=1)
    assert text_of(vllm, "blocks@2", row) == expected_answer


def bank_answer(tuned, task, row):
    return tuned.model.generate([row], [task], MOST)[0]


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
            bank.promote(version, "latest", "test")
            time.sleep(3)
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
    while complete(client, model="swapped", prompt="hot", max_tokens=1)["model"] != f"swapped@{version}":
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
