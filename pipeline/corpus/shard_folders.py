"""Shard folders that are being built. Each holds a lock of its builder, so that those of dead builders can be removed.

A lock ends with its process, however that ended. It is trusted only on the host where it was taken: over a network file
system another host may not see it, and waits for a day instead.
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
def being_built(folder: Path) -> Iterator[Path]:
    """Make the folder and lock it for this process. At the end it is removed, with what has not left it by then.

    Raises: OSError.
    """
    try:
        folder.mkdir(parents=True)
        with (folder / _LOCK).open("w") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            lock.write(socket.gethostname())
            lock.flush()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned(parent: Path) -> None:
    """Remove the hidden folders in `parent` whose builders are dead, since they fill the disk."""
    for folder in parent.glob(".*"):
        with suppress(OSError):  # its builder may rename or remove it just now
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
    # There is no lock, or it is another host's, or this file system has none: only the age tells.
    return time.time() - os.stat(folder).st_mtime > _ABANDONED_AFTER_S
