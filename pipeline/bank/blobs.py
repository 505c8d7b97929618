"""Blobs: one prompt per safetensors file, named by the SHA-256 of the file's bytes."""

import hashlib

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.bank.access import BankAccess, blob_key
from pipeline.errors import BankError, MissingFileError

MAX_BLOB_BYTES = 2**30
_KEY = "prompt"


def encode_blob(array: np.ndarray) -> tuple[str, bytes]:
    """Digest and file bytes of a prompt [P, H] float32; equal arrays give equal bytes."""
    assert array.dtype == np.float32 and array.ndim == 2
    data = save({_KEY: np.ascontiguousarray(array)})
    return hashlib.sha256(data).hexdigest(), data


def write_blob(access: BankAccess, digest: str, data: bytes, referenced: bool) -> None:
    """Store a blob, or share the one that is there. Raises: BankError when that one is damaged, StorageError.

    One that no version refers to yet is made young again: otherwise the collector might take it
    for one that was left behind, before the version that will refer to it is visible.
    """
    key = blob_key(digest)
    while not access.store.create(key, data):
        try:
            access.read_stored_blob(digest, MAX_BLOB_BYTES)
        except MissingFileError:
            continue  # the collector took it just now
        if not referenced:
            access.store.renew(key, data)
        return


def read_blob(access: BankAccess, digest: str, shape: tuple[int, int]) -> np.ndarray:
    """The prompt [P, H] float32, read-only, verified against its digest and the manifest's shape.

    Raises: BankError naming the blob's file, StorageError.
    """
    where = access.store.where(blob_key(digest))
    data = access.read_blob(digest, MAX_BLOB_BYTES)
    try:
        tensors = load(data)
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
