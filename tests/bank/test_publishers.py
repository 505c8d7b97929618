"""Publishers against each other, killed, and out of disk: readers always find a whole version."""

import json
import shutil
import subprocess
import sys
import tempfile
from itertools import count
from pathlib import Path

import pytest

from pipeline.bank import PromptBank
from pipeline.bank.access import BankAccess, open_store
from pipeline.bank.local_store import LocalStore
from tests.bank.publisher import KILLED, check_after

pytest_plugins = ["tests.bank.s3_server", "tests.bank.azurite"]

SCRIPT = Path(__file__).with_name("publisher.py")
ROOT = SCRIPT.parents[2]
ROUNDS = 30


def command(*args: object) -> list[str]:
    start = f"import sys, runpy; sys.path.insert(0, {str(ROOT)!r}); "
    return [sys.executable, "-c", start + f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')", *map(str, args)]


def run(*args: object) -> dict:
    done = subprocess.run(command(*args), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(
    params=[
        "folder",
        pytest.param("s3", marks=pytest.mark.processes),
        pytest.param("azure", marks=[pytest.mark.processes, pytest.mark.slow]),
    ]
)
def place(request, uri) -> str:
    """Where nothing lies yet; child processes find it too."""
    if request.param == "azure":
        return request.getfixturevalue("azure_uri")
    return str(uri) if request.param == "folder" else request.getfixturevalue("s3").new_uri()


@pytest.mark.processes
def test_two_processes_publishing_at_once_get_every_number_once_and_lose_nothing(place):
    uri = place
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command("rounds", uri, name, ROUNDS), **pipes) for name in ("a", "b")]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.close()
    got = [json.loads(process.stdout.read()) for process in processes]
    for process in processes:
        process.stdout.close()
        assert process.wait() == 0
    assert sorted([*got[0].values(), *got[1].values()]) == list(range(1, 2 * ROUNDS + 1))
    bank = PromptBank.open(uri)
    assert bank.version == 2 * ROUNDS
    assert set(bank.names()) == got[0].keys() | got[1].keys()
    for name, version in {**got[0], **got[1]}.items():
        record = bank.load(name).record
        assert record.tuned_in == version == bank.manifest(version).version
        assert bank.manifest(version).parent == (version - 1 or None)
    seen = [move.version for move in bank.alias_history("latest")]
    assert seen == sorted(set(seen))


@pytest.mark.parametrize("overtaken_at", ["versions/", "aliases/"])
def test_a_publisher_that_is_overtaken_loses_nothing_of_the_other(bank, uri, new_prompt, publish, overtaken_at):
    class Overtaken(LocalStore):
        done = False

        def create(self, key: str, data: bytes) -> bool:
            if key.startswith(overtaken_at) and not self.done:
                self.done = True
                publish(PromptBank.open(uri), new_prompt("other", 2))
            return super().create(key, data)

    publish(bank, new_prompt("first", 1))
    number = publish(PromptBank(BankAccess(Overtaken(uri)), "latest"), new_prompt("mine", 3))
    assert number == {"versions/": 3, "aliases/": 2}[overtaken_at]
    reader = PromptBank.open(uri)
    assert reader.version == 3 and set(reader.names()) == {"first", "mine", "other"}
    assert reader.manifest(3).parent == 2


def test_of_two_publications_of_the_same_prompts_in_the_same_second_one_becomes_the_next_version(
    place, new_prompt, publish, monkeypatch
):
    monkeypatch.setattr("pipeline.bank.publish.utc_now", lambda: "2026-01-31T02:10:00Z")
    store = open_store(place, create=True)
    create = store.create

    def overtaken(key: str, data: bytes) -> bool:
        monkeypatch.setattr(store, "create", create)
        assert publish(PromptBank.open(place, create=True), new_prompt("sst2")) == 1
        return create(key, data)

    monkeypatch.setattr(store, "create", lambda key, data: (overtaken if "versions" in key else create)(key, data))
    assert publish(PromptBank(BankAccess(store), "latest"), new_prompt("sst2")) == 2


@pytest.mark.parametrize("level", ["store operations", "system calls"])
@pytest.mark.processes
def test_a_publisher_killed_after_any_step_leaves_a_readable_bank_and_the_next_publishes(tmp_path, level):
    outcome = run("killed", tmp_path, level)
    visible = outcome["visible"]
    assert visible == sorted(visible) and set(visible) == {1, 2}  # version 2 appears at one step and stays
    assert outcome["steps"] >= {"store operations": 9, "system calls": 20}[level]


@pytest.mark.slow
@pytest.mark.processes
def test_a_publisher_killed_after_any_operation_leaves_a_readable_bank_in_an_object_store(s3, new_prompt, publish):
    visible = []
    for step in count():
        uri = s3.new_uri()
        publish(PromptBank.open(uri, create=True), new_prompt("sst2", 1), new_prompt("trec", 2))
        done = subprocess.run(command("killed_at", uri, step), capture_output=True, text=True)
        visible.append(check_after(uri))
        if done.returncode == 0:
            break
        assert done.returncode == KILLED, done.stderr
    assert visible == sorted(visible) and set(visible) == {1, 2} and len(visible) > 9


@pytest.mark.processes
def test_a_full_disk_is_one_sentence_and_leaves_the_version_before(tmp_path):
    tmpfs = 'mount -t tmpfs -o size=256k tmpfs "$0" && exec "$@"'
    probe = ["unshare", "--mount", "sh", "-c", tmpfs, str(tmp_path)]
    if shutil.which("unshare") is None or subprocess.run([*probe, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a small tmpfs (unshare --mount, mount)")
    done = subprocess.run([*probe, *command("full", tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sentences = json.loads(done.stdout)["sentences"]
    assert all(sentence.endswith(": the disk is full; free some space and run again") for sentence in sentences)
    places = [sentence.split("/bank/")[1].split("/")[0].rstrip(":") for sentence in sentences]
    assert set(places) == {"blobs", "versions", "aliases"}


@pytest.mark.processes
def test_a_bank_that_this_user_may_not_write_is_one_sentence_and_leaves_the_version_before():
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path, which is closed to other users
        Path(folder).chmod(0o755)
        outcome = run("denied", folder)
    assert outcome["version"] == 1
    assert "blobs/sha256/" in outcome["sentence"] and "permission denied" in outcome["sentence"]
