"""Aliases: append-only moves `aliases/<name>/<seq>.json`; the highest seq is the current one."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from pipeline.bank.access import BankAccess
from pipeline.bank.manifest import NAME, Digest, Id, Name, StoredModel, UtcTime, check_name, new_id, utc_now
from pipeline.bank.sealed import canonical, check_sealed, parse, seal
from pipeline.bank.store import Store
from pipeline.bank.versions import Version, numbered
from pipeline.errors import BankError, UnknownNameError

_MAX_MOVE_BYTES = 64 * 2**10
Action = Literal["publish", "promote", "rollback"]


class AliasMove(StoredModel):
    """One move of an alias to a version."""

    format: Literal[1] = 1
    alias: Name
    seq: int = Field(ge=1)
    version: int = Field(ge=1)
    manifest: Digest
    """The digest in the version's seal: an alias names bytes, not only a number."""
    action: Action
    time: UtcTime
    id: Id
    """Random: tells two moves of the same kind, by the same person, in the same second, apart."""
    by: str
    """The run or person that moved it."""


def check_alias(alias: str) -> None:
    """Raises: BankError when `name@alias` could not be told from `name@version`."""
    check_name("alias", alias)
    if alias.isdecimal():
        raise UnknownNameError(
            f"the alias name '{alias}' is refused: a number stands for a version; begin it with a letter"
        )


def alias_folders(store: Store) -> tuple[str, ...]:
    """Names under which an alias' moves may lie, sorted; files beside them are let be. Raises: StorageError.

    A folder without a move is no alias: a publisher whose disk was full, or a console, has made it.
    """
    files = {entry.name for entry in store.list_files("aliases")}
    names = sorted(set(store.list_names("aliases")) - files)
    return tuple(name for name in names if NAME.fullmatch(name) and not name.isdecimal())


def current_move(access: BankAccess, alias: str) -> AliasMove | None:
    """The move in force, None when the alias was never set. Raises: BankError, StorageError."""
    check_alias(alias)
    seqs = numbered(access.store, f"aliases/{alias}")
    if not seqs:
        return None
    move, data = _read(access.store, alias, seqs[-1])
    if access.cache:
        access.cache.keep_move(access.store.uri, alias, data)
    return move


def cached_move(access: BankAccess, alias: str) -> AliasMove | None:
    """Where the alias stood when this machine last saw it; None when it never did. Raises: BankError."""
    data = access.cache.last_move(access.store.uri, alias) if access.cache else None
    return None if data is None else _parsed(data, f"the cached alias '{alias}' of {access.store.uri}")


def alias_moves(access: BankAccess, alias: str) -> tuple[AliasMove, ...]:
    """All moves, oldest first. Raises: BankError, StorageError."""
    check_alias(alias)
    return tuple(_read(access.store, alias, seq)[0] for seq in numbered(access.store, f"aliases/{alias}"))


def advance_alias(access: BankAccess, alias: str, version: int, digest: str, by: str) -> None:
    """Move an alias to a new version, unless a later one overtook it. Raises: BankError, StorageError."""
    while True:
        current = current_move(access, alias)
        # A later version descends from this one and holds its prompts: going back would hide the other's.
        if current is not None and current.version >= version:
            return
        if _move(access.store, alias, current, version, digest, "publish", by):
            return


def promote_alias(access: BankAccess, alias: str, version: Version, by: str) -> AliasMove:
    """Move an alias to any version, forward or back. Raises: BankError, StorageError."""
    while True:
        current = current_move(access, alias)
        move = _move(access.store, alias, current, version.header.version, version.seal.digest, "promote", by)
        if move is not None:
            return move


def rollback_alias(access: BankAccess, alias: str, by: str) -> AliasMove:
    """Undo the alias' last move; undoing twice goes two back. Raises: BankError, StorageError."""
    moves = alias_moves(access, alias)
    if not moves:
        raise BankError(f"there is no alias '{alias}' in {access.store.uri}; promote a version to it first")
    standing = _standing(moves)
    if len(standing) < 2:
        raise BankError(f"the alias '{alias}' cannot be rolled back: no move is left before the current one")
    target = standing[-2]
    move = _move(access.store, alias, moves[-1], target.version, target.manifest, "rollback", by)
    if move is None:
        raise BankError(f"the alias '{alias}' was moved by someone else just now: look at it, then try again")
    return move


def _read(store: Store, alias: str, seq: int) -> tuple[AliasMove, bytes]:
    key = f"aliases/{alias}/{seq}.json"
    where = store.where(key)
    data = store.read(key, _MAX_MOVE_BYTES)
    move = _parsed(data, where)
    if (move.alias, move.seq) != (alias, seq):
        raise BankError(f"{where} is refused: it says that it is move {move.seq} of '{move.alias}'")
    return move, data


def _standing(moves: Sequence[AliasMove]) -> list[AliasMove]:
    """The moves that were not undone."""
    standing: list[AliasMove] = []
    for move in moves:
        if move.action != "rollback":
            standing.append(move)
        elif standing:
            standing.pop()
    return standing


def _move(
    store: Store, alias: str, current: AliasMove | None, version: int, digest: str, action: Action, by: str
) -> AliasMove | None:
    """The new move, None when another one took its number."""
    seq = current.seq + 1 if current else 1
    move = AliasMove(
        alias=alias, seq=seq, version=version, manifest=digest, action=action, time=utc_now(), id=new_id(), by=by
    )  # fmt: skip
    data = seal(canonical(move.model_dump())[1:] + b"\n")
    return move if store.create(f"aliases/{alias}/{seq}.json", data) else None


def _parsed(data: bytes, where: str) -> AliasMove:
    check_sealed(data, where)
    return parse(AliasMove, data, where)
