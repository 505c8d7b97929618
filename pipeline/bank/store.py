"""Where a bank's bytes live: a few operations on keys such as `versions/3.json`.

`Store` is what the rest of the room knows; a local folder and an object store offer it alike.
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

        Where an answer can get lost, equal bytes under the key count as one's own, and are True; not a blob's.
        Raises: BankError when the store cannot keep to that, StorageError.
        """

    def check_fit(self) -> None:
        """What `create` would refuse whatever it is given, before any work; leaves nothing behind.

        Raises: BankError when the store cannot keep what it must, StorageError when nothing can be written.
        """

    def renew(self, key: str, data: bytes) -> None:
        """Make a key that holds `data` as young as if it had just been created. Raises: StorageError."""

    def exists(self, key: str) -> bool:
        """Raises: StorageError."""

    def list_names(self, folder: str) -> Sequence[str]:
        """Names of files and folders directly under `folder`, unsorted. Raises: StorageError."""

    def list_files(self, folder: str) -> Sequence[StoredFile]:
        """Files directly under `folder`, unsorted. Raises: StorageError."""

    def list_leftovers(self) -> dict[str, StoredFile]:
        """What killed writers left that is no key, by a name that `delete` takes. Raises: StorageError."""

    def delete(self, key: str) -> None:
        """Only the collector calls this. A key that is missing is no error. Raises: StorageError."""


def check_key(key: str, uri: str) -> list[str]:
    """The key's segments. Raises: BankError when it could climb out of the bank."""
    segments = key.split("/")
    if not all(map(_SEGMENT.fullmatch, segments)):
        raise BankError(f"the name {key!r} is refused: it could climb out of the bank {uri}")
    return segments
