"""Services that follow a bank: new versions whole, and the last good one when things go wrong."""

import logging
import shutil
import threading
import time
import tracemalloc
from pathlib import Path

import pytest

from pipeline.bank import PromptBank, WatchEvent
from pipeline.bank.cache import Cache, default_cache
from pipeline.errors import BankError, StorageError

SOON = 20.0


class Events:
    """What a watch has told, and a way to wait for the next."""

    def __init__(self) -> None:
        self.seen: list[WatchEvent] = []
        self._more = threading.Condition()

    def __call__(self, event: WatchEvent) -> None:
        with self._more:
            self.seen.append(event)
            self._more.notify_all()

    def wait_for(self, count: int) -> list[WatchEvent]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.seen) >= count, SOON), f"only {self.seen}"
        return self.seen


def damage(path: Path) -> bytes:
    good = path.read_bytes()
    replace(path, good[:-4] + bytes([good[-4] ^ 1]) + good[-3:])
    return good


def replace(path: Path, data: bytes) -> None:
    """In one step: a reader that looks meanwhile never finds half of it."""
    new = path.with_name("new")
    new.write_bytes(data)
    new.replace(path)


@pytest.fixture
def two(bank, new_prompt, publish) -> PromptBank:
    """A bank with one version of two prompts."""
    publish(bank, new_prompt("sst2", 1), new_prompt("cr", 1))
    return bank


def test_a_watch_swaps_a_new_version_in_and_tells(two, uri, new_prompt, publish):
    reader, events = PromptBank.open(uri), Events()
    with reader.watch(events, every=0.02):
        publish(two, new_prompt("sst2", 2))
        (event,) = events.wait_for(1)
    assert (event.version, event.previous, event.error) == (2, 1, None)
    assert (reader.load("sst2").array == new_prompt("sst2", 2).array).all()


def test_a_reader_that_holds_one_snapshot_never_sees_two_versions(two, uri, new_prompt, publish):
    reader = PromptBank.open(uri)
    stop = threading.Event()
    mixed = []

    def read() -> None:
        while not stop.is_set():
            now = reader.current
            values = {float(now.load(name).array[0, 0]) for name in ("sst2", "cr")}
            if len(values) != 1 or {now.load(name).version for name in ("sst2", "cr")} != {now.version}:
                mixed.append(values)

    threads = [threading.Thread(target=read) for _ in range(4)]
    with reader.watch(every=0.005):
        for thread in threads:
            thread.start()
        for value in range(2, 22):
            publish(two, new_prompt("sst2", value), new_prompt("cr", value))
        deadline = time.monotonic() + SOON
        while reader.version < 21 and time.monotonic() < deadline:
            time.sleep(0.01)
    stop.set()
    for thread in threads:
        thread.join()
    assert reader.version == 21 and not mixed


@pytest.mark.parametrize("place", ["aliases/latest/2.json", "versions/2.json", "blob"])
def test_a_broken_new_version_is_told_once_and_the_last_good_one_goes_on(two, uri, new_prompt, publish, place):
    reader, events = PromptBank.open(uri), Events()
    reader.load("sst2")
    publish(two, new_prompt("sst2", 2))
    path = uri / place if place != "blob" else uri / f"blobs/sha256/{two.load('sst2').record.digest}.safetensors"
    good = damage(path)
    with reader.watch(events, every=0.01):
        events.wait_for(1)
        time.sleep(0.1)
        assert len(events.seen) == 1 and str(path) in str(events.seen[0].error)
        assert (events.seen[0].version, reader.version) == (1, 1)
        assert (reader.load("sst2").array == new_prompt("sst2", 1).array).all()
        assert (reader.load("cr").array == new_prompt("cr", 1).array).all()
        replace(path, good)
        events.wait_for(2)
    assert (events.seen[1].version, events.seen[1].previous, events.seen[1].error) == (2, 1, None)
    assert (reader.load("sst2").array == new_prompt("sst2", 2).array).all()


def test_a_prompt_that_nobody_uses_does_not_hold_a_new_version_up(two, uri, new_prompt, publish):
    reader = PromptBank.open(uri)
    reader.load("cr")
    publish(two, new_prompt("sst2", 2))
    damage(uri / f"blobs/sha256/{two.load('sst2').record.digest}.safetensors")
    assert reader.refresh() == 2


def test_the_store_may_vanish_and_come_back(two, uri, new_prompt, publish):
    reader, events = PromptBank.open(uri), Events()
    reader.load("sst2")
    with reader.watch(events, every=0.01):
        uri.rename(uri.with_name("away"))
        (uri / "aliases").mkdir(parents=True)
        (uri / "aliases/latest").symlink_to("latest")  # listing it fails, as with a store that is gone
        events.wait_for(1)
        assert isinstance(events.seen[0].error, StorageError)
        assert (reader.load("sst2").array == new_prompt("sst2", 1).array).all()
        shutil.rmtree(uri)
        uri.with_name("away").rename(uri)
        events.wait_for(2)
        assert events.seen[1] == WatchEvent(version=1, previous=1, error=None)


def test_a_callback_that_raises_does_not_end_the_watch(two, uri, new_prompt, publish, caplog):
    reader, events = PromptBank.open(uri), Events()

    def fail(event: WatchEvent) -> None:
        events(event)
        raise RuntimeError("the service's own fault")

    with reader.watch(fail, every=0.01):
        for value in (2, 3):
            publish(two, new_prompt("sst2", value))
            events.wait_for(value - 1)
    assert reader.version == 3 and "the service's own fault" in caplog.text


def test_a_stopped_watch_leaves_no_thread(two, uri):
    before = threading.active_count()
    watch = PromptBank.open(uri).watch(every=60)
    assert threading.active_count() == before + 1
    watch.stop()
    assert threading.active_count() == before


# The local cache.


def hide(uri: Path) -> None:
    """Take the store away so that reading it fails."""
    uri.rename(uri.with_name("away"))
    uri.mkdir()
    (uri / "aliases").write_text("gone")


def test_a_service_starts_from_its_cache_while_the_store_is_gone(two, uri, tmp_path, new_prompt, publish, caplog):
    publish(two, new_prompt("mr", 9))
    first = PromptBank.open(uri, cache=tmp_path / "cache")
    first.load("sst2")
    hide(uri)
    with caplog.at_level(logging.WARNING):
        again = PromptBank.open(uri, cache=tmp_path / "cache")
    assert "going on with version 2, the last one seen of 'latest'" in caplog.text
    assert (again.load("sst2").array == new_prompt("sst2", 1).array).all()
    with pytest.raises((BankError, StorageError)):
        again.load("mr")  # never read before: it is not in the cache
    with pytest.raises(StorageError):
        PromptBank.open(uri, cache=tmp_path / "another")


def test_a_cached_prompt_is_not_read_from_the_store_again(two, uri, tmp_path, new_prompt):
    PromptBank.open(uri, cache=tmp_path / "cache").load("sst2")
    shutil.rmtree(uri / "blobs")
    shutil.rmtree(uri / "versions")
    assert (PromptBank.open(uri, cache=tmp_path / "cache").load("sst2").array == new_prompt("sst2", 1).array).all()


def test_a_damaged_cache_is_read_past_and_mended(two, uri, tmp_path, new_prompt):
    folder = tmp_path / "cache"
    PromptBank.open(uri, cache=folder).load("sst2")
    files = sorted((folder / "sha256").iterdir())
    good = {path: damage(path) for path in files}
    assert len(files) == 2
    assert (PromptBank.open(uri, cache=folder).load("sst2").array == new_prompt("sst2", 1).array).all()
    assert {path: path.read_bytes() for path in files} == good


def test_a_cache_that_cannot_be_written_only_costs_time(two, uri, tmp_path, new_prompt, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    reader = PromptBank.open(uri, cache=tmp_path / "cache")
    assert (reader.load("sst2").array == new_prompt("sst2", 1).array).all()
    assert "the bank is read without it" in caplog.text


def test_the_cache_stays_below_its_limit_and_forgets_what_was_not_used_for_longest(tmp_path):
    cache = Cache(tmp_path, limit=3_000)  # looked through at every write, for each is more than a 32nd
    for digest in ("a", "b", "c"):
        cache.keep(digest * 64, bytes(1_000))
        time.sleep(0.01)
    assert cache.find("a" * 64) is not None
    cache.keep("d" * 64, bytes(1_000))
    assert {path.name[0] for path in (tmp_path / "sha256").iterdir()} == {"a", "c", "d"}


def test_a_bank_made_anew_at_the_same_place_is_not_answered_from_the_old_ones_cache(
    two, uri, tmp_path, new_prompt, publish
):
    PromptBank.open(uri, cache=tmp_path / "cache").load("sst2")
    shutil.rmtree(uri)
    publish(PromptBank.open(uri, create=True), new_prompt("sst2", 7))
    again = PromptBank.open(uri, cache=tmp_path / "cache")
    assert again.version == 1 and (again.load("sst2").array == new_prompt("sst2", 7).array).all()


# What it costs to hold a bank open.


@pytest.mark.parametrize("cached", [False, True])
def test_memory_grows_with_the_prompts_used_and_not_with_the_bank(bank, uri, tmp_path, new_prompt, publish, cached):
    publish(bank, *(new_prompt(f"task-{i:04d}", i) for i in range(2_000)))
    size = (uri / "versions/1.json").stat().st_size
    tracemalloc.start()
    reader = PromptBank.open(uri, cache=tmp_path / "cache" if cached else None)
    first = reader.load("task-0700")
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert first.array[0, 0] == new_prompt(value=700).array[0, 0]
    assert size > 1_000_000 and held < 200_000
    assert cached or peak < 600_000


def test_a_manifest_that_changes_under_an_open_reader_is_refused(bank, uri, new_prompt, publish):
    publish(bank, *(new_prompt(f"task-{i:04d}", i) for i in range(200)))
    reader = PromptBank.open(uri)
    path = uri / "versions/1.json"
    data = path.read_bytes()
    path.chmod(0o644)
    with path.open("r+b") as file:  # in place, as a failing disk or a careless copy would
        file.write(data.replace(b'"separator":" "', b'"separator":"_"'))
    with pytest.raises(BankError, match=r"versions/1\.json is damaged: its bytes have changed since"):
        reader.load("task-0050")


def test_a_watch_outlives_any_failure_and_tells_of_it(two, uri, new_prompt, publish, monkeypatch, caplog):
    reader, events = PromptBank.open(uri), Events()
    good = reader.refresh
    monkeypatch.setattr(reader, "refresh", lambda: (_ for _ in ()).throw(MemoryError("none left")))
    watcher = reader.watch(events, every=0.01)
    events.wait_for(1)
    assert "none left" in str(events.seen[0].error) and "none left" in caplog.text
    publish(two, new_prompt("sst2", 2))
    watcher._refresh = good
    events.wait_for(2)
    watcher.stop()
    assert events.seen[1].version == reader.version == 2


def test_a_publication_that_is_out_is_not_reported_as_failed(two, uri, new_prompt, publish, caplog):
    """Though a prompt in use cannot be read from it: the version is there, and a retry would publish it twice."""
    two.load("cr")
    publish(two, new_prompt("mr", 8))
    damage(uri / f"blobs/sha256/{two.load('cr').record.digest}.safetensors")
    assert publish(two, new_prompt("trec", 9)) == 3
    assert two.version == 2 and "stays at version 2" in caplog.text
    assert two.aliases() == {"latest": 3}


def test_an_older_version_that_was_opened_by_number_is_not_read_again(two, uri, new_prompt, publish):
    publish(two, new_prompt("sst2", 2))
    reader = PromptBank.open(uri)
    first = reader.load("sst2@1")
    (uri / "versions/1.json").unlink()
    assert reader.load("sst2@1") is first


def test_a_user_without_a_home_has_no_cache_and_no_error(monkeypatch, caplog):
    for name in ("PROMPT_BANK_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    assert default_cache() is None and "set PROMPT_BANK_CACHE" in caplog.text
