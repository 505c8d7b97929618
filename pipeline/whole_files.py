"""Files of a run that are there whole or not at all, whatever ends their writer."""

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pipeline.errors import SettingsError, StorageError


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none, also after a loss of power; folders are made. Raises: StorageError."""
    put_in_place(path, lambda temporary: temporary.write_bytes(data))


def put_in_place(path: Path, write: Callable[[Path], object]) -> None:
    """What `write` makes at the path that it is given, a file or a folder of files, in its place whole or not at all.

    A folder must not be there yet. Raises: StorageError.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        for part in sorted(temporary.rglob("*")) if temporary.is_dir() else [temporary]:
            _reach_disk(part)
        os.replace(temporary, path)
    except OSError as error:
        remove(temporary)
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}; make room, and the same run started again goes on"
        ) from error


def _reach_disk(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def check_folder(folder: Path, setting: str, mend: str) -> None:
    """Whether a folder can be written or made; nothing is left behind by looking.

    setting: what names it, for sentences. Raises: SettingsError where it can never be a folder, StorageError where
    nothing can be written now.
    """
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
    except PermissionError as error:
        raise StorageError(f"{setting}: {folder} may not be looked at ({error.strerror}); {mend}") from error
    except (OSError, ValueError) as error:  # a name that is too long, or holds what no name may
        why = getattr(error, "strerror", None) or error
        raise SettingsError(f"{setting}: it can be no folder ({why}); {mend}") from error
    if not there.is_dir():
        raise SettingsError(f"{setting}: {there} is no folder; {mend}")
    try:
        with tempfile.TemporaryFile(dir=there):
            return
    except OSError as error:
        raise StorageError(f"{setting}: nothing can be written in {there} ({error.strerror}); {mend}") from error


def temporaries(folder: Path) -> list[Path]:
    """What writers that were killed within `write_atomically` left in a folder and those below it."""
    return [path for path in folder.rglob(".*") if path.suffix[1:].isdecimal()]


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there and can be."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
