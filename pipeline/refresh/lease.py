"""One night at a time: a lease in the run's storage, which every node sees.

    <storage>/.leases/<run name>/<n>.json     n = 1, 2, 3, …

The file with the highest number is the lease; it says who holds it, and that it was given back once it was. To take
it is to create the next number, fully written beforehand and linked into place, which fails where the number is there:
of any number of takers, exactly one succeeds, also when all of them found the same dead holder. A number is never used
twice, for the highest file is never deleted.

A holder renews its file's time of change in a thread; a lease that was not renewed for `expiry` seconds is free. Times
are those of the file system, so clocks of nodes need not agree. A holder whose own lease expired (its process was
stopped for so long) has lost it, whether or not somebody took it, and `check` says so. What remains: a process stopped
between `check` and what it guards. So little is done in between, and a publication is atomic by itself.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.errors import LeaseError, StorageError
from pipeline.whole_files import write_atomically

_NUMBERED = re.compile(r"([1-9][0-9]*)\.json")
_KEPT = 3
"""Files: the newest, and some before it for people to look at."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, for people."""

    run: str
    host: str
    pid: int
    taken: float
    """Unix seconds, by the holder's clock."""
    released: bool = False


class Lease:
    """A lease that was taken."""

    def __init__(self, folder: Path, number: int, holder: Holder, expiry: float) -> None:
        self._folder = folder
        self._number = number
        self._holder = holder
        self._expiry = expiry
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises: LeaseError when this night holds the lease no longer; StorageError when that cannot be told."""
        try:
            self._renew()
        except OSError as error:
            raise StorageError(f"cannot renew the lease {self._path}: {error.strerror}; mend its access") from error
        if self._lost:
            raise LeaseError(f"{self._lost}; this night publishes nothing more")

    def release(self) -> None:
        """Give it back, unless it was lost."""
        self._ended.set()
        self._thread.join()
        with self._lock, suppress(OSError):
            if self._lost is None and _newest(self._folder) == self._number:
                write_atomically(self._path, _encoded(replace(self._holder, released=True)))

    @property
    def _path(self) -> Path:
        return self._folder / f"{self._number}.json"

    def _keep(self) -> None:
        while not self._ended.wait(self._expiry / 4):
            with suppress(OSError):  # a storage that is gone for a while: the lease's age decides when it is back
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            try:
                if self._lost is None:
                    self._lost = self._reason_for_loss()
                if self._lost is None:
                    os.utime(self._path)
            except FileNotFoundError:
                self._lost = f"the lease {self._path} was deleted"

    def _reason_for_loss(self) -> str | None:
        newest = _newest(self._folder)
        if newest != self._number:
            taker = _read(self._folder / f"{newest}.json")
            return (
                f"another night ({taker.run} on {taker.host}) has taken over the lease"
                if taker
                else "the lease is lost"
            )
        if _age(self._path) > self._expiry:
            return f"this night gave no sign of life for more than {self._expiry:g} seconds, and so lost its lease"
        return None


@contextmanager
def held(folder: Path, run: str, expiry: float, wait: float = 0) -> Iterator[Lease]:
    """Hold the lease in `folder`, after waiting for another holder for at most `wait` seconds.

    Raises: LeaseError when another one holds it still, StorageError when the folder cannot be written.
    """
    deadline = time.monotonic() + wait
    while (lease := _take(folder, run, expiry)) is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise LeaseError(_who_holds(folder, wait))
        time.sleep(min(left, 1.0, expiry / 4))
    try:
        yield lease
    finally:
        lease.release()


def _take(folder: Path, run: str, expiry: float) -> Lease | None:
    """The lease, None while another night holds it."""
    holder = Holder(run, socket.gethostname(), os.getpid(), time.time())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        newest = _newest(folder)
        if newest and not _is_free(folder / f"{newest}.json", expiry):
            return None
        if not _link(folder / f"{newest + 1}.json", holder):
            return None
        for number in range(max(1, newest + 2 - _KEPT - 20), newest + 2 - _KEPT):
            (folder / f"{number}.json").unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write the lease in {folder}: {error.strerror}; mend its access") from error
    return Lease(folder, newest + 1, holder, expiry)


def _is_free(path: Path, expiry: float) -> bool:
    try:
        holder = _read(path)
        return (holder is not None and holder.released) or _age(path) > expiry
    except FileNotFoundError:  # a later number is there meanwhile, and old ones were swept
        return False


def _newest(folder: Path) -> int:
    numbers = [int(match[1]) for name in os.listdir(folder) if (match := _NUMBERED.fullmatch(name))]
    return max(numbers, default=0)


def _age(path: Path) -> float:
    """Seconds since a file was written or renewed, by the clock of its file system."""
    probe = path.with_name(f".clock.{uuid.uuid4().hex}")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _link(path: Path, holder: Holder) -> bool:
    """Create the file whole, or not at all; False when it is there already."""
    whole = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        whole.write_bytes(_encoded(holder))
        os.link(whole, path)
    except FileExistsError:
        return False
    finally:
        whole.unlink(missing_ok=True)
    return True


def _encoded(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode() + b"\n"


def _read(path: Path) -> Holder | None:
    """Raises: FileNotFoundError."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (ValueError, TypeError):  # not written by this
        return None


def _who_holds(folder: Path, wait: float) -> str:
    with suppress(OSError):
        holder = _read(folder / f"{_newest(folder)}.json")
        if holder is not None:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder.taken))
            waited = f", also after {wait:g} seconds" if wait else ""
            return (
                f"night '{holder.run}' (process {holder.pid} on {holder.host}, since {since}) holds the lease{waited}; "
                "let it end, or set refresh.wait_for_lease"
            )
    return f"another night holds the lease in {folder}; let it end, or set refresh.wait_for_lease"
