"""What a bank gives back is what was published, version by version."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from pipeline.bank import CarriedPrompt, Metrics, PromptBank
from pipeline.bank.access import BankAccess
from pipeline.bank.local_store import LocalStore
from pipeline.errors import BankError, StorageError, UnknownNameError

finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(array=arrays(np.float32, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=finite), flip=st.booleans())
def test_every_finite_prompt_comes_back_bit_by_bit_and_read_only(tmp_path, array, flip, new_prompt, publish):
    array = array.T if flip else array
    length, hidden = array.shape
    bank = PromptBank.open(tmp_path / f"bank-{hidden}", create=True)
    version = publish(bank, new_prompt(array=array, length=length), hidden_size=hidden)
    loaded = PromptBank.open(tmp_path / f"bank-{hidden}").load("sst2")
    assert loaded.array.tobytes() == array.tobytes() and loaded.array.shape == array.shape
    assert loaded.version == version and loaded.record.shape == array.shape
    with pytest.raises(ValueError, match="read-only"):
        loaded.array[0, 0] = 1


def test_the_record_tells_everything_that_was_published(bank, uri, new_prompt, backbone_id, publish):
    prompt = new_prompt()
    publish(bank, prompt)
    loaded = PromptBank.open(uri).load("sst2")
    told = loaded.record.model_dump()
    for field in vars(prompt).keys() - {"array", "template", "metrics", "labels"}:
        assert told[field] == getattr(prompt, field)
    assert loaded.record.template == prompt.template and loaded.record.metrics == prompt.metrics
    assert loaded.record.labels == ("negative", "positive") and loaded.record.metrics_previous is None
    assert loaded.backbone == backbone_id()
    manifest = bank.manifest(1)
    assert (manifest.parent, manifest.run, manifest.libraries) == (None, "nightly", {"numpy": "2"})


def test_equal_prompts_share_one_blob_across_names_and_versions(bank, uri, new_prompt, publish):
    publish(bank, new_prompt("a", 1), new_prompt("b", 1), new_prompt("c", 2))
    publish(bank, new_prompt("a", 1, steps=7))
    assert len(list((uri / "blobs/sha256").iterdir())) == 2
    assert bank.load("a").record.steps == 7 and bank.load("a@1").record.steps == 100


def test_a_published_version_never_changes(bank, uri, new_prompt, publish):
    contents: dict[Path, bytes] = {}
    for value in range(1, 6):
        publish(bank, new_prompt("sst2", value), new_prompt(f"only-in-{value}", value))
        now = {path: path.read_bytes() for path in uri.rglob("*") if path.is_file()}
        assert contents.items() <= now.items()
        contents = now
    for value in range(1, 6):
        assert (bank.load(f"sst2@{value}").array == new_prompt("sst2", value).array).all()
    assert bank.versions() == (1, 2, 3, 4, 5)


def test_an_open_bank_stays_at_its_version_while_at_alias_is_the_alias_as_it_is_now(bank, uri, new_prompt, publish):
    publish(bank, new_prompt("sst2", 1))
    reader = PromptBank.open(uri)
    publish(bank, new_prompt("sst2", 2), new_prompt("cr", 2))
    assert (bank.version, reader.version, reader.names()) == (2, 1, ("sst2",))
    assert [reader.load(name).version for name in ("sst2", "sst2@1", "sst2@2", "sst2@latest")] == [1, 1, 2, 2]
    assert reader.refresh() == 2 and reader.names() == ("cr", "sst2")


def test_every_move_of_an_alias_stays_in_its_history(bank, new_prompt, publish):
    publish(bank, new_prompt(value=1), alias="latest")
    publish(bank, new_prompt(value=2), alias="prod")
    publish(bank, new_prompt(value=3), alias="latest")
    assert bank.aliases() == {"latest": 3, "prod": 2}
    moves = bank.alias_history("latest")
    assert [(move.seq, move.version, move.by) for move in moves] == [(1, 1, "run nightly"), (2, 3, "run nightly")]


def test_prompts_that_a_publication_does_not_name_are_carried_forward(bank, new_prompt, publish):
    publish(bank, new_prompt("sst2", 1), new_prompt("cr", 1))
    publish(bank, new_prompt("cr", 2))
    carried, tuned = bank.load("sst2").record, bank.load("cr").record
    assert (carried.status, carried.tuned_in, carried.digest) == (
        "carried_forward",
        1,
        bank.load("sst2@1").record.digest,
    )
    assert (tuned.status, tuned.tuned_in, tuned.metrics_previous) == ("tuned", 2, new_prompt("cr", 1).metrics)


@pytest.mark.parametrize("status", ["failed", "kept"])
def test_a_failed_or_worse_prompt_leaves_the_one_before_in_place(bank, new_prompt, publish, status):
    publish(bank, new_prompt("sst2", 1))
    publish(bank, new_prompt("sst2", array=None, length=99, status=status, reason="loss became NaN"))
    record = bank.load("sst2").record
    assert (record.status, record.reason, record.length, record.tuned_in) == ("kept", "loss became NaN", 4, 1)
    assert (bank.load("sst2").array == bank.load("sst2@1").array).all()


def test_a_prompt_that_failed_from_the_start_is_recorded_and_not_loadable(bank, new_prompt, publish):
    failed = new_prompt("cr", array=None, status="failed", reason="column 'label' is missing")
    publish(bank, new_prompt("sst2"), failed)
    assert bank.names() == ("sst2",) and bank.manifest(1).prompts["cr"].digest is None
    with pytest.raises(BankError, match=r"no blob of 'cr', which has failed: column 'label' is missing"):
        bank.load("cr")
    publish(bank, new_prompt("sst2", 2))
    assert set(bank.manifest(2).prompts) == {"sst2"}
    publish(bank, new_prompt("cr", 3))
    assert bank.load("cr").record.status == "tuned"


def test_figures_that_are_not_finite_are_recorded_as_absent(bank, new_prompt, publish):
    publish(bank, new_prompt(metrics=Metrics(dev_before=0.5, dev_after=float("nan"), dev_loss_after=float("inf"))))
    assert bank.load("sst2").record.metrics == Metrics(dev_before=0.5)


def test_opening_reads_the_alias_and_one_manifest_and_loading_one_blob(bank, uri, new_prompt, publish):
    class Recording(LocalStore):
        reads: list[str] = []  # noqa: RUF012

        def open(self, key: str, limit: int):
            self.reads.append(key)
            return super().open(key, limit)

    for value in range(3):
        publish(bank, new_prompt("sst2", value), new_prompt("cr", -value))
    reader = PromptBank(BankAccess(Recording(uri)), "latest")
    reader.refresh()
    assert Recording.reads == ["aliases/latest/3.json", "versions/3.json"]
    digest = reader.load("sst2").record.digest
    assert Recording.reads[2:] == [f"blobs/sha256/{digest}.safetensors"]


def test_a_bank_belongs_to_one_backbone_and_says_what_differs(bank, new_prompt, publish, backbone_id):
    publish(bank, new_prompt())
    other = backbone_id(fingerprint="e" * 64, weights="x" * 64, quantization="full", model="SmolLM2-360M")
    before = sorted(bank.versions())
    for refused in (
        lambda: bank.check_backbone(other),
        lambda: bank.load("sst2", backbone=other),
        lambda: publish(bank, new_prompt("cr"), **other.model_dump()),
    ):
        with pytest.raises(
            BankError, match=r"SmolLM2-135M.*int8.*SmolLM2-360M.*full.*differ in weights, quantization;"
        ):
            refused()
    assert sorted(bank.versions()) == before
    bank.check_backbone(backbone_id())
    assert bank.load("sst2", backbone=backbone_id(model="another name for it")).version == 1


def test_an_empty_bank_accepts_any_backbone(bank, backbone_id):
    bank.check_backbone(backbone_id())
    assert (bank.version, bank.names(), bank.versions(), bank.aliases()) == (0, (), (), {})
    with pytest.raises(BankError, match="alias 'latest' of the bank is not set yet"):
        bank.load("sst2")


def test_what_cannot_be_published_is_refused_with_its_name_before_anything_is_written(bank, uri, new_prompt, publish):
    publish(bank, new_prompt("cr"))
    before = sorted(uri.rglob("*"))
    good = new_prompt("good", 7)
    nan = new_prompt().array.copy()
    nan[2, 3] = np.nan
    refused = {
        "'sst2' is refused: it holds values that are not finite": new_prompt(array=nan),
        r"'sst2' is refused: \[4, 8\] float64 where": new_prompt(array=np.zeros((4, 8))),
        r"'sst2' is refused: \[4, 9\] float32 where \[P, 8\]": new_prompt(array=np.zeros((4, 9), np.float32)),
        r"length 5 contradicts shape \[4, 8\]": new_prompt(length=5),
        "'sst2': an array belongs to the status 'tuned'": new_prompt(status="failed", reason="x"),
        "'sst2' is refused: status 'failed' needs a reason": new_prompt(array=None, status="failed"),
        "'sst2' cannot be kept": new_prompt(array=None, status="kept", reason="worse"),
        r"'\.\./x' is refused": new_prompt("../x"),
        "'good' is there twice": new_prompt("good"),
    }
    for sentence, prompt in refused.items():
        with pytest.raises(BankError, match=sentence):
            publish(bank, good, prompt)
    with pytest.raises(BankError, match="nothing to publish"):
        publish(bank)
    for alias in ("../x", "12", ""):
        with pytest.raises(BankError, match="alias name"):
            publish(bank, good, alias=alias)
    assert sorted(uri.rglob("*")) == before


def test_what_is_not_there_is_refused_with_one_clear_sentence(bank, uri, tmp_path, new_prompt, publish):
    with pytest.raises(BankError, match=f"no prompt bank at {uri}"):
        PromptBank.open(uri)
    with pytest.raises(BankError, match="no prompt bank at"):
        PromptBank.open(tmp_path / "elsewhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=f"cannot write {tmp_path}/file/bank: Not a directory"):
        PromptBank.open(tmp_path / "file/bank", create=True)
    publish(bank, new_prompt("sst2"))
    with pytest.raises(BankError, match="no alias 'prod'; known: latest; newest version: 1"):
        PromptBank.open(uri, alias="prod")
    for reference, sentence in {
        "sst": r"holds no prompt 'sst'; did you mean 'sst2'\?",
        "sst2@9": r"versions/9\.json is missing",
        "sst2@prod": "no alias 'prod'; known: latest",
    }.items():
        with pytest.raises(BankError, match=sentence):
            bank.load(reference)


def test_every_prompt_of_a_large_bank_is_found_and_no_other(bank, new_prompt, publish):
    names = sorted(f"task-{i}" for i in range(0, 200, 2))
    publish(bank, *(new_prompt(name, i) for i, name in enumerate(names)))
    assert bank.names() == tuple(names)
    for i, name in enumerate(names):
        assert (bank.load(name).array == new_prompt(name, i).array).all()
    for absent in ("task-1", "task-", "task-00", "a", "zzz", "metrics", "task-199"):
        with pytest.raises(BankError, match=f"holds no prompt '{absent}'"):
            bank.load(absent)


def test_a_file_uri_is_the_same_folder(bank, uri, new_prompt, publish):
    publish(bank, new_prompt())
    assert PromptBank.open(f"file://{uri}").load("sst2").version == 1


@pytest.mark.processes
def test_the_bank_imports_neither_torch_transformers_nor_ray():
    heavy = {"torch", "transformers", "ray", "yaml"}
    code = f"import sys, pipeline.bank; print({{m.split('.')[0] for m in sys.modules}} & {heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_prompt_of_an_older_version_stays_by_reference_whatever_the_newest_has(
    bank, publish, new_prompt, backbone_id
):
    publish(bank, new_prompt("sst2", 1), new_prompt("cr", 1))
    publish(bank, new_prompt("sst2", 2), new_prompt("cr", 2))
    old = bank.manifest(1).prompts
    standing = [
        CarriedPrompt(old["sst2"], inputs_digest="e" * 64),
        CarriedPrompt(old["cr"], "kept", "the new one was worse", "d" * 64),
    ]
    assert bank.publish([], backbone_id(), "night", {}, "latest", carried=standing) == 3
    new = bank.manifest(3).prompts
    assert [new[name].digest for name in ("sst2", "cr")] == [old[name].digest for name in ("sst2", "cr")]
    assert (new["sst2"].status, new["sst2"].tuned_in, new["sst2"].inputs_digest) == ("carried_forward", 1, "e" * 64)
    assert (new["cr"].status, new["cr"].reason) == ("kept", "the new one was worse")


def test_a_removed_prompt_is_not_carried_forward_and_the_version_says_why(bank, publish, new_prompt, backbone_id):
    publish(bank, new_prompt("sst2"), new_prompt("cr"))
    assert bank.manifest(1).removed == {}
    bank.publish([new_prompt("sst2", 2)], backbone_id(), "night", {}, "latest", removed={"cr": "no task any more"})
    assert bank.names() == ("sst2",) and bank.manifest(2).removed == {"cr": "no task any more"}
    with pytest.raises(BankError, match="published and removed"):
        bank.publish([new_prompt("cr")], backbone_id(), "night", {}, "latest", removed={"cr": "why"})


def test_a_version_published_without_an_alias_is_there_and_no_alias_moves(bank, publish, new_prompt, backbone_id):
    publish(bank, new_prompt("sst2", 1))
    assert bank.publish([new_prompt("sst2", 2)], backbone_id(), "night", {}, None) == 2
    assert bank.version == bank.refresh() == 1 and bank.versions() == (1, 2)


def test_a_version_of_a_new_backbone_carries_nothing_and_readers_of_the_old_one_stay(bank, uri, publish, new_prompt):
    publish(bank, new_prompt("sst2", 1), new_prompt("cr", 1))
    reader, idle = PromptBank.open(uri), PromptBank.open(uri)
    reader.load("sst2")
    other = {"fingerprint": "e" * 64, "weights": "x" * 64}
    with pytest.raises(BankError, match="weights"):
        publish(bank, new_prompt("sst2", 2), **other)
    writer = PromptBank.open(uri)
    assert publish(writer, new_prompt("sst2", 2), new_backbone=True, **other) == 2
    assert writer.names() == ("sst2",)
    with pytest.raises(BankError, match="weights"):
        reader.refresh()
    assert reader.version == 1 and reader.load("sst2").record.tuned_in == 1
    assert idle.refresh() == 2, "who uses no prompt yet may choose its model by the version"


@pytest.mark.parametrize("revision", ["0", "007", str(10**21)])
def test_a_number_that_no_version_has_is_told_as_such_and_a_name_of_digits_to_begin_with_a_letter(
    bank, new_prompt, publish, revision
):
    publish(bank, new_prompt())
    with pytest.raises(
        UnknownNameError, match=f"'{revision}' is refused: a number stands for a version; give one from 1 on"
    ):
        bank.at(revision)
    with pytest.raises(UnknownNameError, match="a number stands for a version; begin it with a letter"):
        bank.promote(1, revision, by="alice")
