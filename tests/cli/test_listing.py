"""`ls` and `show` tell what the manifest tells, for people and for programs."""

import re

import numpy as np
import pytest

from pipeline.bank import ChatForm, PromptBank, Template
from tests.bank.conftest import make_backbone, make_prompt, publish
from tests.chats import CHATML, make_chat_model
from tests.tiny import make_model


def test_ls_lists_every_prompt_of_the_aliass_version_in_aligned_columns(run):
    code, stdout, _ = run("ls")
    assert code == 0
    assert [re.split(r" {2,}", line) for line in stdout.splitlines()] == [
        ["name", "status", "tuned in", "length", "metric", "before", "after", "test", "reason", "constant"],
        ["cr", "tuned", "3", "4", "exact_match", "0.500", "0.900", "-", "-", "-"],
        ["sst2", "carried_forward", "2", "4", "accuracy", "0.500", "0.940", "0.910", "-", "-"],
        ["trec", "kept", "1", "4", "accuracy", "0.500", "0.900", "-", "no step was better", "-"],
    ]


def test_ls_json_holds_the_manifests_records(document, uri):
    found = document("ls")
    manifest = PromptBank.open(uri).manifest(3)
    assert list(found) == ["bank", "version", "time", "run", "prompts"]
    assert (found["bank"], found["version"], found["run"]) == (str(uri), 3, "weekly")
    assert found["prompts"] == [record.model_dump(mode="json") for record in manifest.prompts.values()]


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--version", "2"], ["cr", "sst2", "trec"]),
        (["--version", "prod"], ["sst2", "trec"]),
        (["--alias", "prod"], ["sst2", "trec"]),
        (["--version", "2", "--status", "failed"], ["cr"]),
        (["*s*"], ["sst2"]),
        (["nothing"], []),
    ],
)
def test_ls_takes_a_version_an_alias_a_status_or_a_pattern(document, arguments, names):
    assert [record["name"] for record in document("ls", *arguments)["prompts"]] == names


def test_ls_aliases(run, document, uri):
    assert document("ls", "--aliases") == {
        "bank": str(uri),
        "aliases": [{"alias": "latest", "version": 3}, {"alias": "prod", "version": 1}],
    }
    assert run("ls", "--aliases")[1].split() == ["alias", "version", "latest", "3", "prod", "1"]


def test_ls_of_a_large_version_parses_every_record_once_and_frames_none(run, uri, monkeypatch):
    publish(PromptBank.open(uri), *(make_prompt(f"task-{i:04}", i % 7) for i in range(2000)))
    monkeypatch.setattr("pipeline.cli.output.on_terminal", lambda: True)
    monkeypatch.setattr("pipeline.cli.output._write_framed", lambda *table: pytest.fail("rich takes seconds for it"))
    code, stdout, _ = run("ls")
    assert code == 0 and len([line for line in stdout.splitlines() if line.startswith("task-")]) == 2000


def test_show_tells_everything_that_the_manifest_tells(run, document, uri):
    found = document("show", "sst2@2")
    manifest = PromptBank.open(uri).manifest(2)
    assert list(found) == [
        "bank", "version", "time", "run", "aliases", "prompt", "backbone", "libraries", "nearest", "warning",
    ]  # fmt: skip
    assert found["prompt"] == manifest.prompts["sst2"].model_dump(mode="json")
    assert found["backbone"] == manifest.backbone.model_dump(mode="json")
    assert (found["libraries"], found["aliases"], found["nearest"], found["warning"]) == (
        {"numpy": "2"},
        [],
        None,
        None,
    )
    shown = dict(re.split(r" {2,}", line, maxsplit=1) for line in run("show", "sst2@2")[1].splitlines())
    assert shown["dev"] == "0.500 → 0.940" and shown["parent's dev"] == "0.500 → 0.900"
    assert shown["input"] == '"{text}\\n“quoted” \\\\ {x}"' and shown["labels"] == '"no", "yes"'
    assert shown["digest"] == manifest.prompts["sst2"].digest and shown["fingerprint"] == "f" * 64


def test_show_tells_the_messages_of_a_chat_its_template_and_what_ends_an_answer(run, document, tmp_path):
    form = ChatForm(template="c" * 64, options={"enable_thinking": False}, lead="", end="<|im_end|>")
    template = Template(input='[{"role": "user", "content": "{text}"}]', target="{label}", separator="", chat=form)
    publish(PromptBank.open(tmp_path / "chats", create=True), make_prompt("sst2", template=template))
    code, stdout, _ = run("show", "sst2", bank=tmp_path / "chats")
    told = dict(re.split(r" {2,}", line, maxsplit=1) for line in stdout.splitlines())
    assert code == 0 and told["messages"] == template.input
    assert told["chat template"] == "c" * 64 and told["end of an answer"] == '"<|im_end|>"'
    assert told["chat options"] == "enable_thinking false"
    assert "separator" not in told and "before an answer" not in told
    shown = document("show", "sst2", bank=tmp_path / "chats")
    assert shown["prompt"]["template"] == template.model_dump(mode="json")


def test_show_tells_how_a_prompts_labels_are_scored_where_it_is_not_by_sum(run, tmp_path):
    own = make_prompt("own", label_score="mean", label_offsets=(0.25, -1.5))
    publish(PromptBank.open(tmp_path / "scored", create=True), own, make_prompt("plain"))
    told, plain = (run("show", name, bank=tmp_path / "scored")[1] for name in ("own", "plain"))
    assert "mean of a label's tokens" in told and '"negative" 0.250, "positive" -1.500' in told
    assert "label scores" not in plain and "label offsets" not in plain


def test_show_tells_of_a_failed_prompt_why(run, document):
    assert document("show", "cr@2")["prompt"]["reason"] == "column 'label' is missing"
    assert "column 'label' is missing" in run("show", "cr@2")[1]


def test_show_takes_a_bare_name_at_the_alias_and_another_alias_behind_the_at(document):
    versions = [document("show", *words)["version"] for words in (["sst2"], ["sst2", "--alias", "prod"], ["sst2@prod"])]
    assert versions == [3, 1, 1]


def test_what_is_not_there_is_refused_with_what_is(refusal, uri, tmp_path):
    assert refusal("show", "sst3") == f"{uri}/versions/3.json holds no prompt 'sst3'; did you mean 'sst2'?"
    assert refusal("show", "sst2@9") == f"the bank {uri} has no version 9; the newest is 3"
    assert refusal("ls", "--version", "03") == f"the bank {uri} has no version 03; the newest is 3"
    assert refusal("show", "sst2@nix").startswith(f"the bank {uri} has no alias 'nix'; known: latest, prod;")
    assert refusal("show", "sst2@").startswith("the alias name '' is refused")
    assert refusal("ls", "--alias", "nix").startswith(f"the bank {uri} has no alias 'nix'; known: latest, prod;")
    assert refusal("ls", bank=tmp_path / "x") == (
        f"there is no prompt bank at {tmp_path}/x: publish to it first, or fix the path"
    )
    for arguments in (["ls"], ["ls", "--aliases"], ["log"], ["verify"], ["gc"], ["ls", "--version", "1"]):
        assert refusal(*arguments, bank=tmp_path).startswith(f"there is no prompt bank at {tmp_path}: ")


@pytest.fixture
def model(tmp_path):
    return make_model(tmp_path / "model")


@pytest.fixture
def bank_of(model, tmp_path):
    """A bank whose one prompt is made of the model's own embeddings, and belongs to it unless something is changed."""
    from safetensors.numpy import load_file

    from pipeline.cli.models import identity_of

    def make(**changes):
        table = load_file(model / "model.safetensors")["model.embed_tokens.weight"].astype(np.float32)
        backbone = identity_of(str(model), None, None).model_dump()
        prompt = make_prompt("sst2", array=table[[3, 7]], length=2)
        uri = tmp_path / "of-model"
        publish(PromptBank.open(uri, create=True), prompt, **{**backbone, **changes})
        return uri

    return make


def test_show_with_a_model_says_the_prompt_in_its_words(run, document, model, bank_of):
    uri = bank_of()
    code, stdout, stderr = run("show", "sst2", "--model", model, "--nearest", "2", bank=uri)
    assert (code, stderr) == (0, "")
    assert re.search(r"vector +nearest 1 +nearest 2\n +1 +good 1\.00 .*\n +2 +film 1\.00 ", stdout)
    found = document("show", "sst2", "--model", model, bank=uri)
    assert [row[0]["token"] for row in found["nearest"]] == ["good", "film"] and len(found["nearest"][0]) == 5
    assert found["nearest"][0][0]["cosine"] == pytest.approx(1, abs=1e-5) and found["warning"] is None


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_show_warns_in_one_line_of_a_model_that_is_not_the_prompts(run, document, model, bank_of, part):
    uri = bank_of(**{part: "0" * 64, "fingerprint": "1" * 64, "model": "first"})
    code, stdout, stderr = run("show", "sst2", "--model", model, bank=uri)
    assert code == 0 and "good 1.00" in stdout
    assert stderr == f"warning: 'sst2' was tuned on first, and {model} is another model: they differ in {part}\n"
    code, stdout, stderr = run("show", "sst2", "--model", model, "--json", bank=uri)
    assert f"they differ in {part}" in stdout and stderr == ""


def test_show_warns_of_a_model_whose_chat_template_is_not_the_prompts(run, tmp_path):
    from pipeline.cli.models import identity_of

    model = make_chat_model(tmp_path / "chat-model", CHATML)
    form = ChatForm(template="c" * 64, options={}, lead="", end="<|im_end|>")
    template = Template(input='[{"role": "user", "content": "{text}"}]', target="{label}", separator="", chat=form)
    prompt = make_prompt("sst2", array=np.ones((1, 32), np.float32), length=1, template=template)
    uri = tmp_path / "of-chat"
    publish(PromptBank.open(uri, create=True), prompt, **identity_of(str(model), None, None).model_dump())
    told = f"warning: 'sst2' was tuned with another chat template than that of {model}\n"
    assert run("show", "sst2", "--model", model, bank=uri)[2] == told
    (model / "chat_template.jinja").unlink()
    assert run("show", "sst2", "--model", model, bank=uri)[2] == (
        f"warning: 'sst2' was tuned on a chat, and {model} has no chat template\n"
    )


def test_show_refuses_a_model_of_another_width_or_none(refusal, model, tmp_path):
    assert f"does not fit the model {model}" in refusal("show", "sst2", "--model", model)
    assert "no such folder" in refusal("show", "sst2", "--model", tmp_path / "nowhere")


def test_texts_of_a_bank_cannot_steer_a_terminal(run, tmp_path):
    evil = make_prompt("a", array=None, status="failed", reason="\x1b[2J\rgone\x9b", task="\x07\u202e[red]")
    publish(PromptBank.open(tmp_path / "evil", create=True), evil, make_prompt("b"), model="\x1b]0;title\x07")
    for command in (["ls"], ["show", "a"]):
        code, stdout, _ = run(*command, bank=tmp_path / "evil")
        assert code == 0 and "\\x1b[2J\\rgone\\x9b" in stdout
        assert all(sign.isprintable() or sign == "\n" for sign in stdout)


def test_a_backbone_that_is_made_here_is_that_of_the_bank(bank_of, model):
    from pipeline.cli.models import identity_of

    uri = bank_of()
    own = PromptBank.open(uri).manifest(1).backbone
    assert identity_of(str(model), None, own).fingerprint == own.fingerprint != make_backbone().fingerprint
    assert identity_of(str(model), "full", own).fingerprint != own.fingerprint
