"""Shard folders that are being built, each known by the lock that its builder holds in it, so that a dead one's can go.

A lock ends with its process, however that ended. It is believed on the host where it was taken only: over a network
file system another host may not see it, and waits for a day instead.
"""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_LOCK = ".built-here"
_ABANDONED_AFTER_S = 24 * 3600


@contextmanager
def being_built(folder: Path) -> Iterator[None]:
    """Make the folder, and hold it as this process's; at the end it is removed, unless it has moved away.

    Raises: OSError.
    """
    try:
        folder.mkdir(parents=True)
        with (folder / _LOCK).open("w") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(socket.gethostname())
            lock.flush()
            yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mark_finished(folder: Path) -> None:
    """Take the lock out, before the folder gets its final name. Raises: OSError."""
    (folder / _LOCK).unlink()


def remove_abandoned(parent: Path) -> None:
    """Remove the hidden folders in `parent` whose builders are dead: they count for nothing, but fill the disk."""
    for folder in parent.glob(".*"):
        with suppress(OSError):  # its builder may be done with it just now
            if _is_abandoned(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    with suppress(OSError), (folder / _LOCK).open("r+") as lock:
        if lock.read() == socket.gethostname():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True
    # Without a lock, of another host, or on a file system that has none:
    return time.time() - os.stat(folder).st_mtime > _ABANDONED_AFTER_S
