"""Files of banks kept on the local disk, by digest: shared by banks and processes, and there after a restart.

What is read from here is verified like what comes from the store. A cache that cannot be written only costs time.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from pipeline.bank.content import FileContent, open_file
from pipeline.errors import BankError, StorageError

_log = logging.getLogger(__name__)
DEFAULT_LIMIT = 4 * 2**30
_DIGESTS, _MOVES, _STATEMENTS = "sha256", "moves", "statements"
_LOOKS = 32
"""How often the folder is looked through while as much as it may hold is written to it."""


def default_cache() -> Path | None:
    """`$PROMPT_BANK_CACHE`, or `promptbank` in the user's cache folder; None for a user without a home."""
    own = os.environ.get("PROMPT_BANK_CACHE")
    try:
        return Path(own or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "promptbank").expanduser()
    except RuntimeError:
        _log.warning("this user has no home folder, so nothing is cached; set PROMPT_BANK_CACHE")
        return None


class Cache:
    """A folder of at most `limit` bytes, give or take a few percent; what was not used for longest leaves first."""

    def __init__(self, folder: str | Path, limit: int = DEFAULT_LIMIT) -> None:
        self._folder = Path(folder).expanduser()
        self._limit = limit
        self._unchecked = limit  # bytes written since the folder was last looked through; at first unknown

    def where(self, digest: str) -> str:
        return str(self._folder / _DIGESTS / digest)

    def find(self, digest: str) -> FileContent | None:
        """The file that was kept under a digest, to be verified by the caller."""
        path = self.where(digest)
        try:
            content = FileContent(open_file(path), lambda error: StorageError(f"cannot read {path}: {error}"))
        except (OSError, BankError):
            return None
        with suppress(OSError):
            os.utime(path)  # used now
        return content

    def keep(self, digest: str, data: bytes) -> None:
        self._write(self._folder / _DIGESTS / digest, data)
        self._unchecked += len(data)
        if self._unchecked > self._limit / _LOOKS:  # looking through many files at every write would be slow
            self._unchecked = 0
            self._forget_oldest()

    def drop(self, digest: str) -> None:
        with suppress(OSError):
            os.unlink(self.where(digest))

    def keep_move(self, uri: str, alias: str, data: bytes) -> None:
        """Remember where an alias of a bank stood, for a start while the store is gone."""
        if self.last_move(uri, alias) != data:
            self._write(self._move_path(uri, alias), data)

    def last_move(self, uri: str, alias: str) -> bytes | None:
        with suppress(OSError, BankError), open(open_file(self._move_path(uri, alias)), "rb") as file:
            return file.read()
        return None

    def keep_statements(self, uri: str, statements: Sequence[bytes]) -> None:
        """Remember what a bank's statements on backbones were, for a start while the store is gone."""
        if self.last_statements(uri) != list(statements):
            document = json.dumps([each.decode(errors="replace") for each in statements])
            self._write(self._statements_path(uri), document.encode())

    def last_statements(self, uri: str) -> list[bytes] | None:
        """Oldest first, to be verified by the caller."""
        with suppress(OSError, BankError, ValueError), open(open_file(self._statements_path(uri)), "rb") as file:
            return [str(each).encode() for each in json.load(file)]
        return None

    def _statements_path(self, uri: str) -> Path:
        return self._folder / _STATEMENTS / f"{hashlib.sha256(uri.encode()).hexdigest()}.json"

    def _move_path(self, uri: str, alias: str) -> Path:
        return self._folder / _MOVES / hashlib.sha256(uri.encode()).hexdigest() / f"{alias}.json"

    def _write(self, path: Path, data: bytes) -> None:
        temporary = path.with_name(f".{uuid4().hex}.tmp")
        with self._only_a_warning():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(data)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def _forget_oldest(self) -> None:
        with self._only_a_warning():
            files = [(item.stat(), item.path) for item in os.scandir(self._folder / _DIGESTS) if item.is_file()]
            total = sum(stat.st_size for stat, _ in files)
            for stat, path in sorted(files, key=lambda file: file[0].st_mtime):
                if total <= self._limit:
                    return
                with suppress(FileNotFoundError):
                    os.unlink(path)
                total -= stat.st_size

    @contextmanager
    def _only_a_warning(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _log.warning("the cache %s cannot be used: %s; the bank is read without it", self._folder, error)
