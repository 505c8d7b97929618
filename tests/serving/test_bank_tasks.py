"""A bank's tasks for servers that hold the model themselves: the model is held against the record, rows are encoded."""

import json

import pytest

from pipeline.bank import PromptBank, Template
from pipeline.cli.models import identity_of
from pipeline.errors import BankError, CorpusError, RowTooLongError, UnknownTaskError
from pipeline.serving.bank_tasks import BankTasks, read_model_text
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


def test_a_row_that_does_not_fit_the_context_with_its_answer_is_refused(tasks):
    with pytest.raises(RowTooLongError, match="may be 41 tokens where 40 fit"):
        tasks.encode(tasks.prompt("film"), ["good film"], 36)


@pytest.mark.parametrize("task", ["flim", "film@2", "film@prod", "no name", "film@0"])
def test_what_the_bank_does_not_have_is_told_without_its_address(tasks, task):
    with pytest.raises(UnknownTaskError) as caught:
        tasks.prompt(task)
    assert tasks.bank.uri not in str(caught.value)


def test_a_damaged_prompt_is_told_without_the_banks_address(tasks, tmp_path):
    for blob in (tmp_path / "bank/blobs").rglob("*.safetensors"):
        blob.write_bytes(blob.read_bytes()[:-1] + b"\0")
    with pytest.raises(BankError) as caught:
        tasks.prompt("film")
    assert tasks.bank.uri not in str(caught.value)
