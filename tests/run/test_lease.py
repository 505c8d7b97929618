"""The lease: however many nights begin at once, one holds it; a dead one's is free; a lost one is noticed."""

import errno
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import LeaseError, StorageError
from pipeline.run.lease import held, run_lease

pytestmark = pytest.mark.processes

HOLD = """
import sys, time
from pathlib import Path
from pipeline.run.lease import held
with held(Path(sys.argv[1]), "first", float(sys.argv[2])) as lease:
    print("held", flush=True)
    sys.stdin.readline()
    try:
        lease.check()
        print("mine", flush=True)
    except Exception as error:
        print(error, flush=True)
"""


def holder(folder, expiry: float) -> subprocess.Popen:
    """A process of its own that holds the lease until it is told to look again."""
    command = [sys.executable, "-c", HOLD, str(folder), str(expiry)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_night_finds_the_first_and_leaves_and_may_begin_once_that_has_ended(tmp_path):
    with held(tmp_path, "first", 60) as lease:
        with pytest.raises(LeaseError, match=f"night 'first' .process {os.getpid()}"), held(tmp_path, "second", 60):
            pass
        lease.check()
    with held(tmp_path, "second", 60):
        pass


def test_a_second_night_may_wait_for_the_first(tmp_path):
    process = holder(tmp_path, 60)
    process.stdin.close()  # it ends
    with held(tmp_path, "second", 60, wait=30):
        pass
    assert process.wait() == 0


def test_a_holder_that_lives_keeps_its_lease_for_longer_than_the_expiry(tmp_path):
    with held(tmp_path, "first", 0.4) as lease:
        with pytest.raises(LeaseError), held(tmp_path, "second", 0.4, wait=1.5):
            pass
        lease.check()


def test_a_killed_starts_lease_is_free_at_once_on_the_same_system_also_if_its_number_is_used_again(tmp_path):
    process = holder(tmp_path, 3600)
    process.kill()
    process.wait()
    with held(tmp_path, "second", 3600) as lease:
        lease.check()
    path = tmp_path / "2.json"
    reused = {**json.loads(path.read_text()), "pid": os.getpid(), "begun": "1", "released": False}
    path.write_text(json.dumps(reused))
    with held(tmp_path, "third", 3600):
        pass


def test_a_holder_that_proc_hides_is_not_taken_for_dead(tmp_path, monkeypatch):
    """As with hidepid, another user's process."""
    process = holder(tmp_path, 60)
    read = Path.read_text

    def hidden(path, *args, **kwargs):
        if path == Path(f"/proc/{process.pid}/stat"):
            raise FileNotFoundError(path)
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", hidden)
    with pytest.raises(LeaseError, match="night 'first'"), held(tmp_path, "second", 60):
        pass
    process.communicate("look\n", timeout=60)


def test_where_no_hard_links_can_be_made_the_lease_is_one_all_the_same(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with held(tmp_path, "first", 60) as lease:
        with pytest.raises(LeaseError, match="night 'first'"), held(tmp_path, "second", 60):
            pass
        lease.check()
    with held(tmp_path, "second", 60):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "2.json"]


def elsewhere(folder, ahead: float) -> None:
    """Make the lease one of another system, renewed so many seconds from now."""
    (path,) = folder.glob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "system": "another", "released": False}))
    os.utime(path, (time.time() + ahead, time.time() + ahead))


@pytest.mark.parametrize("ahead", [-86400, 0, 86400])
def test_a_dead_lease_of_another_system_is_free_after_its_expiry_whatever_the_clocks_say(tmp_path, ahead):
    with held(tmp_path, "first", 60):
        pass
    elsewhere(tmp_path, ahead)
    begun = time.monotonic()
    with held(tmp_path, "second", 1.0) as lease:
        assert time.monotonic() - begun > 1.0
        lease.check()


def test_a_clock_that_is_set_loses_no_living_lease(tmp_path, monkeypatch):
    with held(tmp_path, "first", 3.0) as lease:
        elsewhere_of = json.loads((tmp_path / "1.json").read_text()) | {"system": "another"}
        (tmp_path / "1.json").write_text(json.dumps(elsewhere_of))
        os.utime(tmp_path / "1.json", (time.time() - 100, time.time() - 100))
        now = time.time
        monkeypatch.setattr(time, "time", lambda: now() + 100)
        lease.check()
        with pytest.raises(LeaseError, match="night 'first'"), held(tmp_path, "second", 3.0):
            pass
        lease.check()


def test_a_holder_stopped_for_longer_than_its_expiry_notices_and_its_taker_is_not_disturbed(tmp_path):
    process = holder(tmp_path, 0.5)
    process.send_signal(signal.SIGSTOP)
    with held(tmp_path, "second", 0.5, wait=30) as lease:
        process.send_signal(signal.SIGCONT)
        said, _ = process.communicate("look\n", timeout=60)
        assert "another start (second" in said
        lease.check()


def test_a_holder_stopped_for_too_long_takes_its_lease_anew_if_nobody_else_did(tmp_path):
    process = holder(tmp_path, 0.5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.2)
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate("look\n", timeout=60)
    assert said == "mine\n"
    assert (tmp_path / "2.json").exists()


def test_a_second_start_of_a_run_leaves_with_a_sentence_that_says_who_runs_it(tmp_path):
    with run_lease(tmp_path, "small"), pytest.raises(LeaseError) as caught, run_lease(tmp_path, "small"):
        pass
    said = f"run 'small' (process {os.getpid()} on {socket.gethostname()}, since "
    assert str(caught.value).startswith(said) and str(caught.value).endswith("give this start another run.name")


def _contend(folder, barrier, results, number):
    """Try once, all at the same moment; who holds it stays until the others have tried."""
    barrier.wait()
    try:
        with held(folder, f"taker {number}", 60):
            results.put(number)
            barrier.wait()
    except LeaseError:
        barrier.wait()


@pytest.mark.parametrize(
    "before",
    ["a dead night", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("nothing", "a night that ended"))],
)
def test_of_many_takers_at_once_exactly_one_holds_the_lease(tmp_path, before):
    context = multiprocessing.get_context("spawn")
    takers, rounds = 8, 3
    for turn in range(rounds):
        folder = tmp_path / f"{before}-{turn}"
        if before != "nothing":
            with held(folder, "before", 60):
                pass
        if before == "a dead night":
            path = folder / "1.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "released": False, "begun": "1"}))
        barrier, results = context.Barrier(takers), context.Queue()
        processes = [context.Process(target=_contend, args=(folder, barrier, results, n)) for n in range(takers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
        first = results.get(timeout=10)
        assert results.empty(), f"{first} and another one both held it"


def test_nothing_but_the_newest_files_is_left_behind(tmp_path):
    for _ in range(9):
        with held(tmp_path, "night", 60):
            pass
    assert sorted(os.listdir(tmp_path)) == ["7.json", "8.json", "9.json"]


def test_a_storage_that_is_no_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"), held(tmp_path / "file", "night", 60):
        pass
