"""`PromptBank`: the object through which jobs and services use a bank."""

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.bank import aliases
from pipeline.bank import publish as publishing
from pipeline.bank.access import BankAccess, open_store
from pipeline.bank.aliases import AliasMove
from pipeline.bank.cache import Cache, default_cache
from pipeline.bank.collect import DEFAULT_GRACE, CollectedFiles, collect
from pipeline.bank.manifest import BackboneId, Manifest
from pipeline.bank.publish import CarriedPrompt, NewPrompt, Publication
from pipeline.bank.same_backbone import SameBackbone, append_statement, read_statement, read_statements, same_as
from pipeline.bank.snapshot import Prompt, Snapshot
from pipeline.bank.verify import Verification, verify_bank
from pipeline.bank.versions import Version, read_version, version_numbers
from pipeline.bank.watch import Watcher, WatchEvent
from pipeline.errors import BankError, MissingFileError, StorageError, UnknownNameError

_log = logging.getLogger(__name__)
_MOST_OTHERS = 4
"""Most versions beside the current one that stay open, for references such as `name@3`."""
_VERSION = re.compile(r"[1-9][0-9]{0,17}")


class PromptBank:
    """One bank, seen at the version that its alias named when it was opened or last refreshed.

    from promptbank import PromptBank

    bank = PromptBank.open("s3://models/prompts", "prod")
    prompt = bank.load("sentiment")
    prompt.array  # [P, H] float32
    prompt.record.template.input  # "{text}"
    """

    def __init__(self, access: BankAccess, alias: str) -> None:
        self._access = access
        self._alias = alias
        self._current: Snapshot | None = None
        self._swap = threading.Lock()
        self._others: dict[int, Snapshot] = {}
        self._swap_others = threading.Lock()

    @classmethod
    def open(
        cls,
        uri: str | Path,
        alias: str = "latest",
        *,
        create: bool = False,
        cache: str | Path | None = None,
        trusted_keys: Sequence[str | Path] = (),
        signing_key: str | Path | None = None,
    ) -> "PromptBank":
        """Open a bank at a folder or an object store (`s3://bucket/prefix`); reads the alias and one manifest.

        `create` makes the folder and accepts a bank in which the alias is not set yet (version 0).
        `cache` is a local folder that keeps what was read; an object store has one unless told otherwise
        (`default_cache`). With it a bank opens even while its store is unreachable, at the version last seen there.
        `trusted_keys` are public keys in PEM files: a manifest that none of them signed is refused.
        `signing_key` is the private key in a PEM file that signs what this object publishes.
        Raises: BankError when there is no bank or alias, or it is damaged; StorageError.
        """
        bank = cls.connect(
            uri, alias, create=create, cache=cache, trusted_keys=trusted_keys, signing_key=signing_key
        )  # fmt: skip
        bank._start()
        if bank.current is None and not create:
            raise bank._no_alias(alias)
        return bank

    @classmethod
    def connect(
        cls,
        uri: str | Path,
        alias: str = "latest",
        *,
        create: bool = False,
        cache: str | Path | None = None,
        trusted_keys: Sequence[str | Path] = (),
        signing_key: str | Path | None = None,
    ) -> "PromptBank":
        """As `open`, but nothing of the bank is read yet, so that it works while an alias is unset or a file damaged.

        Raises: BankError when the folder or a key is missing, StorageError.
        """
        store = open_store(uri, create)
        if cache is None and "://" in store.uri:
            cache = default_cache()
        access = BankAccess(store, Cache(cache) if cache else None)
        if trusted_keys or signing_key:
            from pipeline.bank.signing import load_signing_key, load_trusted_keys

            trusted = load_trusted_keys(trusted_keys)
            sign = load_signing_key(signing_key, trusted) if signing_key else None
            access = replace(access, trusted=trusted, sign=sign)
        return cls(access, alias)

    @property
    def uri(self) -> str:
        return self._access.store.uri

    @property
    def alias(self) -> str:
        """The alias that a name without a revision is looked up by."""
        return self._alias

    @property
    def current(self) -> Snapshot | None:
        """The version seen now, for several reads that must see one version; None while the alias was never set."""
        return self._current

    @property
    def version(self) -> int:
        """Number of the version that a name without a revision is loaded from; 0 while the alias was never set."""
        return self._current.version if self._current else 0

    def refresh(self) -> int:
        """Read the alias again and return the version seen from now on.

        The prompts in use are read from the new version before it replaces the old one. When one of them is damaged,
        the store is unreachable, or they belong to another backbone now, the old version stays.
        Raises: BankError, StorageError.
        """
        with self._swap:
            move = aliases.current_move(self._access, self._alias)
            if move is not None and (self._current is None or move.manifest != self._current.digest):
                self._current = self._successor(move)
        return self.version

    def watch(self, on_event: Callable[[WatchEvent], None] = lambda event: None, every: float = 10.0) -> Watcher:
        """Refresh every `every` seconds in the background, until the watcher is stopped."""
        return Watcher(self.refresh, self.version, every, on_event)

    def names(self) -> tuple[str, ...]:
        """Names that can be loaded from `version`, sorted. Raises: BankError, StorageError."""
        return self._current.names() if self._current else ()

    def load(self, reference: str, backbone: BackboneId | None = None, any_backbone: bool = False) -> Prompt:
        """Load `name` (from the version seen), `name@3`, or `name@ALIAS` (the alias as it is now); reads one blob.

        Raises: BankError for an unknown name, version or alias, a damaged file, or when `backbone`
        is given, the prompt belongs to another, and `any_backbone` does not allow it; StorageError.
        """
        name, snapshot = self.find(reference)
        return snapshot.load(name, backbone, any_backbone)

    def find(self, reference: str) -> tuple[str, Snapshot]:
        """The name in `name`, `name@3` or `name@ALIAS`, and the version meant. Raises: BankError, StorageError."""
        name, at, revision = reference.partition("@")
        snapshot = self.at(revision) if at else self._current
        if snapshot is None:
            raise BankError(f"cannot load '{name}': the alias '{self._alias}' of the bank is not set yet")
        return name, snapshot

    def at(self, revision: str) -> Snapshot:
        """A version by its number, or the one that an alias names now.

        Raises: UnknownNameError for a number or an alias that is not there, BankError, StorageError.
        """
        if _VERSION.fullmatch(revision):
            try:
                return self._snapshot(int(revision))
            except MissingFileError as error:
                raise UnknownNameError(str(error)) from error
        if revision.isdecimal():
            rule = "from 1 on, of at most 18 digits and without a zero in front"
            raise UnknownNameError(
                f"the version '{revision}' is refused: a number stands for a version; give one {rule}"
            )
        move = aliases.current_move(self._access, revision)
        if move is None:
            raise self._no_alias(revision)
        return self._snapshot(move.version, move.manifest)

    def manifest(self, version: int) -> Manifest:
        """The whole manifest of a version. Raises: BankError when missing or damaged, StorageError."""
        return self._read(version).manifest()

    def versions(self) -> tuple[int, ...]:
        """All versions, ascending, whatever the aliases say. Raises: StorageError."""
        return version_numbers(self._access.store)

    def aliases(self) -> dict[str, int]:
        """Every alias and its version now. Raises: BankError, StorageError."""
        moves = (aliases.current_move(self._access, alias) for alias in aliases.alias_folders(self._access.store))
        return {move.alias: move.version for move in moves if move}

    def alias_move(self, alias: str) -> AliasMove | None:
        """The current move of an alias, None when it was never set. Raises: BankError, StorageError."""
        return aliases.current_move(self._access, alias)

    def alias_history(self, alias: str) -> tuple[AliasMove, ...]:
        """All moves of an alias, oldest first. Raises: BankError, StorageError."""
        return aliases.alias_moves(self._access, alias)

    def check_backbone(self, backbone: BackboneId) -> None:
        """Refuse a backbone that `publish` would refuse. Raises: BankError naming both backbones, StorageError."""
        publishing.check_backbone(self._access, backbone)

    def check_fit(self) -> None:
        """Refuse a store that cannot be published to, found out by writing a probe to it, before any work is done.

        Raises: BankError when it cannot keep a bank, StorageError.
        """
        self._access.store.check_fit()

    def same_backbones(self) -> tuple[SameBackbone, ...]:
        """All statements that two backbones are the same, oldest first. Raises: BankError, StorageError."""
        return read_statements(self._access)

    def same_as(self, backbone: BackboneId) -> tuple[BackboneId, ...]:
        """All backbones that are stated to be the same as this one, itself first. Raises: BankError, StorageError."""
        return tuple(same_as(self._access, backbone).values())

    def state_same_backbone(
        self, first: BackboneId, second: BackboneId, *, rows: int, largest_difference: float, by: str
    ) -> SameBackbone:
        """State that two backbones are the same.

        rows: rows of text that they were compared on; largest_difference: between their log-likelihoods, in nats.

        Signed when this object has a signing key. Raises: BankError when that cannot be, StorageError.
        """
        return append_statement(self._access, first, second, rows, largest_difference, by, same=True)

    def take_back_same_backbone(self, seq: int, by: str) -> SameBackbone:
        """State that the two backbones of a statement are not the same after all. Raises: BankError, StorageError."""
        old = read_statement(self._access, seq)
        return append_statement(self._access, old.first, old.second, 0, 0.0, by, same=False)

    def publish(
        self,
        prompts: Sequence[NewPrompt],
        backbone: BackboneId,
        run: str,
        libraries: Mapping[str, str],
        alias: str | None,
        *,
        carried: Sequence[CarriedPrompt] = (),
        removed: Mapping[str, str] | None = None,
        new_backbone: bool = False,
    ) -> int:
        """Publish a new version, move `alias` to it (None: no alias moves), and return its number.

        This object sees the new version when `alias` is its own. The parent is the newest version: its
        prompts that are not named here are carried forward by reference, and a kept or failed prompt keeps
        the parent's blob when there is one. `carried` prompts stay as another version has them, `removed` ones
        (name -> why) are not carried forward. `new_backbone` allows a parent of another backbone, and then carries
        nothing. Prompts that are not finite, wrongly shaped or wrongly named, and another backbone, are refused
        before anything is written.
        Raises: BankError, StorageError (full disk, no permission): readers then see the version before.
        """
        new = Publication(prompts, backbone, run, libraries, carried, removed or {}, new_backbone)
        number = publishing.publish(self._access, new, alias)
        if alias is not None:
            self._follow(alias)
        return number

    def advance(self, alias: str, version: int, by: str) -> None:
        """Move an alias to a later version, unless it is there or beyond already. Raises: BankError, StorageError."""
        aliases.check_alias(alias)
        aliases.advance_alias(self._access, alias, version, self._read(version).seal.digest, by)
        self._follow(alias)

    def promote(self, version: int, alias: str, by: str) -> AliasMove:
        """Move an alias to any version, forward or back. Raises: BankError, StorageError."""
        aliases.check_alias(alias)
        move = aliases.promote_alias(self._access, alias, self._read(version), by)
        self._follow(alias)
        return move

    def rollback(self, alias: str, by: str) -> AliasMove:
        """Undo an alias' last move; undoing twice goes two back. Raises: BankError, StorageError."""
        move = aliases.rollback_alias(self._access, alias, by)
        self._follow(alias)
        return move

    def verify(self, on_step: Callable[[str], None] = lambda place: None) -> Verification:
        """Read the whole bank and list what is wrong; repairs nothing. Raises: StorageError."""
        return verify_bank(replace(self._access, cache=None), on_step)

    def collect(self, grace: float = DEFAULT_GRACE, dry_run: bool = False) -> CollectedFiles:
        """Delete blobs that no version refers to, and temporaries of killed publishers, older than `grace` seconds.

        Raises: BankError when a version is damaged (then nothing is deleted), StorageError.
        """
        return collect(replace(self._access, cache=None), grace, dry_run)

    def _follow(self, alias: str) -> None:
        """Refresh after a move of this alias. The move holds even when a prompt in use cannot be read any more."""
        if alias == self._alias:
            try:
                self.refresh()
            except (BankError, StorageError) as error:
                _log.warning("'%s' was moved, but this reader stays at version %d: %s", alias, self.version, error)

    def _start(self) -> None:
        try:
            self.refresh()
        except StorageError as error:
            move = aliases.cached_move(self._access, self._alias)
            if move is None:
                raise
            self._current = self._snapshot(move.version, move.manifest)
            _log.warning("%s; going on with version %d, the last one seen of '%s'", error, move.version, self._alias)

    def _successor(self, move: AliasMove) -> Snapshot:
        successor = self._snapshot(move.version, move.manifest)
        seen: set[str] = set()
        # Statements are read here, in the watcher's thread, and not by the next caller of `load`.
        for backbone in self._current.readers if self._current else ():
            successor.check_backbone(backbone)
        # Again until no further prompt has come into use meanwhile.
        while self._current is not None and (fresh := set(self._current.used) - seen):
            successor.check_backbone(self._current.backbone)
            for name in fresh:
                record = successor.record(name)
                if record is not None and record.digest is not None:  # a task that has left the bank is no error
                    successor.load(name)
            seen |= fresh
        return successor

    def _snapshot(self, number: int, digest: str | None = None) -> Snapshot:
        current = self._current
        if current is not None and current.version == number and digest in (None, current.digest):
            return current  # a version never changes
        known = self._others.get(number)
        if known is None or digest not in (None, known.digest):
            known = Snapshot(self._access, self._read(number, digest))
            with self._swap_others:
                self._others[number] = known
                while len(self._others) > _MOST_OTHERS:
                    del self._others[next(iter(self._others))]
        return known

    def _read(self, number: int, digest: str | None = None) -> Version:
        return read_version(self._access, number, digest)

    def _no_alias(self, alias: str) -> BankError:
        numbers = self.versions()
        if not numbers:
            return BankError(f"there is no prompt bank at {self.uri}: publish to it first, or fix the path")
        known = ", ".join(sorted(self.aliases())) or "none"
        return UnknownNameError(
            f"the bank {self.uri} has no alias '{alias}'; known: {known}; newest version: {numbers[-1]}"
        )
