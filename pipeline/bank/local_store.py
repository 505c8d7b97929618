"""A bank in a folder, on a file system with hard links."""

import errno
import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from pipeline.bank.content import FileContent, open_file
from pipeline.bank.store import StoredFile, check_key
from pipeline.errors import BankError, MissingFileError, StorageError, UnreachableError

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")

# What a network file system answers while its server is away.
_PASSING = (
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.ECONNREFUSED,
)


def open_local_store(root: Path, create: bool) -> "LocalStore":
    """Raises: BankError when the folder is missing, StorageError when it cannot be made or read."""
    try:
        if create:
            _make_folder(root)
        found = root.is_dir()
    except OSError as error:
        raise _storage_error("write" if create else "read", root)(error) from error
    if not found:
        raise BankError(f"there is no prompt bank at {root}: publish to it first, or mend the path")
    return LocalStore(root)


class LocalStore:
    """Keys are paths below a folder; a temporary's name begins with a dot. See `store.Store`."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.uri = str(root)

    def where(self, key: str) -> str:
        return str(self._root / key)

    def open(self, key: str, limit: int) -> FileContent:
        path = self._path(key)
        try:
            content = FileContent(open_file(path), _storage_error("read", path))
        except OSError as error:
            raise _unread(path, error) from error
        if content.size > limit:
            raise BankError(f"{path} is refused: {content.size:,} bytes, above the limit of {limit:,}")
        return content

    def read(self, key: str, limit: int) -> bytes:
        content = self.open(key, limit)
        return content.read(0, content.size)

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        try:
            _make_folder(path.parent)
            created = not os.path.lexists(path) and _link_new(path, data)
            # Also when it existed: its creator may not have come as far as this line.
            _sync_folder(path.parent)
        except OSError as error:
            raise _storage_error("write", path)(error) from error
        return created

    def check_fit(self) -> None:
        """As `Store.check_fit`: whether the folder takes a file and a hard link."""
        probe = self._root / f".{uuid4().hex}.tmp"  # the collector takes what a kill leaves
        try:
            _link_new(probe, b"")
            probe.unlink()
        except OSError as error:
            raise _storage_error("write", self._root)(error) from error

    def renew(self, key: str, data: bytes) -> None:
        path = self._path(key)
        try:
            _make_folder(path.parent)
            _replace(path, data)  # not utime, which another user's file refuses
            _sync_folder(path.parent)
        except OSError as error:
            raise _storage_error("write", path)(error) from error

    def exists(self, key: str) -> bool:
        return os.path.exists(self._path(key))

    def list_names(self, folder: str) -> tuple[str, ...]:
        path = self._path(folder)
        try:
            return tuple(name for name in os.listdir(path) if not name.startswith("."))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise _unlisted(path, error) from error

    def list_files(self, folder: str) -> tuple[StoredFile, ...]:
        path = self._path(folder)
        return tuple(entry for entry in _files(path) if not entry.name.startswith("."))

    def list_leftovers(self) -> dict[str, StoredFile]:
        folders = [
            "",
            "blobs",
            "blobs/sha256",
            "versions",
            "backbones",
            "aliases",
            *(f"aliases/{x}" for x in self._aliases()),
        ]
        return {
            str(Path(folder, entry.name)): entry
            for folder in folders
            for entry in _files(self._root / folder)
            if _TEMPORARY.fullmatch(entry.name)
        }

    def _aliases(self) -> list[str]:
        return [name for name in self.list_names("aliases") if (self._root / "aliases" / name).is_dir()]

    def delete(self, key: str) -> None:
        path = self._root / key if _TEMPORARY.fullmatch(key.rpartition("/")[2]) else self._path(key)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _storage_error("delete", path)(error) from error

    def _path(self, key: str) -> Path:
        return self._root.joinpath(*check_key(key, self.uri))


def _files(folder: Path) -> list[StoredFile]:
    try:
        with os.scandir(folder) as scan:
            return [entry for item in scan if (entry := _stored_file(item))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unlisted(folder, error) from error


def _stored_file(item: os.DirEntry[str]) -> StoredFile | None:
    """None for what is no file."""
    try:
        if item.is_file():
            stat = item.stat()
            return StoredFile(item.name, stat.st_size, stat.st_mtime)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):  # gone while we looked, or a link in a circle
            raise
    return None


def _unread(path: Path, error: OSError) -> BankError | StorageError:
    if error.errno == errno.ELOOP or (path.is_symlink() and isinstance(error, FileNotFoundError)):
        return BankError(f"{path} is refused: it is a link that leads nowhere; remove it, or put the file back")
    if isinstance(error, FileNotFoundError):
        return MissingFileError(f"{path} is missing")
    return _storage_error("read", path)(error)


def _unlisted(path: Path, error: OSError) -> BankError | StorageError:
    if isinstance(error, NotADirectoryError) and os.path.lexists(path):  # else the bank's own folder is gone
        return BankError(f"{path} is refused: it is none of the bank's folders but something else; remove it")
    return _storage_error("read", path)(error)


def _link_new(path: Path, data: bytes) -> bool:
    temporary = _write_temporary(path, data)
    try:
        os.link(temporary, path)  # atomic, and fails where a rename would replace
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def _replace(path: Path, data: bytes) -> None:
    temporary = _write_temporary(path, data)
    try:
        os.replace(temporary, path)
    except OSError:
        os.unlink(temporary)
        raise


def _write_temporary(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f".{uuid4().hex}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        os.unlink(temporary)
        raise
    return temporary


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


def _storage_error(action: str, path: Path) -> Callable[[OSError], StorageError]:
    def failure(error: OSError) -> StorageError:
        kind = UnreachableError if error.errno in _PASSING else StorageError
        return kind(f"cannot {action} {path}: {_why(action, error)}")

    return failure


def _why(action: str, error: OSError) -> str:
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return "the disk is full; free some space and run again"
        case errno.EACCES | errno.EROFS:
            return f"permission denied; let this user {action} there, or choose another folder"
        case errno.EPERM | errno.EOPNOTSUPP:
            return "the file system refuses it; a bank needs one with hard links"
        case _:
            return error.strerror or str(error)
