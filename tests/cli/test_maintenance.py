"""`verify` finds damage and `gc` deletes what nobody needs, and nothing else."""

import os
import time

import pytest

from pipeline.bank import PromptBank
from pipeline.bank.blobs import encode_blob
from tests.bank.conftest import make_prompt
from tests.bank.test_integrity import file_at, overwrite

DAY = 24 * 3600


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    overwrite(path, bytes(data))


def leave_behind(uri, age_days):
    """What a killed publisher leaves: a blob of no version, and a temporary file."""
    digest, data = encode_blob(make_prompt(value=99 + age_days).array)
    blob = uri / f"blobs/sha256/{digest}.safetensors"
    temporary = uri / f"versions/.{age_days:032}.tmp"
    for path in (blob, temporary):
        path.write_bytes(data)
        os.utime(path, (time.time() - age_days * DAY,) * 2)
    return {str(path.relative_to(uri)) for path in (blob, temporary)}


def files(uri):
    return {str(path.relative_to(uri)) for path in uri.rglob("*") if path.is_file()}


def test_verify_of_a_whole_bank_is_fine(run, document, uri):
    code, stdout, stderr = run("verify")
    assert (code, stderr) == (0, "")
    assert stdout == "no problems: 3 versions, 2 aliases and 4 blobs were checked, signatures were not\n"
    assert document("verify") == {
        "bank": str(uri),
        "problems": [],
        "versions": 3,
        "aliases": 2,
        "statements": 0,
        "blobs": 4,
        "unreferenced": [],
        "signatures_checked": False,
    }


@pytest.mark.parametrize("place", ["versions/3.json", "versions/1.json", "aliases/latest/3.json", "blobs/sha256"])
def test_verify_exits_1_and_names_the_flipped_file(run, document, uri, place):
    path = file_at(uri, place)
    flip(path)
    code, stdout, stderr = run("verify")
    assert (code, stderr) == (1, "")
    assert any(line.startswith(f"{path} is damaged") for line in stdout.splitlines())
    assert str(path) in document("verify", code=1)["problems"][0]


def test_verify_names_every_problem_in_a_line_of_its_own(run, uri):
    flip(uri / "versions/2.json")
    (uri / "aliases/latest/1.json").unlink()
    _, stdout, _ = run("verify")
    lines = stdout.splitlines()
    assert len(lines) == 3 and lines[2].startswith("2 problems: ")


def test_verify_counts_blobs_of_no_version_and_finds_no_fault_in_them(run, document, uri):
    leave_behind(uri, 1)
    assert len(document("verify")["unreferenced"]) == 1
    assert run("verify")[1].endswith("; 1 blob of no version: promptbank gc deletes them in time\n")


def test_gc_dry_run_lists_what_gc_would_delete_and_deletes_nothing(run, document, uri):
    old = leave_behind(uri, 8)
    before = files(uri)
    code, stdout, _ = run("gc", "--dry-run")
    *keys, last = stdout.splitlines()
    assert code == 0 and set(keys) == old and "2 files" in last and last.endswith("would be deleted")
    found = document("gc", "--dry-run")
    assert list(found) == ["bank", "dry_run", "grace_seconds", "keys", "bytes"]
    assert (found["dry_run"], found["grace_seconds"], set(found["keys"])) == (True, 7 * DAY, old)
    assert files(uri) == before


def test_gc_deletes_what_is_older_than_the_grace_time_and_every_prompt_stays(run, document, uri):
    before = files(uri)
    for days in (2, 8):
        leave_behind(uri, days)
    assert len(document("gc")["keys"]) == 2
    assert len(files(uri) - before) == 2
    assert run("gc", "--grace", "36h")[1].splitlines()[-1].startswith("2 files, ")
    assert files(uri) == before
    bank = PromptBank.open(uri)
    for version in bank.versions():
        for name in bank.at(str(version)).names():
            bank.load(f"{name}@{version}")


@pytest.mark.parametrize(
    ("text", "seconds"), [("3600s", 3600), ("90m", 5400), ("1.5h", 5400), ("7d", 7 * DAY), ("1w", 7 * DAY)]
)
def test_a_grace_time_has_a_unit(document, text, seconds):
    assert document("gc", "--grace", text)["grace_seconds"] == seconds


@pytest.mark.parametrize("text", ["7", "d", "", "-1d", "1 d", "1y", "nan", "1e9d"])
def test_a_grace_time_that_is_none_is_refused(refusal, text):
    assert refusal("gc", f"--grace={text}") == f"--grace {text}: write a number and a unit, such as 36h or 7d"


def test_a_grace_time_that_a_publisher_could_exceed_is_refused(refusal):
    assert "for a publisher at work needs its blobs" in refusal("gc", "--grace", "59m")


def test_gc_refuses_a_folder_that_is_no_bank_whatever_lies_in_it(refusal, tmp_path):
    stray = tmp_path / "other" / ".work.tmp"
    stray.parent.mkdir()
    stray.write_text("another program's")
    os.utime(stray, (0, 0))
    assert "there is no prompt bank at" in refusal("gc", bank=tmp_path / "other")
    assert stray.exists()


def test_gc_refuses_a_bank_with_a_damaged_version_and_deletes_nothing(refusal, uri):
    leave_behind(uri, 8)
    flip(uri / "versions/2.json")
    before = files(uri)
    assert "versions/2.json is damaged" in refusal("gc")
    assert files(uri) == before
