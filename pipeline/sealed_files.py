"""Files of a run that carry a SHA-256 of their own content, so that a file damaged on disk is found and not used.

The digest covers everything that a reader gets: a JSON object's values, or the header and the tensors of a safetensors
file. Old versions of this code wrote files without a digest. Such a file may hold only the keys that those versions
wrote, so that a file whose digest key was hit by a flipped bit does not pass for an old one.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

_SEAL = "sha256"
_METADATA = "__metadata__"
_LENGTH = 8
"""Bytes at the start of a safetensors file that hold its header's length; headers are padded to a multiple of it."""


class DamagedError(ValueError):
    """The content is not what was written. Callers catch this and go on without the file, or report it."""


def sealed_json(values: Mapping[str, Any]) -> bytes:
    """A JSON object with its digest as a further key."""
    return (json.dumps({**values, _SEAL: _digest(values)}, indent=1, ensure_ascii=False) + "\n").encode()


def open_json(data: bytes, unsealed: Collection[str]) -> dict[str, Any]:
    """The values, verified and without the digest; `unsealed`: all keys that an object without a digest may have.

    Raises: DamagedError.
    """
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(str(error)) from error
    if not isinstance(values, dict):
        raise DamagedError("it is no JSON object")
    return _opened(values, unsealed, _digest)


def sealed_tensors(data: bytes) -> bytes:
    """A safetensors file with its digest added to its metadata; any safetensors reader can still read it."""
    header, body = _parts(data)
    metadata = header.setdefault(_METADATA, {})
    metadata[_SEAL] = _digest(header, body)
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text + body


def open_tensors(data: bytes, unsealed: Collection[str]) -> dict[str, str]:
    """The metadata of a file, verified and without the digest; `unsealed`: as for `open_json`, keys of the metadata.

    Raises: DamagedError.
    """
    try:
        header, body = _parts(data)
    except (ValueError, RecursionError) as error:
        raise DamagedError(str(error)) from error
    metadata = header.setdefault(_METADATA, {}) if isinstance(header, dict) else None
    if not isinstance(metadata, dict):
        raise DamagedError("it has no header")
    return _opened(metadata, unsealed, lambda rest: _digest({**header, _METADATA: rest}, body))


def file_digest(path: Path) -> str:
    """SHA-256 of a whole file, in hexadecimal digits. Raises: OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _opened(
    values: dict[str, Any], unsealed: Collection[str], digest: Callable[[dict[str, Any]], str]
) -> dict[str, Any]:
    rest = {key: value for key, value in values.items() if key != _SEAL}
    if _SEAL in values and values[_SEAL] != digest(rest):
        raise DamagedError("its content is not that of its digest")
    if _SEAL not in values and not values.keys() <= set(unsealed):
        raise DamagedError("it has no digest")
    return rest


def _parts(data: bytes) -> tuple[Any, bytes]:
    """Header and tensors of a safetensors file. Raises: ValueError."""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "little")
    return json.loads(data[_LENGTH:end]), data[end:]


def _digest(values: Mapping[str, Any], body: bytes = b"") -> str:
    # Through JSON once, so that a tuple becomes the list that a reader gets.
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    digest = hashlib.sha256(text.encode() + b"\0")
    digest.update(body)
    return digest.hexdigest()
