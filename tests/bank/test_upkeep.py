"""Promotion, rollback, verification and collection: nothing that anyone could need is ever lost."""

import os
import time
from pathlib import Path

import pytest

from pipeline.bank import PromptBank
from pipeline.bank.access import BankAccess
from pipeline.bank.local_store import LocalStore
from pipeline.errors import BankError, StorageError

DAY = 24 * 3600.0


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def leave_blob(uri: Path, new_prompt, value: float) -> Path:
    """A blob of a publisher that was killed ten days ago."""
    from pipeline.bank.blobs import encode_blob

    digest, data = encode_blob(new_prompt(value=value).array)
    path = uri / "blobs/sha256" / f"{digest}.safetensors"
    path.write_bytes(data)
    age(path, 10 * DAY)
    return path


def blobs(uri: Path) -> set[str]:
    return {path.name for path in (uri / "blobs/sha256").iterdir()}


def test_promote_moves_an_alias_to_any_version_and_rollback_takes_back_move_after_move(bank, new_prompt, publish):
    for value in range(4):
        publish(bank, new_prompt("sst2", value))
    bank.promote(2, "prod", by="ann")
    bank.promote(4, "prod", by="ann")
    bank.promote(1, "prod", by="ann")
    assert [bank.rollback("prod", by="bob").version for _ in range(2)] == [4, 2]
    with pytest.raises(BankError, match="'prod' cannot be rolled back"):
        bank.rollback("prod", by="bob")
    assert [(move.version, move.action, move.by) for move in bank.alias_history("prod")] == [
        (2, "promote", "ann"),
        (4, "promote", "ann"),
        (1, "promote", "ann"),
        (4, "rollback", "bob"),
        (2, "rollback", "bob"),
    ]
    assert bank.aliases() == {"latest": 4, "prod": 2}


def test_a_publication_after_a_rollback_is_served_again(bank, new_prompt, publish):
    publish(bank, new_prompt("sst2", 1))
    publish(bank, new_prompt("sst2", 2))
    assert bank.rollback("latest", by="ann").version == bank.version == 1
    assert publish(bank, new_prompt("cr", 3)) == bank.version == 3
    assert (bank.load("sst2").array == new_prompt("sst2", 2).array).all()


def test_promotion_of_a_version_that_is_not_there_or_damaged_moves_nothing(bank, uri, new_prompt, publish):
    publish(bank, new_prompt())
    publish(bank, new_prompt(value=2))
    with pytest.raises(BankError, match=r"versions/7\.json is missing"):
        bank.promote(7, "prod", by="ann")
    path = uri / "versions/1.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(BankError, match=r"versions/1\.json is damaged"):
        PromptBank.open(uri).promote(1, "prod", by="ann")
    assert bank.aliases() == {"latest": 2}


def test_a_whole_bank_is_verified_without_a_problem(bank, new_prompt, publish):
    for value in range(3):
        publish(bank, new_prompt("sst2", value), new_prompt("cr", 10))
    found = bank.verify()
    assert (found.problems, found.versions, found.aliases, found.blobs) == ((), 3, 1, 4)
    assert found.unreferenced == ()


@pytest.mark.parametrize("place", ["versions/1.json", "versions/2.json", "aliases/latest/1.json", "blobs/sha256"])
def test_verify_names_every_damaged_file_and_changes_nothing(bank, uri, new_prompt, publish, place):
    """Files that no reader of the newest version would ever touch included."""
    publish(bank, new_prompt("sst2", 1))
    publish(bank, new_prompt("sst2", 2))
    path = uri / place
    if path.is_dir():
        path = path / f"{bank.load('sst2@1').record.digest}.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    before = {file: file.read_bytes() for file in uri.rglob("*") if file.is_file()}
    problems = bank.verify().problems
    assert len(problems) == 1 and str(path) in problems[0]
    assert {file: file.read_bytes() for file in uri.rglob("*") if file.is_file()} == before


def test_verify_tells_of_what_is_missing(bank, uri, new_prompt, publish):
    for value in (1, 2, 3):
        publish(bank, new_prompt("sst2", value))
    (uri / "versions/2.json").unlink()
    (uri / "aliases/latest/1.json").unlink()
    next((uri / "blobs/sha256").glob(f"{bank.load('sst2').record.digest}*")).unlink()
    problems = "\n".join(bank.verify().problems)
    assert "its parent, version 2, is not there" in problems
    assert "latest/2.json: version 2 is not there" in problems
    assert "aliases/latest: a move is missing" in problems
    assert "safetensors is missing" in problems


def test_the_collector_takes_old_leftovers_and_nothing_that_a_version_refers_to(bank, uri, new_prompt, publish):
    publish(bank, new_prompt("sst2", 1))
    publish(bank, new_prompt("sst2", 2))
    for path in (uri / "blobs/sha256").iterdir():
        age(path, 400 * DAY)
    needed = blobs(uri)
    old = leave_blob(uri, new_prompt, 3)
    young = leave_blob(uri, new_prompt, 4)
    age(young, 6 * DAY)
    temporary = uri / "versions/.0123456789abcdef0123456789abcdef.tmp"
    temporary.write_bytes(b"half")
    age(temporary, 10 * DAY)
    foreign = uri / "versions/.notes.tmp"
    foreign.write_bytes(b"not a bank's")
    age(foreign, 10 * DAY)
    assert bank.verify().unreferenced == tuple(sorted([old.stem, young.stem]))

    would = bank.collect(dry_run=True)
    assert old.exists() and temporary.exists()
    assert would.keys == (f"blobs/sha256/{old.name}", "versions/.0123456789abcdef0123456789abcdef.tmp")
    assert bank.collect() == would
    assert blobs(uri) == needed | {young.name} and not temporary.exists() and foreign.exists()
    assert (bank.load("sst2@1").array == new_prompt("sst2", 1).array).all()
    assert bank.verify().problems == ()


def test_the_collector_deletes_nothing_when_it_cannot_read_every_version(bank, uri, new_prompt, publish):
    publish(bank, new_prompt())
    publish(bank, new_prompt(value=2))
    old = leave_blob(uri, new_prompt, 3)
    (uri / "versions/1.json").chmod(0o644)
    (uri / "versions/1.json").write_bytes(b"{}")
    with pytest.raises(BankError, match=r"versions/1\.json is damaged"):
        bank.collect()
    assert old.exists()


def test_a_grace_period_that_a_publisher_could_outlast_is_refused(bank):
    with pytest.raises(BankError, match="3599 seconds is refused"):
        bank.collect(grace=3599)


class Meeting(LocalStore):
    """Runs something once, before or after the first operation of a kind on a blob."""

    def __init__(self, root: Path, operation: str, after: bool, what) -> None:
        super().__init__(root)
        plain = getattr(self, operation)

        def met(key: str, *args):
            if not key.startswith("blobs/") or self.done:
                return plain(key, *args)
            self.done = True
            if not after:
                what()
            result = plain(key, *args)
            if after:
                what()
            return result

        self.done = False
        setattr(self, operation, met)


@pytest.mark.parametrize("operation", ["list_files", "open", "delete"])
@pytest.mark.parametrize("after", [False, True])
def test_a_publisher_that_shares_a_leftover_while_it_is_collected_loses_nothing(
    bank, uri, new_prompt, publish, operation, after
):
    publish(bank, new_prompt("sst2", 1))
    leave_blob(uri, new_prompt, 3)
    store = Meeting(uri, operation, after, lambda: publish(bank, new_prompt("cr", 3)))
    PromptBank(BankAccess(store), "latest").collect()
    assert store.done
    assert (PromptBank.open(uri).load("cr").array == new_prompt("cr", 3).array).all()
    assert bank.verify().problems == ()


@pytest.mark.parametrize("operation", ["create", "open", "renew", "exists"])
@pytest.mark.parametrize("after", [False, True])
def test_a_collector_at_work_while_a_publisher_shares_a_leftover_loses_nothing(
    bank, uri, new_prompt, publish, operation, after
):
    publish(bank, new_prompt("sst2", 1))
    left = leave_blob(uri, new_prompt, 3)

    def collect() -> None:
        if left.exists():
            age(left, 10 * DAY)  # the worst case: the collector had looked before it was made young
        bank.collect()

    store = Meeting(uri, operation, after, collect)
    publish(PromptBank(BankAccess(store), "latest"), new_prompt("cr", 3))
    assert store.done
    assert (PromptBank.open(uri).load("cr").array == new_prompt("cr", 3).array).all()
    assert bank.verify().problems == ()


def test_a_collection_that_fails_midway_puts_back_what_a_new_version_needs(bank, uri, new_prompt, publish):
    publish(bank, new_prompt("sst2", 1))
    for value in (3, 4):
        leave_blob(uri, new_prompt, value)

    class Failing(LocalStore):
        deleted = 0

        def delete(self, key: str) -> None:
            if self.deleted:
                raise StorageError("the store is gone")
            publish(bank, new_prompt("cr", 3), new_prompt("trec", 4))
            super().delete(key)
            self.deleted += 1

    with pytest.raises(StorageError, match="the store is gone"):
        PromptBank(BankAccess(Failing(uri)), "latest").collect()
    assert bank.verify().problems == ()


def test_files_that_are_no_part_of_a_bank_are_let_be(bank, uri, new_prompt, publish):
    publish(bank, new_prompt())
    strangers = [uri / "blobs/sha256/my copy.safetensors", uri / "blobs/sha256/notes.txt", uri / "aliases/README"]
    for path in strangers:
        path.write_text("a person's")
        age(path, 400 * DAY)
    (uri / "aliases/lost+found").mkdir()
    assert bank.collect().keys == () and bank.verify().problems == () and bank.verify().unreferenced == ()
    assert bank.aliases() == {"latest": 1} and all(path.exists() for path in strangers)
