"""What a bank is read through: its store, whom it trusts, and what is kept nearby."""

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.bank.cache import Cache
from pipeline.bank.content import Content, DamagedContentError, VerifiedContent
from pipeline.bank.local_store import open_local_store
from pipeline.bank.manifest import MAX_MANIFEST_BYTES
from pipeline.bank.sealed import Seal, Signature, open_sealed
from pipeline.bank.store import Store
from pipeline.errors import BankError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def open_store(uri: str | Path, create: bool) -> Store:
    """The store at a folder path or `file://` URI, or an object store (`s3://`, `gs://`, `az://`, …).

    `create` makes the folder. Raises: BankError for an unknown scheme or a missing folder,
    StorageError when it cannot be made.
    """
    scheme = _SCHEME.fullmatch(str(uri))
    if scheme and scheme[1] != "file":
        from pipeline.bank.object_store import open_object_store

        return open_object_store(str(uri))
    return open_local_store(Path(scheme[2] if scheme else os.fspath(uri)).expanduser(), create)


def blob_key(digest: str) -> str:
    return f"blobs/sha256/{digest}.safetensors"


@dataclass(frozen=True)
class BankAccess:
    store: Store
    cache: Cache | None = None
    trusted: tuple[str, ...] = ()
    """Public keys, 64 hex digits each; one of them must have signed every manifest. Empty: nobody is asked."""
    sign: Callable[[str], Signature] | None = None
    """What signs the manifests that are published."""

    def open_manifest(self, key: str, digest: str | None) -> tuple[VerifiedContent, Seal]:
        """A manifest that matches its seal, the digest that is expected of it, and a trusted key.

        Raises: BankError naming the file, StorageError.
        """
        where = self.store.where(key)
        if self.cache and digest and (near := self.cache.find(digest)):
            try:
                return self._checked(near, self.cache.where(digest), digest)
            except BankError:
                self.cache.drop(digest)  # damaged: the store has it whole
        verified, seal = self._checked(self.store.open(key, MAX_MANIFEST_BYTES), where, digest)
        if self.cache:
            self.cache.keep(seal.digest, _whole(verified, where))
            if near := self.cache.find(seal.digest):
                verified.go_on_from(near)
        return verified, seal

    def read_blob(self, digest: str, limit: int) -> bytes:
        """The bytes that a digest names. Raises: BankError naming the file, StorageError."""
        if self.cache and (near := self.cache.find(digest)):
            data = near.read(0, near.size)
            if hashlib.sha256(data).hexdigest() == digest:
                return data
            self.cache.drop(digest)
        data = self.read_stored_blob(digest, limit)
        if self.cache:
            self.cache.keep(digest, data)
        return data

    def read_stored_blob(self, digest: str, limit: int) -> bytes:
        """As `read_blob`, past the cache."""
        data = self.store.read(blob_key(digest), limit)
        if hashlib.sha256(data).hexdigest() != digest:
            where = self.store.where(blob_key(digest))
            raise BankError(f"{where} is damaged: its bytes do not match the digest in its name")
        return data

    def _checked(self, content: Content, where: str, digest: str | None) -> tuple[VerifiedContent, Seal]:
        seal, verified = open_sealed(content, where)
        if digest is not None and seal.digest != digest:
            raise BankError(f"{where} is refused: its digest is not the one that the alias names; it was replaced")
        if self.trusted:
            from pipeline.bank.signing import check_signature

            check_signature(seal, self.trusted, where)
        return verified, seal


def _whole(verified: VerifiedContent, where: str) -> bytes:
    try:
        return verified.read(0, verified.size)
    except DamagedContentError as error:
        raise BankError(f"{where} is damaged: its bytes changed while it was read") from error
