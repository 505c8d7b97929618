"""Content of a bank's files: read by ranges, so that a large manifest need not stay in memory."""

import hashlib
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from pipeline.errors import BankError

_BLOCK = 2**16


class Content(Protocol):
    """Bytes that lie somewhere. `read` gives fewer than asked for when they have become fewer."""

    size: int

    def read(self, start: int, end: int) -> bytes:
        """Raises: StorageError."""


class MemoryContent:
    """Content in memory."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read(self, start: int, end: int) -> bytes:
        return self._data[start:end]


_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_file(path: str | Path) -> int:
    """A descriptor of a regular file, or of the one that a link leads to; nothing else is opened, or waited for.

    Raises: BankError when something else lies there, OSError.
    """
    _refuse_other_kinds(path, os.stat(path).st_mode)  # before: to open a device can move it
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO that came in between has no writer to wait for
    try:
        _refuse_other_kinds(path, os.fstat(file).st_mode)
    except BankError:
        os.close(file)
        raise
    return file


def _refuse_other_kinds(path: str | Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "of an unknown kind")
        raise BankError(f"{path} is refused: it is {kind} where a file belongs; remove it, or put the file back")


class FileContent:
    """Content of a file that stays readable after its name is gone; closed when no longer referred to."""

    def __init__(self, file: int, fail: Callable[[OSError], Exception]) -> None:
        self._file = file
        self._fail = fail
        self.size = os.fstat(file).st_size

    def read(self, start: int, end: int) -> bytes:
        try:
            return os.pread(self._file, max(0, end - start), start)
        except OSError as error:
            raise self._fail(error) from error

    def __del__(self, close: Callable[[int], None] = os.close) -> None:  # bound: at exit `os` may be gone
        close(self._file)


class DamagedContentError(Exception):
    """Content is not what it was or should be; the caller knows its name."""


class VerifiedContent:
    """Content whose bytes were hashed once, and are checked again block by block when they are read later.

    The second check tells a disk that changed under an open reader. It is Adler-32, a third of the cost of
    SHA-256, so that a large manifest opens fast; against forgery stands the SHA-256 alone.
    """

    def __init__(self, content: Content, sha256_from: int = 0) -> None:
        """Hash everything from offset `sha256_from` (below one block) on."""
        self._content = content
        self.size = content.size
        total = hashlib.sha256()
        checks = []
        for start in range(0, self.size, _BLOCK):
            block = content.read(start, min(start + _BLOCK, self.size))
            total.update(memoryview(block)[max(0, sha256_from - start) :])
            checks.append(zlib.adler32(block))
        self.sha256 = total.hexdigest()
        self._checks = checks

    def go_on_from(self, content: Content) -> None:
        """Read the same bytes from elsewhere from now on."""
        self._content = content

    def read(self, start: int, end: int) -> bytes:
        """Raises: Damaged when the bytes have changed since, StorageError."""
        first, last = start // _BLOCK, -(-min(end, self.size) // _BLOCK)
        data = self._content.read(first * _BLOCK, min(last * _BLOCK, self.size))
        for block in range(first, last):
            at = (block - first) * _BLOCK
            if zlib.adler32(data[at : at + _BLOCK]) != self._checks[block]:
                raise DamagedContentError
        return data[start - first * _BLOCK : end - first * _BLOCK]

    def find(self, byte: bytes, start: int, end: int) -> int:
        """Offset of the first `byte` in `[start, end)`, -1 when there is none. Raises: Damaged, StorageError."""
        while start < end:
            stop = min(start - start % _BLOCK + _BLOCK, end)
            if (found := self.read(start, stop).find(byte)) >= 0:
                return start + found
            start = stop
        return -1

    def rfind(self, byte: bytes, start: int, end: int) -> int:
        """Offset of the last `byte` in `[start, end)`, -1 when there is none. Raises: Damaged, StorageError."""
        while start < end:
            begin = max(start, (end - 1) // _BLOCK * _BLOCK)
            if (found := self.read(begin, end).rfind(byte)) >= 0:
                return begin + found
            end = begin
        return -1

    def lines(self, start: int, end: int) -> Iterator[bytes]:
        """Lines of `[start, end)` without their line breaks. Raises: Damaged, StorageError."""
        rest = b""
        for at in range(start - start % _BLOCK, end, _BLOCK):
            *whole, rest = (rest + self.read(max(at, start), min(at + _BLOCK, end))).split(b"\n")
            yield from whole
        if rest:
            yield rest
