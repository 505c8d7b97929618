"""`PromptBank`: what a job or a service holds in its hand."""

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.bank import publish as publishing
from pipeline.bank.aliases import AliasMove, advance_alias, alias_moves, check_alias, current_move
from pipeline.bank.blobs import read_blob
from pipeline.bank.manifest import BackboneId, Manifest, PromptRecord, check_name
from pipeline.bank.publish import NewPrompt
from pipeline.bank.store import Store, open_store
from pipeline.bank.versions import Version, read_version, version_numbers
from pipeline.errors import BankError

_VERSION = re.compile(r"[1-9][0-9]{0,17}")


@dataclass(frozen=True, eq=False)
class Prompt:
    """A soft prompt, verified."""

    array: np.ndarray
    """[P, H] float32, read-only"""
    record: PromptRecord
    version: int
    backbone: BackboneId


class PromptBank:
    """One bank, seen at the version that its alias named when it was opened or last refreshed."""

    def __init__(self, store: Store, alias: str, seen: Version | None) -> None:
        self._store = store
        self._alias = alias
        self._seen = seen

    @classmethod
    def open(cls, uri: str | Path, alias: str = "latest", create: bool = False) -> "PromptBank":
        """Open a bank at a folder; reads the alias and one manifest.

        `create` makes the folder and accepts a bank in which the alias is not set yet (version 0).
        Raises: BankError when there is no bank or alias, or it is damaged; StorageError.
        """
        bank = cls(open_store(uri, create), alias, None)
        if bank.refresh() == 0 and not create:
            numbers = version_numbers(bank._store)
            if not numbers:
                raise BankError(f"there is no prompt bank at {uri}: publish to it first, or mend the path")
            known = ", ".join(sorted(bank.aliases())) or "none"
            raise BankError(f"the bank {uri} has no alias '{alias}'; known: {known}; newest version: {numbers[-1]}")
        return bank

    @property
    def version(self) -> int:
        """The version that a bare name is loaded from; 0 while the alias was never set."""
        return self._seen.header.version if self._seen else 0

    def refresh(self) -> int:
        """Read the alias again and return the version seen from now on. Raises: BankError, StorageError."""
        move = current_move(self._store, self._alias)
        if move is not None and move.version != self.version:
            self._seen = read_version(self._store, move.version)
        return self.version

    def names(self) -> tuple[str, ...]:
        """Names that can be loaded from `version`, sorted. Raises: BankError."""
        if self._seen is None:
            return ()
        return tuple(name for name, record in self._seen.manifest().prompts.items() if record.digest)

    def load(self, reference: str, backbone: BackboneId | None = None) -> Prompt:
        """Load `name` (from the version seen), `name@3`, or `name@ALIAS` (the alias as it is now); reads one blob.

        Raises: BankError for an unknown name, version or alias, a damaged file, or when `backbone`
        is given and the prompt belongs to another; StorageError.
        """
        name, at, revision = reference.partition("@")
        check_name("prompt", name)
        version = self._resolve(revision) if at else self._seen
        if version is None:
            raise BankError(f"cannot load '{name}': the alias '{self._alias}' of the bank is not set yet")
        if backbone is not None:
            publishing.refuse_other_backbone(version.where, version.header.backbone, backbone)
        record = version.record(name)
        if record is None:
            close = difflib.get_close_matches(name, version.names(), n=1)
            hint = f"; did you mean '{close[0]}'?" if close else ""
            raise BankError(f"{version.where} holds no prompt '{name}'{hint}")
        if record.digest is None or record.shape is None:
            raise BankError(f"{version.where} holds no blob of '{name}', which has failed: {record.reason}")
        array = read_blob(self._store, record.digest, record.shape)
        return Prompt(array, record, version.header.version, version.header.backbone)

    def manifest(self, version: int) -> Manifest:
        """The whole manifest of a version. Raises: BankError when missing or damaged, StorageError."""
        return self._read(version).manifest()

    def versions(self) -> tuple[int, ...]:
        """All versions, ascending, whatever the aliases say. Raises: StorageError."""
        return version_numbers(self._store)

    def aliases(self) -> dict[str, int]:
        """Every alias and its version now. Raises: BankError, StorageError."""
        moves = (current_move(self._store, alias) for alias in sorted(self._store.list_names("aliases")))
        return {move.alias: move.version for move in moves if move}

    def alias_history(self, alias: str) -> tuple[AliasMove, ...]:
        """All moves of an alias, oldest first. Raises: BankError, StorageError."""
        return alias_moves(self._store, alias)

    def check_backbone(self, backbone: BackboneId) -> None:
        """What `publish` would refuse, before any work. Raises: BankError naming both backbones, StorageError."""
        publishing.check_backbone(self._store, backbone)

    def publish(
        self,
        prompts: Sequence[NewPrompt],
        backbone: BackboneId,
        run: str,
        libraries: Mapping[str, str],
        alias: str,
    ) -> int:
        """Publish a new version, move `alias` to it, and return its number.

        This object sees the new version when `alias` is its own. The parent is the newest version: its
        prompts that are not named here are carried forward by reference, and a kept or failed prompt keeps
        the parent's blob when there is one. Prompts that are not finite, wrongly shaped or wrongly named,
        and another backbone, are refused before anything is written.
        Raises: BankError, StorageError (full disk, no permission): readers then see the version before.
        """
        number = publishing.publish(self._store, prompts, backbone, run, libraries, alias)
        self.refresh()
        return number

    def advance(self, alias: str, version: int, by: str) -> None:
        """Move an alias to a later version; one that is at it or beyond stays. Raises: BankError, StorageError."""
        check_alias(alias)
        self._read(version)
        advance_alias(self._store, alias, version, by)
        self.refresh()

    def _resolve(self, revision: str) -> Version:
        if _VERSION.fullmatch(revision):
            return self._read(int(revision))
        check_alias(revision)
        move = current_move(self._store, revision)
        if move is None:
            known = ", ".join(sorted(self.aliases())) or "none"
            raise BankError(f"the bank {self._store.where('aliases')} has no alias '{revision}'; known: {known}")
        return self._read(move.version)

    def _read(self, number: int) -> Version:
        if self._seen is not None and number == self.version:
            return self._seen  # a version never changes
        return read_version(self._store, number)
