"""A bank in an object store: S3 and what speaks its protocol, Google Cloud Storage, Azure Blob Storage."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Lock
from typing import TYPE_CHECKING
from uuid import uuid4

from pipeline.addresses import hide_credentials, holds_credentials
from pipeline.bank.content import MemoryContent
from pipeline.bank.store import StoredFile, check_key
from pipeline.bank.store_errors import (
    AWS,
    AZURE,
    GOOGLE,
    NO_BUCKET,
    NO_CREDENTIALS,
    WEB_PAGE,
    explain,
    first_line,
    is_client_error,
    is_forbidden,
    is_transient,
)
from pipeline.errors import BankError, MissingFileError, StorageError, UnreachableError

try:
    from obstore.exceptions import AlreadyExistsError, BaseError
    from obstore.store import AzureStore, GCSStore, S3Store, from_url
except ImportError as error:
    raise BankError("object stores need one more package: pip install 'promptbank[cloud]'") from error

if TYPE_CHECKING:
    from obstore import ListResult, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

_PATIENCE = 20.0
"""Seconds after which nothing is tried again."""
_RETRIES: "RetryConfig" = {"max_retries": 30, "retry_timeout": timedelta(seconds=_PATIENCE)}
# `read_timeout` bounds the wait for an answer, uploads included, and every silence within one; a large download
# that keeps coming has `timeout`.
_CLIENT: "ClientConfig" = {"connect_timeout": "5s", "read_timeout": "30s", "timeout": "10min"}
_PAUSE = 0.2
_ENDPOINTS = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_ENDPOINT",
    "GOOGLE_BASE_URL",
    "AZURE_STORAGE_ENDPOINT",
    "AZURE_ENDPOINT",
)
_ALLOW_HTTP = ("AWS_ALLOW_HTTP", "GOOGLE_ALLOW_HTTP", "AZURE_ALLOW_HTTP")
# What could lead elsewhere than it seems (dots, escapes), would be dropped in silence (queries), or is a password.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^/?#%:\s]+(/(?!\.{1,2}(/|$))[^/?#%]+)*/?")
_CLOUDS = "s3://bucket/folder, gs://bucket/folder, az://container/folder or abfs://container@account/folder"
_NAMED_BY_CONTENT = "blobs/"
_PROBES = "probes"
_KEPT, _REFUSED = b"created first\n", b"created second, which must fail\n"

_first_user: int | None = None
"""The process that first asked an object store for something."""
_fit: set[tuple[str | None, ...]] = set()
"""Stores that this process has probed, by address and endpoints."""
_probing = Lock()


def open_object_store(uri: str) -> "ObjectStore":
    """The store at a bucket, or a folder in one, such as `s3://bucket/prompts`. The network is not asked yet.

    Credentials, region and endpoint come from the environment, by the names that the clouds' own tools use
    (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`, …);
    profiles in `~/.aws` are not read. Plain http needs `AWS_ALLOW_HTTP=true`.

    Raises: BankError for an address or an endpoint that cannot be, StorageError for half a pair of credentials.
    """
    for name in _ENDPOINTS:
        value = os.environ.get(name)
        if value and not value.startswith(("http://", "https://")):
            raise BankError(f"{name} is {hide_credentials(value)!r}, and must begin with https:// or http://")
    if holds_credentials(uri):
        raise _refused(uri, "it holds a password, or what looks like one")
    if not _ADDRESS.fullmatch(uri):
        raise _refused(uri, "a part of it is missing, or it holds '..', '%', '?', '#' or ':'")
    allow_http = any(os.environ.get(name, "").lower() in ("1", "true", "yes", "on") for name in _ALLOW_HTTP)
    try:
        objects = from_url(uri, client_options={**_CLIENT, "allow_http": allow_http}, retry_config=_RETRIES)
    except (BaseError, ValueError) as error:
        if NO_CREDENTIALS.search(str(error)):
            raise StorageError(f"cannot open {uri}: {explain(error, AWS)}") from error
        raise _refused(uri, first_line(error)) from error
    if not isinstance(objects, S3Store | GCSStore | AzureStore):
        raise _refused(uri, "it cannot create an object only if it is absent")
    return ObjectStore(objects, uri.rstrip("/"))


class ObjectStore:
    """Keys are names of objects below a prefix. For threads, but not for forks of a process. See `store.Store`."""

    def __init__(self, objects: S3Store | GCSStore | AzureStore, uri: str) -> None:
        self._objects = objects
        self._cloud = {S3Store: AWS, GCSStore: GOOGLE, AzureStore: AZURE}[type(objects)]
        self._place = (uri, *map(os.environ.get, _ENDPOINTS))
        self.uri = uri

    def where(self, key: str) -> str:
        return f"{self.uri}/{key}"

    def open(self, key: str, limit: int) -> MemoryContent:
        return MemoryContent(self.read(key, limit))

    def read(self, key: str, limit: int) -> bytes:
        try:
            size, data = self._fetch(key, limit)
        except FileNotFoundError as error:
            raise MissingFileError(f"{self.where(key)} is missing") from error
        if data is None:
            raise BankError(f"{self.where(key)} is refused: {size:,} bytes, above the limit of {limit:,}")
        return data

    def create(self, key: str, data: bytes) -> bool:
        """As `Store.create`; no put but on the condition that the key is absent. A process' first probes the store.

        When the answer to a put is lost, nobody can tell whether it was carried out, and the put that
        obstore or this loop sends next finds its own object. Equal bytes count as ours, therefore: bytes that
        shall tell one creator from another, as a version's and a move's, must hold something of the creator's own.
        Not so a blob's, which is named by its bytes: False, and the caller sees to it that it stays.

        Raises: BankError when the store is not fit for a bank; StorageError, and the bytes may be there all the
        same, or still arrive.
        """
        self.check_fit()
        return self._create(key, data)

    def check_fit(self) -> None:
        """As `Store.check_fit`; a process asks its store once."""
        with _probing:
            if self._place not in _fit:
                self._probe()
                _fit.add(self._place)

    def _create(self, key: str, data: bytes) -> bool:
        give_up = time.monotonic() + _PATIENCE
        while True:
            try:
                self._put(key, data)
                return True
            except AlreadyExistsError as error:
                failure = self._failure("write", key, error)
            except StorageError as error:
                failure = error
                if is_client_error(error.__cause__):
                    raise
            same = self._is_there(key, data, failure)
            if same is not None:
                return same and not key.startswith(_NAMED_BY_CONTENT)
            # Nothing is there: S3 answers "conflict" also while another's put or deletion is under way.
            if time.monotonic() > give_up:
                raise failure
            time.sleep(_PAUSE)

    def _put(self, key: str, data: bytes) -> None:
        """Raises: AlreadyExistsError, StorageError."""
        with self._asking("write", key, AlreadyExistsError):
            self._objects.put(key, data, mode="create", use_multipart=False)  # parts would not be atomic

    def renew(self, key: str, data: bytes) -> None:
        with self._asking("write", key):
            self._objects.put(key, data, mode="overwrite", use_multipart=False)

    def _probe(self) -> None:
        """Four requests: of two creations of a key the second must fail, and what the first one wrote must stand."""
        key = f"{_PROBES}/{uuid4().hex}"
        try:
            self._create(key, _KEPT)
            overwritten = self._creates_again(key) or self.read(key, len(_REFUSED)) != _KEPT
        except StorageError as error:
            if not is_forbidden(error.__cause__):
                raise
            need = f"who writes to a bank must be allowed to put and get objects under {_PROBES}/ too (docs/stores.md)"
            raise StorageError(f"{error}; {need}") from error.__cause__
        with suppress(StorageError):  # who may not delete may publish all the same; the collector takes it
            self.delete(key)
        if overwritten:
            raise BankError(
                f"{self.uri} is refused: its store overwrites what it is told to create only if it is absent "
                "(If-None-Match), so that versions would be lost; use one that docs/stores.md calls fit"
            )

    def _creates_again(self, key: str) -> bool:
        """Whether a second creation succeeds. Only the store's own "it exists" tells that it was refused.

        A put that failed in passing proves nothing: the first one's bytes stand because nothing was carried out.
        """
        give_up = time.monotonic() + _PATIENCE
        while True:
            try:
                self._put(key, _REFUSED)
            except AlreadyExistsError:
                return False
            except StorageError as error:
                if is_client_error(error.__cause__) or time.monotonic() > give_up:
                    raise
                time.sleep(_PAUSE)
            else:
                return True

    def exists(self, key: str) -> bool:
        """As `Store.exists`; in a bucket that is not there, nothing exists either."""
        try:
            with self._asking("read", key, FileNotFoundError):
                self._objects.head(key)
        except FileNotFoundError:
            return False
        return True

    def list_names(self, folder: str) -> tuple[str, ...]:
        found = self._list(folder)
        paths = [*found["common_prefixes"], *(item["path"] for item in found["objects"])]
        return tuple({name for path in paths if (name := _name(path, folder))})

    def list_files(self, folder: str) -> tuple[StoredFile, ...]:
        return tuple(
            StoredFile(name, item["size"], item["last_modified"].timestamp())
            for item in self._list(folder)["objects"]
            if (name := _name(item["path"], folder))
        )

    def list_leftovers(self) -> dict[str, StoredFile]:
        """Probes whose writer may not delete. An object appears whole or not at all, and leaves no parts behind."""
        return {f"{_PROBES}/{entry.name}": entry for entry in self.list_files(_PROBES)}

    def delete(self, key: str) -> None:
        with suppress(FileNotFoundError), self._asking("delete", key, FileNotFoundError):
            self._objects.delete(key)

    def _list(self, folder: str) -> "ListResult[Sequence[ObjectMeta]]":
        with self._asking("list", folder):
            return self._objects.list_with_delimiter(folder)

    def _fetch(self, key: str, limit: int) -> tuple[int, bytes | None]:
        """Size of an object, and its bytes unless they are too many. Raises: FileNotFoundError, StorageError."""
        with self._asking("read", key, FileNotFoundError):
            found = self._objects.get(key)
            size = found.meta["size"]  # from the answer's head: the body is not fetched yet
            return size, bytes(found.bytes()) if size <= limit else None

    def _is_there(self, key: str, data: bytes, failure: StorageError) -> bool | None:
        """Whether a key holds `data`, None when it holds nothing. Raises: `failure` when that cannot be told."""
        try:
            return self._fetch(key, len(data))[1] == data
        except FileNotFoundError:
            return None
        except StorageError:
            raise failure from failure.__cause__

    @contextmanager
    def _asking(self, action: str, key: str, expected: type[Exception] | None = None) -> Iterator[None]:
        """What obstore raises becomes a StorageError, unless it was expected."""
        check_key(key, self.uri)
        _refuse_forks()
        try:
            yield
        except (BaseError, OSError, ValueError) as error:
            nowhere = NO_BUCKET.search(str(error)) or WEB_PAGE.search(str(error))
            if expected and isinstance(error, expected) and not nowhere:
                raise
            raise self._failure(action, key, error) from error

    def _failure(self, action: str, key: str, error: Exception) -> StorageError:
        kind = UnreachableError if is_transient(error) else StorageError
        failure = kind(f"cannot {action} {self.where(key)}: {explain(error, self._cloud)}")
        failure.__cause__ = error
        return failure


def _name(path: str, folder: str) -> str | None:
    """The name of what lies at a path, None for what is no part of a bank."""
    inside, _, name = path.rpartition("/")
    # Consoles mark a folder by an object of its own name, which obstore lists as a file in it.
    return name if inside == folder and not name.startswith(".") else None


def _refuse_forks() -> None:
    """obstore's threads are not there after a fork, and it would wait for them for ever."""
    global _first_user
    _first_user = _first_user or os.getpid()
    if _first_user != os.getpid():
        raise StorageError(
            "an object store was in use when this process was forked, and cannot be used in it; "
            "start the process by 'spawn' or 'forkserver', or open the bank only after the fork"
        )


def _refused(uri: str, reason: str) -> BankError:
    return BankError(
        f"the bank's address {hide_credentials(uri)!r} is refused ({reason}); use a local folder, {_CLOUDS}"
    )
