"""Where a bank's bytes live: a few operations on keys such as `versions/3.json`.

The rest of this package knows only `Store`, which a local folder and an object store implement.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.bank.content import Content
from pipeline.errors import BankError

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class StoredFile:
    """A file directly under a folder."""

    name: str
    size: int
    """Bytes."""
    modified: float
    """When it was written, in seconds since 1970."""


class Store(Protocol):
    """Bytes under keys. A key once created never changes, and appears whole or not at all."""

    uri: str

    def where(self, key: str) -> str:
        """The key's full location, for messages."""

    def open(self, key: str, limit: int) -> Content:
        """Raises: MissingFileError; BankError when above `limit` bytes; StorageError when unreadable."""

    def read(self, key: str, limit: int) -> bytes:
        """Everything under the key. Raises: as `open`."""

    def create(self, key: str, data: bytes) -> bool:
        """Write durably and atomically; False when the key exists already.

        Where an answer can get lost, equal bytes under the key count as written by this call, except a blob's.
        Raises: BankError when the store cannot do that, StorageError.
        """

    def check_fit(self) -> None:
        """Check that the store can keep a bank, before any work is done; leaves nothing behind.

        Raises: BankError when it cannot create a key only if it is absent, StorageError when nothing can be written.
        """

    def renew(self, key: str, data: bytes) -> None:
        """Set the modification time of a key that holds `data` to now. Raises: StorageError."""

    def exists(self, key: str) -> bool:
        """Raises: StorageError."""

    def list_names(self, folder: str) -> Sequence[str]:
        """Names of files and folders directly under `folder`, unsorted. Raises: StorageError."""

    def list_files(self, folder: str) -> Sequence[StoredFile]:
        """Files directly under `folder`, unsorted. Raises: StorageError."""

    def list_leftovers(self) -> dict[str, StoredFile]:
        """Temporaries and probes of killed writers, by names that `delete` takes. Raises: StorageError."""

    def delete(self, key: str) -> None:
        """Delete a key, which only the collector does; a missing key is no error. Raises: StorageError."""


def check_key(key: str, uri: str) -> list[str]:
    """The key's segments. Raises: BankError when it could climb out of the bank."""
    segments = key.split("/")
    if not all(map(_SEGMENT.fullmatch, segments)):
        raise BankError(f"the name {key!r} is refused: it could climb out of the bank {uri}")
    return segments
