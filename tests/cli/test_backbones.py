"""`promptbank same-backbone`: a folder and the GGUF file made from it, compared and stated, or refused by the row."""

import json
import shutil

import pytest

from pipeline.backbone.files import find_model, read_tokenizer
from pipeline.bank import PromptBank
from pipeline.cli.models import identity_of
from pipeline.errors import BackboneError
from pipeline.serving.backbone_comparison import compare_models
from tests.bank.conftest import make_prompt
from tests.gguf_files import open_model, write_gguf
from tests.tiny import make_model


@pytest.fixture
def models(tmp_path):
    """A folder, and a GGUF file of the same weights and tokenizer."""
    folder = make_model(tmp_path / "folder", hidden_size=8, num_attention_heads=2)
    path = write_gguf(tmp_path / "m.gguf", open_model(folder), "llama", pre="llama-bpe")
    read_tokenizer(find_model(str(path))).save_pretrained(folder)
    return folder, path


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "rows.txt"
    file.write_text('AB!" 12\n\n0123 BA 9,8\n')
    return file


@pytest.fixture
def tuned(models, tmp_path):
    bank = PromptBank.open(tmp_path / "tuned", create=True)
    bank.publish([make_prompt()], identity_of(str(models[0]), "int8", None), run="r", libraries={}, alias="latest")
    return bank


def test_a_folder_and_its_gguf_are_stated_the_same_and_prompts_of_one_load_on_the_other(
    models, tuned, text, document, run
):
    folder, path = models
    other = identity_of(str(path), "int8", None)
    assert tuned.current.backbone.differing_parts(other) == ("config", "weights")
    assert not tuned.current.is_of(other)
    stated = document("same-backbone", folder, path, "--text", text, "--by", "alice", bank=tuned.uri)
    assert (stated["seq"], stated["rows"], stated["same"], stated["by"]) == (1, 2, True, "alice")
    assert stated["largest_difference"] < 1e-4
    assert PromptBank.open(tuned.uri).load("sst2", other).version == 1
    code, listed, _ = run("same-backbone", bank=tuned.uri)
    assert code == 0 and str(path) in listed and other.fingerprint[:12] in listed
    assert document("verify", bank=tuned.uri)["statements"] == 1
    document("same-backbone", path, folder, "--text", text, bank=tuned.uri)
    third = other.model_copy(update={"fingerprint": "0" * 64})
    for one in (tuned.current.backbone, other):
        tuned.state_same_backbone(one, third, rows=1, largest_difference=0, by="bob")
    code, told, _ = run("same-backbone", "--take-back", 2, bank=tuned.uri)
    assert code == 0 and "are the same by other statements still" in told
    run("same-backbone", "--take-back", 3, bank=tuned.uri)
    code, told, _ = run("same-backbone", "--take-back", 1, bank=tuned.uri)
    assert code == 0 and "not the same after all" in told
    assert not PromptBank.open(tuned.uri).current.is_of(other)


def test_other_weights_or_another_tokenizer_are_refused_by_the_row_that_shows_it(
    models, tuned, text, tmp_path, refusal
):
    folder, path = models
    other = make_model(tmp_path / "other", seed=1, hidden_size=8, num_attention_heads=2)
    read_tokenizer(find_model(str(path))).save_pretrained(other)
    words = ("same-backbone", other, path, "--text", text)
    assert """the log-likelihood of 'AB!" 12' is""" in refusal(*words, bank=tuned.uri)
    make_model(tmp_path / "words", hidden_size=8, num_attention_heads=2)
    words = ("same-backbone", tmp_path / "words", path, "--text", text)
    assert """they split 'AB!" 12' into""" in refusal(*words, bank=tuned.uri)
    assert "have one fingerprint" in refusal("same-backbone", folder, folder, "--text", text, bank=tuned.uri)
    assert "name two models" in refusal("same-backbone", folder, bank=tuned.uri)
    assert not tuned.same_backbones()


def test_equal_weights_that_begin_or_end_answers_elsewhere_are_refused_by_name(models, tuned, text, tmp_path, refusal):
    folder, path = models
    for name, file, change, sentence in [
        ("eos", "tokenizer_config.json", {"eos_token": "A"}, "(eos_token_id) is"),
        ("context", "config.json", {"max_position_embeddings": 32}, "the context in tokens is"),
    ]:
        other = shutil.copytree(folder, tmp_path / name)
        document = json.loads((other / file).read_text())
        (other / file).write_text(json.dumps({**document, **change}))
        assert sentence in refusal("same-backbone", other, path, "--text", text, bank=tuned.uri)
    assert not tuned.same_backbones()


def test_a_decoder_that_begins_with_another_token_is_refused_by_name(tmp_path):
    one = make_model(tmp_path / "one", "t5")
    other = shutil.copytree(one, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "decoder_start_token_id": 5}))
    rows = ["good bad film", "film good"]
    assert compare_models(str(one), str(one), rows=rows).largest_difference == 0
    with pytest.raises(BackboneError, match=r"decoder_start_token_id\) is 0 of the first and 5"):
        compare_models(str(one), str(other), rows=rows)


def test_a_saved_folder_is_stated_to_be_the_model_that_it_was_made_of(models, tuned, text, document, run, tmp_path):
    _, path = models
    saved = tmp_path / "saved"
    code, told, _ = run("save-model", path, saved, bank=None)
    assert code == 0 and told == f'wrote {path} to {saved}, its weights "int8"\n'
    bank = PromptBank.open(tmp_path / "of_gguf", create=True)
    bank.publish([make_prompt()], identity_of(str(path), "int8", None), run="r", libraries={}, alias="latest")
    assert document("same-backbone", path, saved, "--text", text, bank=bank.uri)["largest_difference"] < 1e-4
    assert PromptBank.open(bank.uri).load("sst2", identity_of(str(saved), "int8", None)).version == 1
    assert "is there already, and nothing is overwritten" in run("save-model", path, saved, bank=None)[2]
