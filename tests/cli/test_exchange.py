"""`export` and `import` carry prompts to other tools and back, bit by bit, and to a model that is named."""

import json

import numpy as np
import pytest

from pipeline.bank import PromptBank, Template
from tests.bank.conftest import make_backbone, make_prompt
from tests.tiny import make_model

TEMPLATES = ("--input", "{text}\n“quoted” \\ {x}", "--target", "{label}")


@pytest.mark.parametrize(("form", "place"), [("peft", "adapter"), ("npy", "sst2.npy")])
def test_what_is_exported_and_imported_again_is_the_same_array_bit_by_bit(run, document, uri, tmp_path, form, place):
    code, stdout, _ = run("export", "sst2@2", tmp_path / place, "--to", form)
    assert (code, stdout) == (0, f"wrote 'sst2' of version 2 to {tmp_path / place}\n")
    found = document(
        "import", "back", tmp_path / place, "--from", form, *TEMPLATES, "--backbone-of", "latest",
        "--label", "negative", "--label", "positive",
        "--label-score", "mean", "--label-offset", "-0.25", "--label-offset", "-1.5",
    )  # fmt: skip
    assert list(found) == ["bank", "prompt", "shape", "version", "alias", "backbone"]
    assert (found["prompt"], found["shape"], found["version"], found["alias"]) == ("back", [4, 8], 4, "latest")
    bank = PromptBank.open(uri)
    there, back = bank.load("sst2@2"), bank.load("back")
    assert back.array.tobytes() == there.array.tobytes() and back.record.digest == there.record.digest
    assert back.record.template == there.record.template and back.record.labels == ("negative", "positive")
    assert (back.record.label_score, back.record.label_offsets) == ("mean", (-0.25, -1.5))
    assert (back.record.metric, back.record.task) == ("accuracy", "back")
    assert back.record.initialisation == f"imported from {form} {place}"
    manifest = bank.manifest(4)
    assert (manifest.run, sorted(manifest.libraries)) == ("import", ["numpy", "safetensors"])
    assert set(manifest.prompts) == {"back", "cr", "sst2", "trec"}


def test_export_names_the_base_model_in_a_peft_adapter(document, tmp_path):
    document("export", "sst2", tmp_path / "a", "--to", "peft", "--model", "org/model")
    document("export", "sst2", tmp_path / "b", "--to", "peft")
    names = [json.loads((tmp_path / x / "adapter_config.json").read_text())["base_model_name_or_path"] for x in "ab"]
    assert names == ["org/model", "another name for it"]


def test_export_for_vllm_writes_the_script(document, tmp_path):
    found = document("export", "sst2", tmp_path / "v", "--to", "vllm", "--block-size", 4)
    assert found == {"prompt": "sst2", "version": 3, "format": "vllm", "path": str(tmp_path / "v")}
    assert (tmp_path / "v/ask_vllm.py").exists()


def test_export_overwrites_nothing(run, refusal, tmp_path):
    run("export", "sst2", tmp_path / "x.npy", "--to", "npy")
    assert "is there already, and nothing is overwritten" in refusal("export", "cr", tmp_path / "x.npy", "--to", "npy")


def test_a_model_at_hand_makes_a_new_bank_that_belongs_to_it(run, document, refusal, tmp_path):
    from pipeline.cli.models import identity_of

    model = make_model(tmp_path / "model")
    np.save(tmp_path / "p.npy", np.ones((3, 32), np.float32))
    words = ("import", "p", tmp_path / "p.npy", "--from", "npy", "--input", "{q}", "--target", "{a}", "--model", model)
    new = tmp_path / "new"
    assert "there is no prompt bank at" in refusal(*words, bank=new)
    found = document(*words, "--weights", "full", "--create", bank=new)
    assert found["version"] == 1 and found["backbone"]["quantization"] == "none"
    assert found["backbone"] == identity_of(str(model), "full", None).model_dump(mode="json")
    record = PromptBank.open(new).load("p").record
    assert (record.metric, record.labels) == ("exact_match", None)
    assert record.template == Template(input="{q}", target="{a}", separator=" ")
    assert document(*words, bank=new)["backbone"] == found["backbone"], "held as the bank's own"
    assert "they differ in weights, quantization" not in refusal(*words, "--weights", "int8", bank=new)
    assert "they differ in quantization" in refusal(*words, "--weights", "int8", bank=new)


def test_an_import_may_go_to_an_alias_that_was_never_set(document, uri, tmp_path):
    np.save(tmp_path / "p.npy", make_prompt().array)
    document("import", "p", tmp_path / "p.npy", "--from", "npy", *TEMPLATES, "--backbone-of", 1, "--alias", "staging")
    assert PromptBank.open(uri).aliases() == {"latest": 3, "prod": 1, "staging": 4}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--backbone-of": None}, "name the model that the prompt was made on: --model MODEL, or --backbone-of latest"),
        ({"--model": "x"}, "name the model that the prompt was made on"),
        ({"--backbone-of": "9"}, "has no version 9"),
        ({"--input": "no column"}, '--input "no column": name at least one column'),
        ({"--input": "{text"}, '--input "{text": name at least one column'),
        ({"--target": "{}"}, '--target "{}": name at least one column'),
        ({"--target": "{x.y}"}, "name at least one column, in braces such as {text}, and write {{ and }} for braces"),
        ({"--target": "{x!r}"}, "name at least one column"),
        ({"--label-offset": "0.5"}, "1 --label-offset for 0 --label: give one for each"),
        ({"--metric": "f1"}, "--metric f1 needs the answers to choose from: add --label for each"),
        ({"--metric": "bleu"}, "invalid value for '--metric': 'bleu' is not one of 'accuracy', "),
        ({"--weights": "int8"}, "--weights belongs to --model: leave it out"),
        ({"--half": "encoder"}, "--half belongs to --from peft: leave it out"),
        ({"--from": "peft"}, "adapter_config.json is missing; fix the path"),
        ({"--input": None}, "missing option '--input' (see promptbank import --help)"),
    ],
)
def test_an_import_that_says_too_little_or_wrong_is_refused_and_publishes_nothing(
    refusal, uri, tmp_path, changes, sentence
):
    np.save(tmp_path / "p.npy", make_prompt().array)
    options = {"--from": "npy", "--input": "{text}", "--target": "{label}", "--backbone-of": "latest", **changes}
    words = [word for option, value in options.items() if value is not None for word in (option, value)]
    assert sentence in refusal("import", "p", tmp_path / "p.npy", *words)
    assert PromptBank.open(uri).versions() == (1, 2, 3)


def test_a_prompt_of_another_width_is_refused(refusal, tmp_path):
    np.save(tmp_path / "p.npy", np.ones((3, 5), np.float32))
    words = ("import", "p", tmp_path / "p.npy", "--from", "npy", *TEMPLATES, "--backbone-of", "latest")
    assert "prompt 'p' is refused: [3, 5] float32 where [P, 8] float32 is expected" in refusal(*words)


def test_an_array_is_exported_for_no_model(refusal, tmp_path):
    words = ("export", "sst2", tmp_path / "x.npy", "--to", "npy", "--model", "m")
    assert refusal(*words).startswith("--model does not belong to")


@pytest.mark.parametrize(
    ("to", "script"), [("vllm", "ask_vllm"), ("llama-cpp", "ask_llama_cpp"), ("sglang", "ask_sglang")]
)
def test_a_script_asks_for_the_model_unless_the_export_names_it(run, tmp_path, to, script):
    for name, given in (("a", []), ("b", ["--model", "org/model"])):
        assert run("export", "sst2", tmp_path / name, "--to", to, *given)[0] == 0
    lines = [(tmp_path / name / f"{script}.py").read_text().splitlines() for name in "ab"]
    known = "None" if to == "llama-cpp" else "'another name for it'"
    assert f"MODEL = {known}" in lines[0] and "MODEL = 'org/model'" in lines[1]


@pytest.mark.parametrize(("block", "warned"), [(32, True), (3, True), (4, False), (2, False)])
def test_an_export_for_vllm_warns_of_a_length_that_is_not_a_multiple_of_the_block(run, tmp_path, block, warned):
    code, _, stderr = run("export", "sst2", tmp_path / "v", "--to", "vllm", "--block-size", block)
    assert code == 0 and ("warning: vLLM shares whole blocks of a prompt between rows" in stderr) == warned
    assert not warned or f"a multiple of {block} is shared whole" in stderr


def test_signed_imports_are_told_by_log_and_verified_with_the_public_key(document, refusal, run, tmp_path, monkeypatch):
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    public = key.public_key()
    private_pem = key.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption())
    (tmp_path / "bank.key").write_bytes(private_pem)
    pem = public.public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "bank.pub").write_bytes(pem)
    np.save(tmp_path / "p.npy", np.ones((3, 32), np.float32))
    model, new = make_model(tmp_path / "model"), tmp_path / "signed"
    words = ("import", "p", tmp_path / "p.npy", "--from", "npy", "--input", "{q}", "--target", "{a}", "--model", model)
    document(*words, "--create", "--signing-key", tmp_path / "bank.key", bank=new)
    assert document("log", bank=new)["versions"][0]["signed_by"] == public.public_bytes_raw().hex()
    assert public.public_bytes_raw().hex()[:12] in run("log", bank=new)[1]
    checked = document("verify", "--trusted-key", tmp_path / "bank.pub", bank=new)
    assert (checked["problems"], checked["signatures_checked"]) == ([], True)
    document(*words, bank=new)  # unsigned
    monkeypatch.setenv("PROMPT_BANK_TRUSTED_KEYS", f"{tmp_path / 'bank.pub'}:{tmp_path / 'bank.pub'}")
    assert "versions/2.json is refused: it is not signed" in refusal("ls", bank=new)
    unsigned, signed = document("log", bank=new, code=1)["versions"]
    assert "it is not signed" in unsigned["problem"] and signed["problem"] is None
    assert "it is not signed" in document("verify", bank=new, code=1)["problems"][0]
    assert make_backbone().fingerprint != document("show", "p@1", bank=new)["backbone"]["fingerprint"]
