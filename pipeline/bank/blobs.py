"""Blobs: one prompt per safetensors file, named by the SHA-256 of the file's bytes."""

import hashlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.bank.store import Store
from pipeline.errors import BankError

MAX_BLOB_BYTES = 2**30
_KEY = "prompt"


def blob_key(digest: str) -> str:
    return f"blobs/sha256/{digest}.safetensors"


def encode_blob(array: np.ndarray) -> tuple[str, bytes]:
    """Digest and file bytes of a prompt [P, H] float32; equal arrays give equal bytes."""
    assert array.dtype == np.float32 and array.ndim == 2
    data = save({_KEY: np.ascontiguousarray(array)})
    return hashlib.sha256(data).hexdigest(), data


def write_blob(store: Store, digest: str, data: bytes) -> None:
    """Store a blob, or share the one that is there. Raises: BankError when that one is damaged, StorageError."""
    if store.exists(blob_key(digest)) or not store.create(blob_key(digest), data):
        _read_verified(store, digest)


def read_blob(store: Store, digest: str, shape: tuple[int, int]) -> np.ndarray:
    """The prompt [P, H] float32, read-only, verified against its digest and the manifest's shape.

    Raises: BankError naming the blob's file, StorageError.
    """
    where = store.where(blob_key(digest))
    try:
        tensors = load(_read_verified(store, digest))
    except (SafetensorError, KeyError, ValueError) as error:
        raise BankError(f"{where} is refused: not a valid safetensors file ({error})") from error
    array = tensors.get(_KEY)
    if array is None or len(tensors) != 1:
        raise BankError(f"{where} is refused: it must hold the one tensor '{_KEY}' and holds {sorted(tensors)}")
    if array.shape != shape or array.dtype != np.float32:
        found = f"{list(array.shape)} {array.dtype}"
        raise BankError(f"{where} is refused: it holds {found} where the manifest says {list(shape)} float32")
    array.flags.writeable = False
    return array


def _read_verified(store: Store, digest: str) -> bytes:
    data = store.read(blob_key(digest), MAX_BLOB_BYTES)
    if hashlib.sha256(data).hexdigest() != digest:
        raise BankError(f"{store.where(blob_key(digest))} is damaged: its bytes do not match the digest in its name")
    return data
