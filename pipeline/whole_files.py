"""Writes files and folders of a run atomically: they appear whole or not at all, even if the writer is killed."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.errors import SettingsError, StorageError


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or none, even at a power loss, and make its folders. Raises: StorageError."""
    put_in_place(path, lambda temporary: temporary.write_bytes(data))


def put_in_place(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, or a folder of files, at a temporary path, and move it to `path`.

    A folder must not be there yet. Raises: StorageError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        for part in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            file = os.open(part, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        os.replace(temporary, path)
    except OSError as error:
        remove(temporary)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; make room, and the same run started again goes on"
        ) from error


def check_folder(folder: Path, setting: str, fix: str) -> None:
    """Check that a folder can be written or made; leaves nothing behind.

    setting: names the folder in sentences. fix: what the user can do, which ends the sentence.
    Raises: SettingsError where it can never be a folder, StorageError where nothing can be written now.
    """
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
    except PermissionError as error:
        raise StorageError(f"{setting}: {folder} cannot be accessed ({error.strerror}); {fix}") from error
    except (OSError, ValueError) as error:  # the name is too long, or holds a character that no name may
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"{setting}: it cannot be a folder ({why}); {fix}") from error
    if not there.is_dir():
        raise SettingsError(f"{setting}: {there} is not a folder; {fix}")
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise StorageError(f"{setting}: nothing can be written in {there} ({error.strerror}); {fix}") from error


def temporaries(folder: Path) -> list[Path]:
    """Temporaries that killed writers left in a folder and the folders below it."""
    return [path for path in folder.rglob(".*") if path.suffix[1:].isdecimal()]


def remove(path: Path) -> None:
    """Remove a file or a whole folder; nothing is raised when that fails."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
