"""Sealed JSON: a JSON file whose first line carries the SHA-256 of all the bytes after it.

The digest is over bytes as they lie on disk, so that a reader in any language checks it
without having to write numbers the way that Python does. The line may carry a signature of it too.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.bank.content import Content, MemoryContent, VerifiedContent
from pipeline.errors import BankError

_FIRST_LINE = re.compile(
    rb'\{"digest":"(?P<digest>[0-9a-f]{64})",'
    rb'("signature":\{"ed25519":"(?P<signature>[A-Za-z0-9+/]{86}==)","key":"(?P<key>[0-9a-f]{64})"\},)?\n'
)
_LONGEST_FIRST_LINE = 512

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Signature:
    """An Ed25519 signature of a seal's digest. See `signing`."""

    ed25519: str
    """Base64."""
    key: str
    """The public key, 64 hex digits."""


@dataclass(frozen=True)
class Seal:
    """A first line that was found to match what follows it."""

    digest: str
    signature: Signature | None
    body: int
    """Offset of the first byte after the line."""


def canonical(value: Any) -> bytes:
    """JSON as UTF-8 with sorted keys, no spaces and no line breaks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal(body: bytes, sign: Callable[[str], Signature] | None = None) -> bytes:
    """Put the first line before `body`: the members of a JSON object, its closing brace and a line break."""
    digest = hashlib.sha256(body).hexdigest()
    signature = b'"signature":%s,' % canonical(vars(sign(digest))) if sign else b""
    return b'{"digest":"%s",%s\n%s' % (digest.encode(), signature, body)


def open_sealed(content: Content, where: str) -> tuple[Seal, VerifiedContent]:
    """Verify sealed content. Raises: BankError naming `where`, StorageError."""
    first = _FIRST_LINE.match(content.read(0, _LONGEST_FIRST_LINE))
    if first is None:
        raise BankError(f"{where} is damaged: its first line does not carry a digest")
    verified = VerifiedContent(content, first.end())
    digest = first["digest"].decode()
    if verified.sha256 != digest:
        raise BankError(f"{where} is damaged: its bytes do not match its digest")
    signed = first["signature"] is not None
    signature = Signature(first["signature"].decode(), first["key"].decode()) if signed else None
    return Seal(digest, signature, first.end()), verified


def check_sealed(data: bytes, where: str) -> Seal:
    """Verify sealed bytes. Raises: BankError naming `where`."""
    return open_sealed(MemoryContent(data), where)[0]


def parse(model: type[Model], data: bytes, where: str) -> Model:
    """Validate JSON bytes. Raises: BankError naming `where` and the first field that is wrong."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise BankError(f"{where} is refused: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    detail = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, detail["loc"]))
    if place == "format":
        return "it is written in a format that this version of the library does not know; upgrade the library"
    return f"'{place}': {detail['msg']}" if place else detail["msg"].removeprefix("Value error, ")
