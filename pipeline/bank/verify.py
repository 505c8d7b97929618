"""Reads a whole bank and tells what is wrong with it; repairs nothing."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.bank.access import BankAccess
from pipeline.bank.aliases import AliasMove, alias_folders, alias_moves
from pipeline.bank.blobs import read_blob
from pipeline.bank.collect import BLOBS, SUFFIX, is_blob
from pipeline.bank.same_backbone import FOLDER, follows_no_other, read_with_digest, statement_numbers
from pipeline.bank.versions import Version, numbered, read_version, version_numbers
from pipeline.errors import BankError

Blob = tuple[str, tuple[int, int]]
"""Digest and shape."""


@dataclass(frozen=True)
class Verification:
    problems: tuple[str, ...]
    """One sentence each; empty when the bank is whole."""
    versions: int
    aliases: int
    blobs: int
    """Blobs that a version refers to."""
    unreferenced: tuple[str, ...]
    """Digests of blobs that no version refers to: of a publisher at work, or for the collector."""
    statements: int = 0
    """That two backbones are the same."""


def verify_bank(access: BankAccess, on_step: Callable[[str], None] = lambda place: None) -> Verification:
    """Verify every manifest (with its signature, where keys are trusted), alias move and blob.

    Raises: StorageError when the store cannot be read.
    """
    problems: list[str] = []
    digests: dict[int, str] = {}
    blobs: set[Blob] = set()
    numbers = version_numbers(access.store)
    for number in numbers:
        on_step(f"version {number}")
        problems += _caught(_verify_version(access, number, numbers, digests, blobs))
    aliases: set[str] = set()
    for alias in alias_folders(access.store):
        on_step(f"alias {alias}")
        problems += _caught(_verify_alias(access, alias, numbers, digests, aliases))
    statements = statement_numbers(access)
    on_step("statements on backbones")
    problems += _caught(_verify_statements(access, statements))
    for digest, shape in sorted(blobs):
        on_step(f"blob {digest}")
        problems += _caught(_verify_blob(access, digest, shape))
    there = {e.name.removesuffix(SUFFIX) for e in access.store.list_files(BLOBS) if is_blob(e.name)}
    referenced = {digest for digest, _ in blobs}
    spare = tuple(sorted(there - referenced))
    return Verification(tuple(problems), len(numbers), len(aliases), len(referenced), spare, len(statements))


def _verify_version(
    access: BankAccess, number: int, numbers: tuple[int, ...], digests: dict[int, str], blobs: set[Blob]
) -> Iterator[str]:
    version: Version = read_version(access, number)
    digests[number] = version.seal.digest
    parent = version.header.parent
    if parent is not None and (parent >= number or parent not in numbers):
        yield f"{version.where}: its parent, version {parent}, is not there"
    for record in version.records():
        if record.digest is not None and record.shape is not None:
            if record.shape[1] != version.header.backbone.hidden_size:
                yield f"{version.where}: '{record.name}' is {record.shape[1]} wide and its backbone is not"
            blobs.add((record.digest, record.shape))


def _verify_alias(
    access: BankAccess, alias: str, numbers: tuple[int, ...], digests: dict[int, str], aliases: set[str]
) -> Iterator[str]:
    if numbered(access.store, f"aliases/{alias}"):
        aliases.add(alias)
    moves: tuple[AliasMove, ...] = alias_moves(access, alias)
    if [move.seq for move in moves] != list(range(1, len(moves) + 1)):
        yield f"{access.store.where(f'aliases/{alias}')}: a move is missing from its history"
    for move in moves:
        where = access.store.where(f"aliases/{alias}/{move.seq}.json")
        if move.version not in numbers:
            yield f"{where}: version {move.version} is not there"
        elif digests.get(move.version, move.manifest) != move.manifest:
            yield f"{where}: version {move.version} is not the one that was named; it was replaced"


def _verify_statements(access: BankAccess, numbers: tuple[int, ...]) -> Iterator[str]:
    if numbers != tuple(range(1, len(numbers) + 1)):
        yield f"{access.store.where(FOLDER)}: a statement is missing from their row"
    before: str | None = None
    for seq in numbers:
        try:
            statement, digest = read_with_digest(access, seq)
        except BankError as error:
            yield str(error)
            before = None
            continue
        # Where the one before is missing or damaged, that was told.
        if before is not None and seq - 1 in numbers and statement.previous != before:
            yield follows_no_other(access.store.where(f"{FOLDER}/{seq}.json"))
        before = digest


def _verify_blob(access: BankAccess, digest: str, shape: tuple[int, int]) -> Iterator[str]:
    read_blob(access, digest, shape)
    yield from ()


def _caught(problems: Iterator[str]) -> list[str]:
    """All problems, a refusal being the last one."""
    found = []
    try:
        for problem in problems:
            found.append(problem)
    except BankError as error:
        found.append(str(error))
    return found
