"""One version of a bank, and the prompts of it that were used so far."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.bank.access import BankAccess
from pipeline.bank.blobs import read_blob
from pipeline.bank.manifest import BackboneId, ManifestHeader, PromptRecord, check_name
from pipeline.bank.publish import of_another_backbone
from pipeline.bank.same_backbone import is_same
from pipeline.bank.versions import Version
from pipeline.errors import BankError, UnknownNameError

_COMPARED = 500
"""Names that a misspelt one is compared with; all of a large bank's would take a tenth of a second."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A soft prompt, verified."""

    array: np.ndarray
    """[P, H] float32, read-only"""
    record: PromptRecord
    version: int
    backbone: BackboneId
    """The one that it was tuned on."""


class Snapshot:
    """A version, which never changes; each of its prompts is read once, when first asked for."""

    def __init__(self, access: BankAccess, version: Version) -> None:
        self._access = access
        self._version = version
        self._used: dict[str, Prompt] = {}
        self._same: dict[tuple[str, str], BackboneId] = {}

    @property
    def version(self) -> int:
        return self._version.header.version

    @property
    def digest(self) -> str:
        """That of the manifest's seal."""
        return self._version.seal.digest

    @property
    def header(self) -> ManifestHeader:
        """What the manifest tells of the version itself: parent, time, run, backbone, libraries."""
        return self._version.header

    @property
    def backbone(self) -> BackboneId:
        return self._version.header.backbone

    def is_of(self, backbone: BackboneId, name: str | None = None) -> bool:
        """Whether the version, or one prompt of it, belongs to this backbone, by its fingerprint or by a statement.

        A prompt may be tuned on another backbone than its version's, which was stated to be the same.
        What was once found the same stays so for this object. Raises: BankError for a damaged statement, StorageError.
        """
        owner, _ = self._owner(name)
        pair = (owner.fingerprint, backbone.fingerprint)
        if pair not in self._same and is_same(self._access, owner, backbone):
            self._same[pair] = backbone
        return pair in self._same

    @property
    def readers(self) -> tuple[BackboneId, ...]:
        """The backbones of which the version was found to be so far."""
        own = self.backbone.fingerprint
        return tuple(other for (owner, _), other in dict(self._same).items() if owner == own)

    def check_backbone(self, backbone: BackboneId, name: str | None = None) -> None:
        """Raises: as `is_of`, and BankError naming both backbones where that is False."""
        if not self.is_of(backbone, name):
            owner, where = self._owner(name)
            raise of_another_backbone(where, owner, backbone)

    def _owner(self, name: str | None) -> tuple[BackboneId, str]:
        """The backbone of the version or of a prompt, and the place that says so."""
        used = self._used.get(name) if name is not None else None
        record = used.record if used else self.record(name) if name is not None else None
        if record is not None and record.tuned_on is not None:
            return record.tuned_on, f"{self._version.where}, prompt '{name}',"
        return self.backbone, self._version.where

    @property
    def signer(self) -> str | None:
        """The public key (64 hex digits) that the manifest's signature names; only trusted keys check it."""
        signature = self._version.seal.signature
        return signature.key if signature else None

    @property
    def used(self) -> tuple[str, ...]:
        """Names of the prompts in memory."""
        return tuple(self._used)

    def names(self) -> tuple[str, ...]:
        """Names that can be loaded, sorted. Raises: BankError, StorageError."""
        return tuple(record.name for record in self._version.records() if record.digest)

    def load(self, name: str, backbone: BackboneId | None = None, any_backbone: bool = False) -> Prompt:
        """A prompt of this version, verified. Threads may load at once.

        Raises: BankError for an unknown name, a damaged file, or when `backbone` is given, the prompt
        belongs to another one, and `any_backbone` does not allow it; StorageError.
        """
        check_name("prompt", name)
        if backbone is not None and not any_backbone:
            self.check_backbone(backbone, name)
        if name not in self._used:
            self._used.setdefault(name, self._read(name))
        return self._used[name]

    def record(self, name: str) -> PromptRecord | None:
        """What the manifest tells of a name. Raises: BankError, StorageError."""
        check_name("prompt", name)
        return self._version.record(name)

    def known_record(self, name: str) -> PromptRecord:
        """As `record`. Raises: UnknownNameError for an unknown name, with one that is like it; StorageError."""
        record = self.record(name)
        if record is None:
            like = [other for other in self._version.names() if other[:1] == name[:1]][:_COMPARED]
            close = difflib.get_close_matches(name, like, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise UnknownNameError(f"{self._version.where} holds no prompt '{name}'{hint}")
        return record

    def records(self) -> Iterator[PromptRecord]:
        """All records by name, those of failed prompts included, read one by one. Raises: BankError, StorageError."""
        return self._version.records()

    def _read(self, name: str) -> Prompt:
        record = self.known_record(name)
        where = self._version.where
        if record.digest is None or record.shape is None:
            raise UnknownNameError(f"{where} holds no blob of '{name}', which has failed: {record.reason}")
        if record.shape[1] != self.backbone.hidden_size:
            raise BankError(f"{where} is refused: '{name}' is {record.shape[1]} wide and its backbone is not")
        array = read_blob(self._access, record.digest, record.shape)
        return Prompt(array, record, self.version, record.tuned_on or self.backbone)
