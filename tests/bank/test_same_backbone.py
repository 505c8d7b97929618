"""Statements that two backbones are the same: honoured everywhere, appended only, signed, and never a way around."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.bank import PromptBank
from pipeline.bank.local_store import LocalStore
from pipeline.errors import BankError, StorageError
from tests.bank.conftest import make_backbone, make_prompt, publish
from tests.bank.test_signing import make_key

pytest_plugins = ["tests.bank.s3_server"]

FOLDER = make_backbone()
GGUF = make_backbone(fingerprint="e" * 64, config="d" * 64, weights="v" * 64, model="smollm2.gguf")
OTHER = make_backbone(fingerprint="0" * 64, weights="1" * 64, model="another")


def stated(bank, first=FOLDER, second=GGUF):
    return bank.state_same_backbone(first, second, rows=8, largest_difference=1e-5, by="alice")


def test_a_prompt_loads_on_the_backbone_that_is_stated_to_be_the_same_and_on_no_other(bank):
    publish(bank, make_prompt())
    with pytest.raises(BankError, match="promptbank same-backbone"):
        bank.load("sst2", GGUF)
    stated(bank)
    assert bank.load("sst2", GGUF).version == 1
    bank.check_backbone(GGUF)
    with pytest.raises(BankError, match="differ in weights"):
        bank.load("sst2", OTHER)
    stated(bank, OTHER, GGUF)
    assert bank.load("sst2", OTHER).version == 1, "what is the same as the same is the same"


def test_statements_are_only_appended_and_the_last_one_about_two_backbones_holds(bank, uri):
    publish(bank, make_prompt())
    first = stated(bank)
    before = (uri / "backbones/1.json").read_bytes()
    bank.take_back_same_backbone(first.seq, by="bob")
    with pytest.raises(BankError, match="belongs to the backbone"):
        PromptBank.open(uri).load("sst2", GGUF)
    stated(bank, GGUF, FOLDER)
    assert PromptBank.open(uri).load("sst2", GGUF).version == 1
    assert (uri / "backbones/1.json").read_bytes() == before
    assert [(each.seq, each.same, each.by) for each in bank.same_backbones()] == [
        (1, True, "alice"),
        (2, False, "bob"),
        (3, True, "alice"),
    ]


def test_what_is_published_on_the_same_backbone_carries_on_and_keeps_the_banks_fingerprint(bank, uri):
    publish(bank, make_prompt("sst2", 1), make_prompt("trec", 2))
    stated(bank)
    reader = PromptBank.open(uri)
    reader.load("trec", FOLDER)
    bank.publish([make_prompt("sst2", 3)], GGUF, run="n", libraries={}, alias="latest")
    manifest = bank.manifest(2)
    assert manifest.backbone == FOLDER and manifest.prompts["trec"].status == "carried_forward"
    assert reader.refresh() == 2, "one that follows with the old model goes along"
    assert reader.load("sst2", FOLDER).array[0, 0] == reader.load("sst2", GGUF).array[0, 0] == 3


def test_a_prompt_belongs_to_the_backbone_that_it_was_tuned_on_after_the_statement_is_taken_back(bank, uri):
    publish(bank, make_prompt("x", 1))
    statement = stated(bank)
    bank.publish([make_prompt("y", 2)], GGUF, run="n", libraries={}, alias="latest")
    publish(bank, make_prompt("z", 3))  # carries y forward
    assert bank.load("y", FOLDER).backbone == GGUF
    bank.take_back_same_backbone(statement.seq, by="bob")
    reader = PromptBank.open(uri)
    assert reader.load("y", GGUF).array[0, 0] == 2, "its own"
    assert reader.load("x", FOLDER).version == reader.load("z", FOLDER).version == 3
    with pytest.raises(BankError, match=r"3\.json, prompt 'y', belongs to the backbone smollm2\.gguf"):
        reader.load("y", FOLDER)
    with pytest.raises(BankError, match=r"3\.json belongs to the backbone"):
        reader.load("x", GGUF)
    assert reader.current.is_of(FOLDER, "x") and not reader.current.is_of(FOLDER, "y")
    records = reader.manifest(3).prompts
    assert records["y"].tuned_on == GGUF and records["x"].tuned_on is records["z"].tuned_on is None
    assert (uri / "versions/3.json").read_text().count("tuned_on") == 1 and not reader.verify().problems


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hidden_size": 16}, "differ in hidden_size"),
        ({"quantization": "none"}, "differ in quantization"),
        ({"architecture": "encoder-decoder"}, "differ in architecture"),
        ({"fingerprint": FOLDER.fingerprint}, "one fingerprint"),
    ],
)
def test_what_cannot_be_the_same_is_not_stated(bank, uri, change, match):
    publish(bank, make_prompt())
    with pytest.raises(BankError, match=match):
        stated(bank, FOLDER, GGUF.model_copy(update=change))
    assert not (uri / "backbones").exists()


@pytest.mark.processes
def test_with_trusted_keys_a_statement_must_be_signed_by_one_of_them(tmp_path, uri):
    (ours, our_key), (theirs, _) = make_key(tmp_path, "ours"), make_key(tmp_path, "theirs")
    signed = PromptBank.open(uri, create=True, trusted_keys=[our_key], signing_key=ours)
    publish(signed, make_prompt())
    statement = uri / "backbones/1.json"

    def refused(match):
        reader = PromptBank.open(uri, trusted_keys=[our_key])
        with pytest.raises(BankError, match=match):
            reader.load("sst2", GGUF)
        assert any("backbones" in problem for problem in reader.verify().problems)

    with pytest.raises(BankError, match="its newest version is signed"):
        stated(PromptBank.open(uri))
    assert not statement.exists()
    statement.parent.mkdir(exist_ok=True)
    unsigned = PromptBank.open(tmp_path / "unsigned", create=True)
    publish(unsigned, make_prompt())
    stated(unsigned)
    shutil.copy(tmp_path / "unsigned/backbones/1.json", statement)
    refused("1.json is refused: it is not signed")
    statement.unlink()
    stated(PromptBank.open(uri, signing_key=theirs))
    refused("which is not trusted")
    statement.unlink()
    with pytest.raises(BankError, match="a signing key is needed"):
        stated(PromptBank.open(uri, trusted_keys=[our_key]))
    stated(signed)
    assert PromptBank.open(uri, trusted_keys=[our_key]).load("sst2", GGUF).version == 1
    assert PromptBank.open(uri, trusted_keys=[our_key]).verify().problems == ()
    text = statement.read_bytes()
    statement.chmod(0o644)
    statement.write_bytes((uri / "versions/1.json").read_bytes())
    refused("is refused")  # a manifest that is signed is no statement
    statement.write_bytes(text.replace(b'"rows":8', b'"rows":9'))
    refused("do not match its digest")


def test_a_statement_whose_bytes_were_changed_anywhere_is_refused_and_found_by_verify(bank, uri):
    publish(bank, make_prompt())
    stated(bank)
    statement = uri / "backbones/1.json"
    whole = statement.read_bytes()
    statement.chmod(0o644)
    undetected = 0
    for at in range(len(whole)):
        statement.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        undetected += not bank.verify().problems
    assert undetected == 0
    with pytest.raises(BankError, match=r"backbones/1\.json"):
        PromptBank.open(uri).load("sst2", GGUF)
    assert PromptBank.open(uri).load("sst2", FOLDER).version == 1, "equal fingerprints need no statement"
    statement.write_bytes(whole)
    statement.rename(uri / "backbones/2.json")
    assert len(bank.verify().problems) == 2, "one is missing, and one stands in another's place"


@pytest.mark.processes
def test_a_statement_from_elsewhere_or_one_whose_predecessor_was_replaced_is_refused(tmp_path, uri):
    """Signed by the same key, both."""
    (key, public) = make_key(tmp_path, "ours")
    banks = [
        PromptBank.open(place, create=True, trusted_keys=[public], signing_key=key) for place in (uri, tmp_path / "b")
    ]
    for bank in banks:
        publish(bank, make_prompt())
        bank.take_back_same_backbone(stated(bank).seq, by="bob")
        stated(bank)
    for seq in (1, 2, 3):
        ours = uri / f"backbones/{seq}.json"
        whole = ours.read_bytes()
        ours.unlink()
        ours.write_bytes((tmp_path / f"b/backbones/{seq}.json").read_bytes())
        reader = PromptBank.open(uri, trusted_keys=[public])
        with pytest.raises(BankError, match="does not follow the statement before it"):
            reader.load("sst2", GGUF)
        assert any("does not follow" in problem for problem in reader.verify().problems)
        ours.write_bytes(whole)
    assert not reader.verify().problems and reader.load("sst2", GGUF).version == 1
    (uri / "backbones/2.json").unlink()
    with pytest.raises(BankError, match=r"3\.json is refused: it does not follow"):
        PromptBank.open(uri, trusted_keys=[public]).load("sst2", GGUF)


def test_a_reader_on_the_same_backbone_starts_while_the_store_is_gone(bank, uri, tmp_path, monkeypatch):
    publish(bank, make_prompt())
    stated(bank)
    cache = tmp_path / "cache"
    assert PromptBank.open(uri, cache=cache).load("sst2", GGUF).version == 1

    def gone(self, *args):
        raise StorageError("nothing answers")

    for operation in ("list_names", "read", "open"):
        monkeypatch.setattr(LocalStore, operation, gone)
    reader = PromptBank.open(uri, cache=cache)
    assert reader.load("sst2", GGUF).version == 1
    with pytest.raises(BankError, match="differ in weights"):
        reader.load("sst2", OTHER)
    with pytest.raises(StorageError):
        reader.publish([make_prompt()], GGUF, run="n", libraries={}, alias=None)
    (kept,) = (cache / "statements").iterdir()
    kept.write_bytes(kept.read_bytes().replace(b"alice", b"mally"))
    with pytest.raises(BankError, match="do not match its digest"):
        PromptBank.open(uri, cache=cache).load("sst2", GGUF)
    kept.unlink()
    with pytest.raises(StorageError, match="nothing answers"):
        PromptBank.open(uri, cache=cache).load("sst2", GGUF)


def test_a_reader_that_follows_asks_the_statements_while_it_swaps_and_not_after(bank, uri, monkeypatch):
    publish(bank, make_prompt())
    statement = stated(bank)
    reader = PromptBank.open(uri)
    assert reader.current.is_of(GGUF)
    publish(bank, make_prompt(value=2))
    assert reader.refresh() == 2
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.bank.snapshot.is_same", None)
        assert reader.current.is_of(GGUF)
    bank.take_back_same_backbone(statement.seq, by="bob")
    publish(bank, make_prompt(value=3))
    with pytest.raises(BankError, match=r"3\.json belongs to the backbone"):
        reader.refresh()
    assert reader.version == 2


def test_statements_made_at_once_are_all_kept_and_gc_spares_them(bank, uri):
    publish(bank, make_prompt())
    others = [make_backbone(fingerprint=f"{i:064x}", weights="x", model=str(i)) for i in range(1, 9)]
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda other: stated(PromptBank.open(uri), FOLDER, other), others))
    assert sorted(each.seq for each in made) == list(range(1, 9))
    bank.collect(3600)
    assert {other.fingerprint for other in bank.same_as(FOLDER)} == {f"{i:064x}" for i in range(1, 9)} | {"f" * 64}
    assert bank.verify().statements == 8


@pytest.mark.processes
def test_an_object_store_keeps_statements_as_a_folder_does(s3):
    bank = PromptBank.open(s3.new_uri(), create=True)
    publish(bank, make_prompt())
    for other in (GGUF, OTHER):
        stated(bank, FOLDER, other)
    assert bank.load("sst2", OTHER).version == 1
    assert [each.seq for each in bank.same_backbones()] == [1, 2] and not bank.verify().problems


def test_a_statement_is_one_json_object_as_format_md_says(bank, uri):
    publish(bank, make_prompt())
    stated(bank)
    document = json.loads(Path(uri, "backbones/1.json").read_text())
    assert set(document) == {
        *("digest", "by", "first", "format", "id", "kind", "largest_difference", "previous", "rows", "same"),
        *("second", "seq", "time"),
    }
