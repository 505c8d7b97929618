"""Files of a run that are there whole or not at all, whatever ends their writer."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from pipeline.errors import StorageError


def write_atomically(path: Path, data: bytes) -> None:
    """The whole file or none, also after a loss of power; folders are made. Raises: StorageError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StorageError(
            f"cannot write {path}: {error.strerror}; make room, and the same run started again goes on"
        ) from error


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
