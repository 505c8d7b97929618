"""Versions: `versions/<N>.json`, created only if absent. The only point where a version becomes visible."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.bank.access import BankAccess
from pipeline.bank.content import DamagedContentError, VerifiedContent
from pipeline.bank.manifest import (
    MAX_MANIFEST_BYTES,
    NAME,
    PROMPTS_CLOSE,
    PROMPTS_OPEN,
    Manifest,
    ManifestHeader,
    PromptRecord,
    encode_manifest,
)
from pipeline.bank.sealed import Seal, check_sealed, parse
from pipeline.bank.store import Store
from pipeline.errors import BankError

_NUMBERED = re.compile(r"([1-9][0-9]*)\.json")


@dataclass(frozen=True)
class Version:
    """A verified manifest. Prompts are parsed only when asked for: a large bank opens fast, in little memory."""

    header: ManifestHeader
    seal: Seal
    where: str
    _content: VerifiedContent
    _first: int
    """Offset of the line break before the first prompt's line."""
    _last: int
    """Offset of the line break after the last prompt's line."""

    def names(self) -> tuple[str, ...]:
        """Names of all records, those of failed prompts included. Raises: BankError, StorageError."""
        return tuple(name for name, _ in self._lines())

    def record(self, name: str) -> PromptRecord | None:
        """The record of a prompt, None when there is none. Raises: BankError when it is invalid, StorageError."""
        try:
            line = self._find(b'"' + name.encode())
        except DamagedContentError as error:
            raise self._changed() from error
        return None if line is None else self._parsed(name, line)

    def manifest(self) -> Manifest:
        """Everything, parsed and validated. Raises: BankError, StorageError."""
        records = {record.name: record for record in self.records()}
        return Manifest.model_validate({**dict(self.header), "prompts": records})

    def records(self) -> Iterator[PromptRecord]:
        """All records, one after the other. Raises: BankError, StorageError."""
        return (self._parsed(name, line) for name, line in self._lines())

    def _find(self, wanted: bytes) -> bytes | None:
        low, high = self._first, self._last
        while low < high:  # bisection between line breaks, which never stand inside a JSON string
            middle = (low + high) // 2
            start = self._content.rfind(b"\n", low, middle + 1)
            end = self._content.find(b"\n", start + 1, high + 1)
            key, _, record = self._content.read(start + 1, end).partition(b'":')
            if key == wanted:
                return record
            low, high = (end, high) if key < wanted else (low, start)
        return None

    def _lines(self) -> Iterator[tuple[str, bytes]]:
        before = ""
        try:
            for line in self._content.lines(self._first + 1, self._last):
                key, _, record = line.partition(b'":')
                name = key[1:].decode(errors="replace")
                if name <= before or not NAME.fullmatch(name):
                    raise BankError(f"{self.where} is refused: a name is invalid, out of order, or there twice")
                yield name, record
                before = name
        except DamagedContentError as error:
            raise self._changed() from error

    def _changed(self) -> BankError:
        return BankError(f"{self.where} is damaged: its bytes have changed since it was opened")

    def _parsed(self, name: str, line: bytes) -> PromptRecord:
        record = parse(PromptRecord, line.removesuffix(b","), f"{self.where}, prompt '{name}',")
        if record.name != name:
            raise BankError(f"{self.where} is refused: prompt '{name}' holds the record of another")
        return record


def version_numbers(store: Store) -> tuple[int, ...]:
    """All versions, ascending. Raises: StorageError."""
    return numbered(store, "versions")


def read_version(access: BankAccess, number: int, digest: str | None = None) -> Version:
    """Read and verify one manifest; `digest` is that of its seal, where an alias has told it.

    Raises: BankError naming the file, StorageError.
    """
    key = f"versions/{number}.json"
    where = access.store.where(key)
    content, seal = access.open_manifest(key, digest)
    version = _layout(content, seal, where)
    if version.header.version != number:
        raise BankError(f"{where} is refused: it says that it is version {version.header.version}")
    return version


def _layout(content: VerifiedContent, seal: Seal, where: str) -> Version:
    try:
        end = content.find(b"\n", seal.body, content.size)
        head = content.read(seal.body, end + 1)
        tail = content.read(content.size - len(PROMPTS_CLOSE), content.size)
    except DamagedContentError as error:
        raise BankError(f"{where} is damaged: its bytes changed while it was read") from error
    last = content.size - len(PROMPTS_CLOSE)
    if not head.endswith(PROMPTS_OPEN) or end >= last or tail != PROMPTS_CLOSE:
        raise BankError(f"{where} is refused: it does not hold one prompt per line")
    header = parse(ManifestHeader, b"{" + head.removesuffix(PROMPTS_OPEN) + b"}", where)
    return Version(header, seal, where, content, end, last)


def create_version(access: BankAccess, manifest: Manifest) -> str | None:
    """Make the version visible; its digest, None when another publisher took its number.

    Raises: BankError, StorageError.
    """
    data = encode_manifest(manifest, access.sign)
    if len(data) > MAX_MANIFEST_BYTES:
        raise BankError(f"version {manifest.version} is refused: its manifest is above {MAX_MANIFEST_BYTES:,} bytes")
    key = f"versions/{manifest.version}.json"
    return check_sealed(data, key).digest if access.store.create(key, data) else None


def numbered(store: Store, folder: str) -> tuple[int, ...]:
    """The numbers N of the files `folder/N.json`, ascending; other files do not count. Raises: StorageError."""
    return tuple(sorted(int(match[1]) for name in store.list_names(folder) if (match := _NUMBERED.fullmatch(name))))
