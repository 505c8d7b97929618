"""Files of a run that carry a SHA-256 of their own content: what has rotted on a disk is found, and not taken up.

The digest is of all that a reader gets: a JSON object's values, or the header and the tensors of a safetensors file.
Versions before this one wrote none. Their files are known by keys that those versions wrote and no other, so that one
whose digest lost its name to a flipped bit does not pass for an old one.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

_SEAL = "sha256"
_METADATA = "__metadata__"
_LENGTH = 8
"""Bytes of a safetensors file that say how long its header is; headers are padded to as many."""


class DamagedError(ValueError):
    """The content is not what was written; for readers, who know what to do without it."""


def sealed_json(values: Mapping[str, Any]) -> bytes:
    """A JSON object with its digest as a further key."""
    return (json.dumps({**values, _SEAL: _digest(values)}, indent=1, ensure_ascii=False) + "\n").encode()


def open_json(data: bytes, unsealed: Collection[str]) -> dict[str, Any]:
    """The values without their digest; `unsealed`: all keys that an object without one may have.

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
    """A safetensors file as `save` made it, with its digest in its metadata; still a file that everybody reads."""
    header, body = _parts(data)
    metadata = header.setdefault(_METADATA, {})
    metadata[_SEAL] = _digest(header, body)
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH)
    return len(text).to_bytes(_LENGTH, "little") + text + body


def open_tensors(data: bytes, unsealed: Collection[str]) -> dict[str, str]:
    """The metadata without the digest of a file whose content is whole; `unsealed` as for `open_json`, of the metadata.

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
    # Through JSON once, so that a tuple is the list that a reader gets.
    text = json.dumps(json.loads(json.dumps(values)), sort_keys=True)
    digest = hashlib.sha256(text.encode() + b"\0")
    digest.update(body)
    return digest.hexdigest()
