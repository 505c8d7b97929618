"""Sealed JSON: a JSON file whose first line carries the SHA-256 of all the bytes after it.

The digest is over bytes as they lie on disk, so that a reader in any language checks it
without having to write numbers the way that Python does.
"""

import hashlib
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.errors import BankError

_FIRST_LINE = re.compile(rb'\{"digest":"([0-9a-f]{64})",\n')

Model = TypeVar("Model", bound=BaseModel)


def canonical(value: Any) -> bytes:
    """JSON as UTF-8 with sorted keys, no spaces and no line breaks."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def seal(body: bytes) -> bytes:
    """Put the first line before `body`: the members of a JSON object, its closing brace and a line break."""
    return b'{"digest":"%s",\n%s' % (hashlib.sha256(body).hexdigest().encode(), body)


def sealed_body(data: bytes, where: str) -> int:
    """Verify sealed bytes; the offset of the body, which is not copied. Raises: BankError naming `where`."""
    first = _FIRST_LINE.match(data)
    if first is None:
        raise BankError(f"{where} is damaged: its first line does not carry a digest")
    if hashlib.sha256(memoryview(data)[first.end() :]).hexdigest().encode() != first[1]:
        raise BankError(f"{where} is damaged: its bytes do not match its digest")
    return first.end()


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
