"""Versions: `versions/<N>.json`, created only if absent. The only point where a version becomes visible."""

import re
from dataclasses import dataclass

from pipeline.bank.manifest import (
    MAX_MANIFEST_BYTES,
    NAME,
    PROMPTS_CLOSE,
    PROMPTS_OPEN,
    Header,
    Manifest,
    PromptRecord,
    encode_manifest,
)
from pipeline.bank.sealed import parse, sealed_body
from pipeline.bank.store import Store
from pipeline.errors import BankError

_NUMBERED = re.compile(r"([1-9][0-9]*)\.json")


@dataclass(frozen=True)
class Version:
    """A verified manifest whose prompts are parsed only when asked for, so that a large bank opens fast."""

    header: Header
    _data: bytes
    _first: int
    """Offset of the line break before the first prompt's line."""
    _last: int
    """Offset of the line break after the last prompt's line."""
    where: str

    def names(self) -> tuple[str, ...]:
        """Names of all records, those of failed prompts included. Raises: BankError."""
        return tuple(name for name, _ in self._lines())

    def record(self, name: str) -> PromptRecord | None:
        """The record of a prompt, None when there is none. Raises: BankError when it is invalid."""
        wanted, low, high = b'"' + name.encode(), self._first, self._last
        while low < high:  # bisection between line breaks, which never stand inside a JSON string
            middle = (low + high) // 2
            start = self._data.rfind(b"\n", low, middle + 1)
            end = self._data.find(b"\n", start + 1, high + 1)
            key, _, record = self._data[start + 1 : end].partition(b'":')
            if key == wanted:
                return self._parsed(name, record)
            low, high = (end, high) if key < wanted else (low, start)
        return None

    def manifest(self) -> Manifest:
        """Everything, parsed and validated. Raises: BankError."""
        records = {name: self._parsed(name, record) for name, record in self._lines()}
        return Manifest.model_validate({**dict(self.header), "prompts": records})

    def _lines(self) -> list[tuple[str, bytes]]:
        lines = (line for line in self._data[self._first : self._last].split(b"\n") if line)
        pairs = [(key[1:].decode(errors="replace"), record) for key, _, record in (x.partition(b'":') for x in lines)]
        names = [name for name, _ in pairs]
        if names != sorted(set(names)) or not all(map(NAME.fullmatch, names)):
            raise BankError(f"{self.where} is refused: a prompt's name is invalid, out of order, or there twice")
        return pairs

    def _parsed(self, name: str, line: bytes) -> PromptRecord:
        record = parse(PromptRecord, line.removesuffix(b","), f"{self.where}, prompt '{name}',")
        if record.name != name:
            raise BankError(f"{self.where} is refused: prompt '{name}' holds the record of another")
        return record


def version_numbers(store: Store) -> tuple[int, ...]:
    """All versions, ascending. Raises: StorageError."""
    return numbered(store, "versions")


def read_version(store: Store, number: int) -> Version:
    """Read and verify one manifest. Raises: BankError naming the file, StorageError."""
    key = f"versions/{number}.json"
    where = store.where(key)
    data = store.read(key, MAX_MANIFEST_BYTES)
    body = sealed_body(data, where)
    opened = data.find(PROMPTS_OPEN, body)
    first, last = opened + len(PROMPTS_OPEN) - 1, len(data) - len(PROMPTS_CLOSE)
    if opened < 0 or first >= last or not data.endswith(PROMPTS_CLOSE):
        raise BankError(f"{where} is refused: it does not hold one prompt per line")
    header = parse(Header, b"{" + data[body:opened] + b"}", where)
    if header.version != number:
        raise BankError(f"{where} is refused: it says that it is version {header.version}")
    return Version(header, data, first, last, where)


def create_version(store: Store, manifest: Manifest) -> bool:
    """Make the version visible; False when another publisher took its number. Raises: BankError, StorageError."""
    data = encode_manifest(manifest)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BankError(f"version {manifest.version} is refused: its manifest is above {MAX_MANIFEST_BYTES:,} bytes")
    return store.create(f"versions/{manifest.version}.json", data)


def numbered(store: Store, folder: str) -> tuple[int, ...]:
    """The numbers N of the files `folder/N.json`, ascending; other files do not count. Raises: StorageError."""
    return tuple(sorted(int(match[1]) for name in store.list_names(folder) if (match := _NUMBERED.fullmatch(name))))
