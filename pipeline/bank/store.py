"""Where a bank's bytes live: four operations on keys such as `versions/3.json`.

`Store` is what the rest of the room knows; an object store needs only to offer the same.
"""

import errno
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Protocol
from uuid import uuid4

from pipeline.errors import BankError, StorageError

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


class Store(Protocol):
    """Bytes under keys. A key once created never changes, and appears whole or not at all."""

    def where(self, key: str) -> str:
        """The key's full location, for messages."""

    def read(self, key: str, limit: int) -> bytes:
        """Raises: BankError when missing or above `limit` bytes; StorageError when unreadable."""

    def create(self, key: str, data: bytes) -> bool:
        """Write durably and atomically; False when the key exists already. Raises: StorageError."""

    def list_names(self, folder: str) -> tuple[str, ...]:
        """Names directly under `folder`, unsorted, empty when there is none. Raises: StorageError."""

    def exists(self, key: str) -> bool: ...


def open_store(uri: str | Path, create: bool) -> Store:
    """The store at a folder path or `file://` URI; `create` makes the folder.

    Raises: BankError for another scheme or a missing folder, StorageError when it cannot be made.
    """
    scheme = _SCHEME.fullmatch(str(uri))
    if scheme and scheme[1] != "file":
        raise BankError(f"{uri}: object stores ({scheme[1]}://) are not there yet; give the bank as a local folder")
    root = Path(scheme[2] if scheme else uri).expanduser()
    try:
        if create:
            _make_folder(root)
        found = root.is_dir()
    except OSError as error:
        raise _storage_error("write" if create else "read", root, error) from error
    if not found:
        raise BankError(f"there is no prompt bank at {root}: publish to it first, or mend the path")
    return LocalStore(root)


class LocalStore:
    """A folder on a file system with hard links."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def where(self, key: str) -> str:
        return str(self._root / key)

    def read(self, key: str, limit: int) -> bytes:
        path = self._path(key)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > limit:
                    raise BankError(f"{path} is refused: {size:,} bytes, above the limit of {limit:,}")
                return file.read(size)
        except FileNotFoundError as error:
            raise BankError(f"{path} is missing") from error
        except OSError as error:
            raise _storage_error("read", path, error) from error

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        try:
            _make_folder(path.parent)
            created = not os.path.lexists(path) and _link_new(path, data)
            # Also when it existed: its creator may not have come as far as this line.
            _sync_folder(path.parent)
        except OSError as error:
            raise _storage_error("write", path, error) from error
        return created

    def list_names(self, folder: str) -> tuple[str, ...]:
        path = self._path(folder)
        try:
            # Dotted names are temporaries that a killed publisher left.
            return tuple(name for name in os.listdir(path) if not name.startswith("."))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise _storage_error("read", path, error) from error

    def exists(self, key: str) -> bool:
        return os.path.exists(self._path(key))

    def _path(self, key: str) -> Path:
        segments = key.split("/")
        if not all(map(_SEGMENT.fullmatch, segments)):
            raise BankError(f"the name {key!r} is refused: it could climb out of the bank {self._root}")
        return self._root.joinpath(*segments)


def _link_new(path: Path, data: bytes) -> bool:
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.link(temporary, path)  # atomic, and fails where a rename would replace
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder != folder.parent:
        _make_folder(folder.parent)
    with suppress(FileExistsError):
        os.mkdir(folder)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_error(action: str, path: Path, error: OSError) -> StorageError:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            why = "the disk is full; free some space and run again"
        case errno.EACCES | errno.EROFS:
            why = f"permission denied; let this user {action} there, or choose another folder"
        case errno.EPERM | errno.EOPNOTSUPP:
            why = "the file system refuses it; a bank needs one with hard links"
        case _:
            why = error.strerror or str(error)
    return StorageError(f"cannot {action} {path}: {why}")
