"""A bank's tasks for servers that hold the model themselves: the model is held against the record, rows are encoded."""

import json

import pytest

from pipeline.bank import PromptBank, Template
from pipeline.cli.models import identity_of
from pipeline.errors import BankError, CorpusError, MissingFileError, RowTooLongError, UnknownTaskError
from pipeline.serving.bank_tasks import BankTasks, message_row, prompt_rows, public_sentence, read_model_text, refusal
from tests.serving.prompts import new_prompt
from tests.tiny import make_model

PAIR = Template(input="{one} and {two} it is", target="{label}", separator=" ")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def publish(place, model, weights="int8"):
    bank = PromptBank.open(place, create=True)
    pair = new_prompt("pair", 5, like="film")
    pair = type(pair)(**{**vars(pair), "template": PAIR})
    bank.publish([new_prompt("film", 3), pair], identity_of(str(model), weights, None), "test", {}, "latest")
    return bank


@pytest.fixture
def tasks(model, tmp_path):
    bank = publish(tmp_path / "bank", model)
    return BankTasks(bank, read_model_text(str(model), bank), longest=40)


@pytest.mark.parametrize("weights", ["int8", "full"])
def test_the_stored_weights_are_held_against_the_record_however_the_bank_holds_them(model, tmp_path, weights):
    bank = publish(tmp_path / "bank", model, weights)
    assert read_model_text(str(model), bank).identity == bank.current.backbone


def test_another_model_is_refused_with_what_differs(tmp_path, model):
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(BankError, match="they differ in weights"):
        read_model_text(str(other), publish(tmp_path / "bank", model))


def test_a_folder_that_is_stated_to_be_the_banks_model_is_taken(tmp_path, model):
    other, bank = make_model(tmp_path / "other", seed=1), publish(tmp_path / "bank", model)
    found = identity_of(str(other), "int8", None)
    bank.state_same_backbone(bank.current.backbone, found, rows=1, largest_difference=0.0, by="test")
    tasks = BankTasks(bank, read_model_text(str(other), bank), longest=40)
    assert tasks.prompt("film").version == 1


def test_a_row_is_a_text_or_a_json_object_of_its_columns(tasks):
    tokenizer = tasks.model.tokenizer
    (film,) = tasks.encode(tasks.prompt("film"), ['{"one": "good"}'], 4)
    assert film.input_ids.tolist() == tokenizer('{"one": "good"}').input_ids
    rows = [json.dumps({"one": "good", "two": "bad", "more": 1}), json.dumps({"one": 1, "two": "bad"})]
    pair = tasks.encode(tasks.prompt("pair@1"), rows, 4)
    assert [row.input_ids.tolist() for row in pair] == [
        tokenizer(f"{one} and bad it is").input_ids for one in ("good", "1")
    ]
    assert pair[0].length == 5 + 5 and pair[0].end == tokenizer.eos_token_id


@pytest.mark.parametrize("row", ["good and bad", "[1]", '"good"', '{"one": "good"}'])
def test_a_row_without_its_columns_is_refused_with_what_to_send(tasks, row):
    with pytest.raises(CorpusError, match=r'send it as a JSON object, {"one": "…", "two": "…"}|the column\(s\) two'):
        tasks.encode(tasks.prompt("pair"), [row], 4)


@pytest.mark.parametrize(
    "value", [None, [], ["good"], {}, {"a": 1}, float("nan"), float("inf"), float("-inf")], ids=repr
)
@pytest.mark.parametrize("column", ["one", "unused"])
def test_a_column_is_a_text_a_finite_number_or_a_boolean(tasks, column, value):
    row = json.dumps({"one": "good", "two": "bad", column: value})
    with pytest.raises(CorpusError, match=f"task 'pair': the column '{column}' must be a text, a finite number or a b"):
        tasks.encode(tasks.prompt("pair"), [row], 4)


@pytest.mark.parametrize("value", ["good", "", 7, -1.5, True])
def test_columns_of_every_plain_type_are_taken(tasks, value):
    (row,) = tasks.encode(tasks.prompt("pair"), [json.dumps({"one": value, "two": "bad"})], 4)
    assert row.input_ids.tolist() == tasks.model.tokenizer(f"{value} and bad it is").input_ids


@pytest.mark.parametrize("row", ["[" * 100_000, '{"one":' * 100_000])
def test_json_nested_without_end_is_a_row_that_does_not_fit(tasks, row):
    with pytest.raises(CorpusError, match="send it as a JSON object"):
        tasks.encode(tasks.prompt("pair"), [row], 4)


@pytest.mark.parametrize("prompt", [{"a": 1}, {}, 7, 0, True, None], ids=repr)
def test_a_prompt_is_a_text_or_a_list(prompt):
    with pytest.raises(CorpusError, match="'prompt' must be a text or a list of texts"):
        prompt_rows(prompt)


@pytest.mark.parametrize(
    "part", [{"type": "image_url", "text": "good"}, {"text": "good"}, {"type": "text"}, "good", ""]
)
def test_a_part_of_a_message_that_is_not_of_the_type_text_is_refused(part):
    whole = {"type": "text", "text": "good"}
    assert message_row([{"role": "user", "content": [whole, whole]}]) == "goodgood"
    with pytest.raises(CorpusError, match="takes one message of the role 'user' with a row's text"):
        message_row([{"role": "user", "content": [whole, part]}])


def test_a_row_that_does_not_fit_the_context_with_its_answer_is_refused(tasks):
    with pytest.raises(RowTooLongError, match="may be 41 tokens where 40 fit"):
        tasks.encode(tasks.prompt("film"), ["good film"], 36)


@pytest.mark.parametrize("task", ["flim", "film@2", "film@prod", "no name", "film@0"])
def test_what_the_bank_does_not_have_is_told_without_its_address(tasks, task):
    with pytest.raises(UnknownTaskError) as caught:
        tasks.prompt(task)
    assert tasks.bank.uri not in str(caught.value)


@pytest.mark.parametrize(("lost", "task"), [("blobs/*/*.safetensors", "film"), ("versions/2.json", "film@prod")])
def test_a_lost_file_of_a_task_that_the_bank_has_is_a_failure_of_the_bank(tasks, model, tmp_path, lost, task):
    publish(tmp_path / "bank", model).promote(2, "prod", "test")
    for file in (tmp_path / "bank").glob(lost):
        file.unlink()
    with pytest.raises(MissingFileError, match=r"^(blobs|versions)/.* is missing$") as caught:
        tasks.prompt(task)
    assert refusal(caught.value).status == 503


@pytest.mark.parametrize("place", ["/data/prompts/bank", "some/bank", "bank", "prompts", "s"])
def test_a_sentence_has_no_address_of_the_bank_and_keeps_its_words(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank = PromptBank.connect(tmp_path / place[1:] if place[0] == "/" else place, create=True)
    uri = bank.uri
    for told, public in {
        f"there is no prompt bank at {uri}: publish to it first": "there is no prompt bank: publish to it first",
        f"the bank {uri} has no alias 'x'; known: latest": "the bank has no alias 'x'; known: latest",
        f"{uri}/versions/7.json is missing": "versions/7.json is missing",
        f"cannot read {uri}: it is full": "cannot read the bank: it is full",
        f"cannot list {uri}/versions: it is full": "cannot list versions: it is full",
        f"the cached alias 'x' of {uri} is damaged": "the cached alias 'x' of the bank is damaged",
    }.items():
        assert public_sentence(told, bank) == public
        assert public_sentence(public, bank) == public


def test_a_bank_that_is_gone_is_told_without_its_address(tasks, tmp_path):
    for version in (tmp_path / "bank/versions").iterdir():
        version.unlink()
    with pytest.raises(BankError, match=r"^there is no prompt bank: publish to it first, or fix the path$") as caught:
        tasks.prompt("film@prod")
    assert refusal(caught.value).status == 503


def test_a_damaged_prompt_is_told_without_the_banks_address(tasks, tmp_path):
    for blob in (tmp_path / "bank/blobs").rglob("*.safetensors"):
        blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    with pytest.raises(BankError) as caught:
        tasks.prompt("film")
    assert tasks.bank.uri not in str(caught.value)
