"""The layout on disk is what FORMAT.md and manifest.schema.json say."""

import hashlib
import json
import struct
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from pipeline.bank import ChatForm, PromptBank, Template
from pipeline.bank.blobs import encode_blob
from pipeline.bank.manifest import manifest_schema
from pipeline.corpus.template import parse_template
from pipeline.errors import BankError, CorpusError


def read_by_the_letter(uri: Path, name: str, alias: str) -> list[float]:
    """A reader written from FORMAT.md alone: JSON, SHA-256 and the safetensors layout, nothing of ours."""

    def sealed(path: Path) -> dict:
        first, _, rest = path.read_bytes().partition(b"\n")
        assert first == b'{"digest":"' + hashlib.sha256(rest).hexdigest().encode() + b'",'
        return json.loads(path.read_bytes())

    moves = [path for path in (uri / "aliases" / alias).iterdir() if not path.name.startswith(".")]
    move = sealed(max(moves, key=lambda path: int(path.stem)))
    record = sealed(uri / "versions" / f"{move['version']}.json")["prompts"][name]
    blob = (uri / "blobs/sha256" / f"{record['digest']}.safetensors").read_bytes()
    assert hashlib.sha256(blob).hexdigest() == record["digest"]
    (size,) = struct.unpack("<Q", blob[:8])
    tensor = json.loads(blob[8 : 8 + size])["prompt"]
    assert tensor["dtype"] == "F32" and tensor["shape"] == record["shape"]
    start, end = tensor["data_offsets"]
    return list(struct.unpack(f"<{(end - start) // 4}f", blob[8 + size + start : 8 + size + end]))


def test_a_reader_written_from_the_description_alone_reads_the_bank(bank, uri, new_prompt, publish):
    for value in range(12):  # seq 10 comes after seq 9, not after seq 1
        publish(bank, new_prompt("sst2", value))
    assert read_by_the_letter(uri, "sst2", "latest") == new_prompt("sst2", 11).array.ravel().tolist()


def test_the_manifest_holds_one_prompt_per_line_in_order(bank, uri, new_prompt, publish):
    publish(bank, new_prompt("b"), new_prompt("a"), new_prompt("B"), new_prompt("a.b"), new_prompt("a-b"))
    lines = (uri / "versions/1.json").read_text().split("\n")
    assert lines[1].endswith(',"prompts":{') and lines[-2:] == ["}}", ""]
    names = [json.loads(f"[{line.partition(':')[0]}]")[0] for line in lines[2:-2]]
    assert names == ["B", "a", "a-b", "a.b", "b"] == list(bank.names())


def test_equal_prompts_have_equal_bytes_whoever_writes_them():
    digest, data = encode_blob(np.arange(6, dtype=np.float32).reshape(2, 3))
    assert data[8:].startswith(b'{"prompt":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}')
    assert digest == "015708b020d571f1421dc622bc496f93efa9eed4b269adc18ec315e7cc066a8d"


def test_the_shipped_schema_is_that_of_the_code():
    shipped = files("pipeline.bank").joinpath("manifest.schema.json").read_text()
    assert shipped == manifest_schema(), "write it anew with pipeline.bank.manifest.manifest_schema()"


def test_the_shipped_schema_accepts_written_manifests_and_refuses_others(bank, uri, new_prompt, publish):
    schema = json.loads(files("pipeline.bank").joinpath("manifest.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    publish(bank, new_prompt("sst2"), new_prompt("cr", array=None, status="failed", reason="no rows", labels=None))
    publish(bank, new_prompt("trec"))
    written = [json.loads((uri / f"versions/{n}.json").read_text()) for n in (1, 2)]
    for manifest in written:
        jsonschema.validate(manifest, schema)
    for field in written[0]:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({key: value for key, value in written[0].items() if key != field}, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(
            {**written[0], "prompts": {"sst2": {**written[0]["prompts"]["sst2"], "shape": [4]}}}, schema
        )


CHAT = Template(
    input='[{"role": "user", "content": "Is it good? {text}"}]',
    target="{label}",
    separator="",
    chat=ChatForm(template="c" * 64, options={"enable_thinking": False}, lead="", end="<|im_end|>"),
)


def test_a_chats_record_holds_its_messages_template_and_options_and_other_records_are_as_they_were(
    bank, uri, new_prompt, publish
):
    publish(bank, new_prompt("chat", template=CHAT), new_prompt("sst2"))
    assert PromptBank.open(uri).load("chat").record.template == CHAT
    written = json.loads((uri / "versions/1.json").read_text())
    jsonschema.validate(written, json.loads(files("pipeline.bank").joinpath("manifest.schema.json").read_text()))
    assert set(written["prompts"]["sst2"]["template"]) == {"input", "target", "separator"}
    assert written["prompts"]["chat"]["template"]["chat"] == {
        "end": "<|im_end|>",
        "lead": "",
        "options": {"enable_thinking": False},
        "template": "c" * 64,
    }


def test_a_reader_that_knows_no_chats_finds_no_template_in_the_messages():
    """It lists the prompt, and refuses to fill in the JSON as if it were one text."""
    with pytest.raises(CorpusError, match="plain column names only"):
        parse_template(CHAT.input, "prompt 'chat'")


def test_how_labels_are_scored_stands_in_a_record_only_where_it_is_not_by_sum_and_goes_on_with_the_prompt(
    bank, uri, new_prompt, publish
):
    publish(bank, new_prompt("plain"), new_prompt("own", label_score="mean", label_offsets=(0.25, -1.5)))
    publish(bank, new_prompt("plain", 2.0), new_prompt("own", array=None, status="failed", reason="no rows"))
    publish(bank, new_prompt("plain", 3.0))
    schema = json.loads(files("pipeline.bank").joinpath("manifest.schema.json").read_text())
    for version, status in ((1, "tuned"), (2, "kept"), (3, "carried_forward")):
        written = json.loads((uri / f"versions/{version}.json").read_text())
        jsonschema.validate(written, schema)
        assert not {"label_score", "label_offsets"} & set(written["prompts"]["plain"])
        own = written["prompts"]["own"]
        assert (own["status"], own["label_score"], own["label_offsets"]) == (status, "mean", [0.25, -1.5])
    plain, own = (PromptBank.open(uri).load(name).record for name in ("plain", "own"))
    assert (plain.label_score, plain.label_offsets) == ("sum", None)
    assert (own.label_score, own.label_offsets) == ("mean", (0.25, -1.5))


@pytest.mark.parametrize("offsets", [(0.0,), (0.0, 1.0, 2.0), (0.0, float("nan"))])
def test_offsets_that_are_not_one_finite_number_a_label_are_refused(bank, new_prompt, publish, offsets):
    with pytest.raises(BankError, match="offset"):
        publish(bank, new_prompt("own", label_offsets=offsets))
    with pytest.raises(BankError, match="offset"):
        publish(bank, new_prompt("own", labels=None, label_offsets=(0.0, 1.0)))
