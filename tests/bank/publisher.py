"""Publishers as processes of their own, run as a script by the tests: each mode prints one JSON line.

The processes are forked from this small single-threaded one, never from pytest, which may hold torch and Ray.
"""

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.bank import PromptBank
from pipeline.bank.access import BankAccess, open_store
from pipeline.errors import StorageError
from tests.bank.conftest import make_prompt, publish

KILLED = 77


def fork(work: Callable[[], None]) -> int:
    """Run `work` in a child; its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def exit_code(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def rounds(uri: str, publisher: str, count: str) -> dict[str, Any]:
    """Publish `count` versions with one new prompt each, as soon as stdin is closed."""
    bank = PromptBank.open(uri, create=True)
    print("ready", flush=True)
    sys.stdin.read()
    names = [f"{publisher}-{i}" for i in range(int(count))]
    return {name: publish(bank, make_prompt(name, value=i)) for i, name in enumerate(names)}


def killed(folder: str, level: str) -> dict[str, Any]:
    """Kill a publisher at its k-th step, for every k, and see what readers and the next publisher find."""
    steps = 0
    visible = []
    while True:
        uri = tempfile.mkdtemp(dir=folder)
        publish(PromptBank.open(uri, create=True), make_prompt("sst2", 1), make_prompt("trec", 2))
        pid = fork(lambda uri=uri, k=steps: _publish_until(uri, level, k))
        code = exit_code(pid)
        visible.append(check_after(uri))
        if code == 0:
            return {"steps": steps, "visible": visible}
        assert code == KILLED, f"the publisher broke at step {steps}"
        steps += 1


def killed_at(uri: str, k: str) -> None:
    """Publish to any store, killed after the store's k-th operation."""
    _publish_until(uri, "store operations", int(k))


def _publish_until(uri: str, level: str, k: int) -> None:
    counter = iter(range(k))
    store = open_store(uri, create=False)
    if level == "system calls":
        for name in ("open", "mkdir", "fsync", "link", "unlink"):
            setattr(os, name, _dying(getattr(os, name), counter))
    else:
        for name in ("open", "create", "renew", "list_names", "exists"):
            setattr(store, name, _dying(getattr(store, name), counter))
    publish(PromptBank(BankAccess(store), "latest"), make_prompt("sst2", 3), make_prompt("cr", 4))


def _dying(operation: Callable[..., Any], counter: Iterator[int]) -> Callable[..., Any]:
    def step(*args: Any, **kwargs: Any) -> Any:
        result = operation(*args, **kwargs)
        if next(counter, None) is None:
            os._exit(KILLED)
        return result

    return step


def check_after(uri: str) -> int:
    """See that readers and the next publisher find all that was published; the version that was visible."""
    bank = PromptBank.open(uri)
    first = {name: bank.load(f"{name}@1").array for name in ("sst2", "trec")}
    assert (first["sst2"] == make_prompt("sst2", 1).array).all()
    seen = bank.version
    expected = {1: make_prompt("sst2", 1), 2: make_prompt("sst2", 3)}[seen]
    assert (bank.load("sst2").array == expected.array).all()
    assert (bank.load("trec").array == first["trec"]).all()
    newest = bank.versions()[-1]
    assert publish(bank, make_prompt("cr", 5)) == newest + 1 == bank.version
    assert (bank.load("cr").array == make_prompt("cr", 5).array).all()
    assert bank.load("sst2").record.tuned_in == newest
    return seen


def full(folder: str) -> dict[str, Any]:
    """Publish on a file system with k free pages left, for k = 0, 1, …, until it goes through."""
    uri = Path(folder) / "bank"
    bank = PromptBank.open(uri, create=True)
    publish(bank, make_prompt("sst2", 1))
    sentences = []
    for pages in range(100):
        _fill(Path(folder), pages)
        try:
            version = publish(PromptBank.open(uri), make_prompt("sst2", pages + 2))
        except StorageError as error:
            sentences.append(str(error))
            assert (PromptBank.open(uri).load("sst2").array == make_prompt("sst2", 1).array).all()
            assert not [name for _, _, names in os.walk(uri) for name in names if name.startswith(".")]
        else:
            assert PromptBank.open(uri).version == version == bank.versions()[-1]
            assert (PromptBank.open(uri).load("sst2").array == make_prompt("sst2", pages + 2).array).all()
            return {"sentences": sentences}
    raise AssertionError("never went through")


def _fill(folder: Path, free_pages: int) -> None:
    filler = folder / "filler"
    filler.unlink(missing_ok=True)
    free = os.statvfs(folder)
    with filler.open("wb") as file:
        file.write(bytes((free.f_bavail - free_pages) * free.f_bsize))


def denied(folder: str) -> dict[str, Any]:
    """Publish, as a user who is not root, into a bank that this user may only read."""
    uri = Path(folder) / "bank"
    publish(PromptBank.open(uri, create=True), make_prompt("sst2", 1))
    for path in (uri, *uri.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    if os.geteuid() == 0:
        os.setuid(65534)
    try:
        publish(PromptBank.open(uri), make_prompt("sst2", 2))
    except StorageError as error:
        return {"sentence": str(error), "version": PromptBank.open(uri).version}
    raise AssertionError("published without permission")


if __name__ == "__main__":
    modes = {work.__name__: work for work in (rounds, killed, killed_at, full, denied)}
    print(json.dumps(modes[sys.argv[1]](*sys.argv[2:])))
