"""The collector: deletes what killed publishers left behind, and nothing that anyone could need.

Versions are never deleted, so whatever a version refers to stays, for readers of old versions too. A blob that
none refers to may belong to a publisher at work: it makes such a blob young before it creates its version,
so only what is older than the grace period goes. Should both meet all the same, the publisher looks after its
blobs once its version is visible, and the collector puts back what a newer version turns out to need.
"""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pipeline.bank.access import BankAccess, blob_key
from pipeline.bank.blobs import MAX_BLOB_BYTES
from pipeline.bank.versions import read_version, version_numbers
from pipeline.errors import BankError, MissingFileError

BLOBS = "blobs/sha256"
SUFFIX = ".safetensors"
DEFAULT_GRACE = 7 * 24 * 3600.0
SHORTEST_GRACE = 3600.0
_BATCH = 32


@dataclass(frozen=True)
class CollectedFiles:
    """What one collection deleted, or would delete."""

    keys: tuple[str, ...]
    bytes: int


def collect(access: BankAccess, grace: float = DEFAULT_GRACE, dry_run: bool = False) -> CollectedFiles:
    """Delete unreferenced blobs and leftovers older than `grace` seconds.

    Raises: BankError when a version cannot be read (then nothing is deleted) or the grace is too short; StorageError.
    """
    if grace < SHORTEST_GRACE:
        raise BankError(
            f"a grace period of {grace:.0f} seconds is refused, for a publisher at work needs its blobs: "
            f"give {SHORTEST_GRACE:.0f} or more"
        )
    before = time.time() - grace
    # Blobs are listed before versions: a version that appears in between only keeps more of them.
    old = {entry.name: entry for entry in access.store.list_files(BLOBS) if entry.modified < before}
    seen = version_numbers(access.store)
    referenced = set(_referenced(access, seen))
    doomed = {
        f"{BLOBS}/{name}": entry
        for name, entry in old.items()
        if is_blob(name) and name.removesuffix(SUFFIX) not in referenced
    }
    leftovers = {key: entry for key, entry in access.store.list_leftovers().items() if entry.modified < before}
    if not dry_run:
        for key in leftovers:
            access.store.delete(key)
        for batch in _batches(list(doomed)):
            _delete(access, batch, before, max(seen, default=0))
    found = {**doomed, **leftovers}
    return CollectedFiles(tuple(sorted(found)), sum(entry.size for entry in found.values()))


def is_blob(name: str) -> bool:
    """Whether a file under `BLOBS` is a bank's; any other is let be."""
    return re.fullmatch(rf"[0-9a-f]{{64}}{re.escape(SUFFIX)}", name) is not None


def _delete(access: BankAccess, keys: Sequence[str], before: float, newest_seen: int) -> None:
    young = {f"{BLOBS}/{entry.name}" for entry in access.store.list_files(BLOBS) if entry.modified >= before}
    deleted: dict[str, bytes] = {}
    try:
        for key in keys:
            if key not in young:
                with suppress(MissingFileError):  # another collector was first
                    deleted[key] = access.store.read(key, MAX_BLOB_BYTES)
                    access.store.delete(key)
    finally:  # also when one of many could not be deleted
        newer = [number for number in version_numbers(access.store) if number > newest_seen]
        for key in deleted.keys() & set(map(blob_key, _referenced(access, newer))):
            access.store.create(key, deleted[key])


def _batches(keys: list[str]) -> Iterator[list[str]]:
    return (keys[start : start + _BATCH] for start in range(0, len(keys), _BATCH))


def _referenced(access: BankAccess, numbers: Sequence[int]) -> Iterator[str]:
    for number in numbers:
        for record in read_version(access, number).records():
            if record.digest is not None:
                yield record.digest
