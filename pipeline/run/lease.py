"""One start of a run at a time: a lease in the run's storage, which every node sees.

    <run folder>/lease/<n>.json     n = 1, 2, 3, …; that of the nights of a run: <storage>/.leases/<run name>/<n>.json

The file with the highest number is the lease; it says who holds it, and that it was given back once it was. To take
it is to create the next number, fully written beforehand and linked into place, which fails where the number is there:
of any number of takers, exactly one succeeds, also when all of them found the same dead holder. A number is never used
twice, for the highest file is never deleted.

A holder's beat is its file's time of change, which a thread renews. Nobody compares it with a clock: who wants the
lease watches by its own monotonic clock whether it changes. If it does, the holder lives; if it does not for `expiry`
seconds, the lease is free. So a clock that is set, or is wrong on one node, changes nothing. A holder in a process of
this system that is gone is dead at once: a killed run that is started again goes on without waiting.

A holder that could not beat for `expiry` seconds (its process was stopped) takes its own lease anew before it goes on;
where somebody else was faster, it has lost it, and `check` says so. What remains: a process stopped between `check` and
what it guards. So little is done in between, and a publication is atomic by itself.
"""

import errno
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
_UNSEEN = "unseen"
_KEPT = 3
"""Files: the newest, and some before it for people to look at."""


_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_BEATS_A_EXPIRY = 4
_LONGEST_BEAT_S = 2.0
"""So long does a second start watch a holder that lives."""
EXPIRY_S = 60.0
"""Of a run's lease: longer than a network file system shows an old time of change."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease: told to people, and used by processes of the same system to see whether the holder lives."""

    run: str
    host: str
    pid: int
    taken: float
    """Unix seconds, by the holder's clock."""
    released: bool = False
    system: str = ""
    """The system's boot and the process' namespace: there, and there alone, `pid` and `begun` name a process."""
    begun: str = ""
    """When the process began, in ticks since the boot: a process number is reused, one with its beginning is not."""

    def is_gone(self) -> bool:
        """Whether its process is known to have ended; False where that is not known."""
        return bool(self.begun) and self.system == _system() and _begun(self.pid) not in (self.begun, _UNSEEN)


class Lease:
    """A lease that was taken."""

    def __init__(self, folder: Path, number: int, holder: Holder, expiry: float) -> None:
        self._folder = folder
        self._number = number
        self._holder = holder
        self._expiry = expiry
        self._renewed = time.monotonic()
        self._lost: str | None = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises: LeaseError when this start holds the lease no longer; StorageError when that cannot be told."""
        try:
            self._renew()
        except OSError as error:
            raise StorageError(f"cannot renew the lease {self._path}: {error.strerror}; fix its access") from error
        if self._lost:
            raise LeaseError(f"{self._lost}; this one publishes nothing more")

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
        while not self._ended.wait(min(self._expiry / _BEATS_A_EXPIRY, _LONGEST_BEAT_S)):
            with suppress(OSError):  # a storage that is gone for a while
                self._renew()

    def _renew(self) -> None:
        with self._lock:
            if self._lost is not None:
                return
            try:
                newest = _newest(self._folder)
                begun = time.monotonic()
                late = begun - self._renewed > self._expiry
                if newest != self._number or (late and not self._take_anew()):
                    self._lost = self._reason_for_loss()
                    return
                os.utime(self._path)
                self._renewed = begun
            except FileNotFoundError:
                self._lost = f"the lease {self._path} was deleted"

    def _take_anew(self) -> bool:
        """Whether the lease is still this holder's: after too long without a sign of life others may take it."""
        if _link(self._folder / f"{self._number + 1}.json", self._holder):
            self._number += 1
            return True
        return False

    def _reason_for_loss(self) -> str:
        taker = _read(self._folder / f"{_newest(self._folder)}.json")
        who = f" ({taker.run} on {taker.host})" if taker else ""
        return f"another start{who} has taken over the lease"


@contextmanager
def held(folder: Path, run: str, expiry: float, wait: float = 0, what: str = "night") -> Iterator[Lease]:
    """Hold the lease in `folder`, after waiting for another holder for at most `wait` seconds.

    Whether that one lives is watched first, for `expiry` seconds at most; a living one shows it within two.
    what: is started, for sentences. Raises: LeaseError when another one holds it still, StorageError when the folder
    cannot be written.
    """
    deadline = time.monotonic() + wait
    watch = _Watch(folder, expiry)
    while (lease := _take(folder, run, watch)) is None:
        if watch.lives and time.monotonic() >= deadline:
            raise LeaseError(_who_holds(folder, wait, what))
        time.sleep(min(1.0, expiry / 8))
    try:
        yield lease
    finally:
        lease.release()


@contextmanager
def run_lease(folder: Path, run: str) -> Iterator[Lease]:
    """The lease of a run's folder; a second start leaves at once. Raises: LeaseError, StorageError."""
    with held(folder / "lease", run, EXPIRY_S, what="run") as lease:
        yield lease


class _Watch:
    """Watches another holder's lease, by this process' own monotonic clock."""

    def __init__(self, folder: Path, expiry: float) -> None:
        self.expiry = expiry
        self.lives = False
        """Whether the holder showed itself since this watch began."""
        self._folder = folder
        self._seen: tuple[int, int] | None = None
        self._since = 0.0

    def is_free(self, number: int) -> bool:
        path = self._folder / f"{number}.json"
        try:
            holder, beat = _read(path), _beat(path)
        except FileNotFoundError:  # a later number is there meanwhile, and old ones were swept
            return False
        if holder is not None and (holder.released or holder.is_gone()):
            return True
        if self._seen != (number, beat):
            self.lives = self._seen is not None
            self._seen, self._since = (number, beat), time.monotonic()
        return time.monotonic() - self._since > self.expiry


def _take(folder: Path, run: str, watch: _Watch) -> Lease | None:
    """The lease, None while another start holds it."""
    pid = os.getpid()
    holder = Holder(run, socket.gethostname(), pid, time.time(), system=_system(), begun=_begun(pid))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        newest = _newest(folder)
        if newest and not watch.is_free(newest):
            return None
        if not _link(folder / f"{newest + 1}.json", holder):
            return None
        for number in range(max(1, newest + 2 - _KEPT - 20), newest + 2 - _KEPT):
            (folder / f"{number}.json").unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write the lease in {folder}: {error.strerror}; fix its access") from error
    return Lease(folder, newest + 1, holder, watch.expiry)


def _newest(folder: Path) -> int:
    numbers = [int(match[1]) for name in os.listdir(folder) if (match := _NUMBERED.fullmatch(name))]
    return max(numbers, default=0)


def _beat(path: Path) -> int:
    """Read by opening it, since only then does a network file system ask its server."""
    with path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _system() -> str:
    """The system and namespace of this process; empty where Linux does not tell."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _begun(pid: int) -> str:
    """When a process began; empty when it has ended, `_UNSEEN` where /proc does not tell."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return "" if _has_ended(pid) else _UNSEEN
    return "" if fields[0] in "ZX" else fields[19]  # a zombie has ended, and waits for its parent


def _has_ended(pid: int) -> bool:
    """Whether no such process exists; that of another user exists even where /proc hides it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _link(path: Path, holder: Holder) -> bool:
    """Create the file whole, or not at all; False when it is there already."""
    whole = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        whole.write_bytes(_encoded(holder))
        os.link(whole, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _create(path, holder)
    finally:
        whole.unlink(missing_ok=True)
    return True


def _create(path: Path, holder: Holder) -> bool:
    """For file systems without hard links. Read before it is whole, the file names no holder, and is only watched."""
    try:
        with path.open("xb") as file:
            file.write(_encoded(holder))
    except FileExistsError:
        return False
    return True


def _encoded(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode() + b"\n"


def _read(path: Path) -> Holder | None:
    """Raises: FileNotFoundError."""
    try:
        return Holder(**json.loads(path.read_text()))
    except (ValueError, TypeError):  # not written by this
        return None


def _who_holds(folder: Path, wait: float, what: str) -> str:
    advice = "or set refresh.wait_for_lease" if what == "night" else "or give this start another run.name"
    with suppress(OSError):
        holder = _read(folder / f"{_newest(folder)}.json")
        if holder is not None:
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(holder.taken))
            waited = f", also after {wait:g} seconds" if wait else ""
            who = f"{what} '{holder.run}' (process {holder.pid} on {holder.host}, since {since})"
            return f"{who} holds the lease{waited}; let it end, {advice}"
    return f"another {what} holds the lease in {folder}; let it end, {advice}"
