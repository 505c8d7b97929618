"""Aliases: append-only moves `aliases/<name>/<seq>.json`; the highest seq is the current one."""

from typing import Literal

from pydantic import Field

from pipeline.bank.manifest import Frozen, Name, UtcTime, check_name, utc_now
from pipeline.bank.sealed import canonical, parse, seal, sealed_body
from pipeline.bank.store import Store
from pipeline.bank.versions import numbered
from pipeline.errors import BankError

_MAX_MOVE_BYTES = 64 * 2**10


class AliasMove(Frozen):
    """One move of an alias to a version."""

    format: Literal[1] = 1
    alias: Name
    seq: int = Field(ge=1)
    version: int = Field(ge=1)
    time: UtcTime
    by: str
    """The run or person that moved it."""


def check_alias(alias: str) -> None:
    """Raises: BankError when `name@alias` could not be told from `name@version`."""
    check_name("alias", alias)
    if alias.isdecimal():
        raise BankError(f"the alias name '{alias}' is refused: a number stands for a version")


def current_move(store: Store, alias: str) -> AliasMove | None:
    """The move in force, None when the alias was never set. Raises: BankError, StorageError."""
    check_alias(alias)
    seqs = numbered(store, f"aliases/{alias}")
    return _read_move(store, alias, seqs[-1]) if seqs else None


def alias_moves(store: Store, alias: str) -> tuple[AliasMove, ...]:
    """All moves, oldest first. Raises: BankError, StorageError."""
    check_alias(alias)
    return tuple(_read_move(store, alias, seq) for seq in numbered(store, f"aliases/{alias}"))


def advance_alias(store: Store, alias: str, version: int, by: str) -> None:
    """Move an alias to a new version, unless a later one overtook it. Raises: BankError, StorageError."""
    while True:
        current = current_move(store, alias)
        # A later version descends from this one and holds its prompts: going back would hide the other's.
        if current is not None and current.version >= version:
            return
        seq = current.seq + 1 if current else 1
        move = AliasMove(alias=alias, seq=seq, version=version, time=utc_now(), by=by)
        if store.create(f"aliases/{alias}/{seq}.json", seal(canonical(move.model_dump())[1:] + b"\n")):
            return


def _read_move(store: Store, alias: str, seq: int) -> AliasMove:
    key = f"aliases/{alias}/{seq}.json"
    where = store.where(key)
    data = store.read(key, _MAX_MOVE_BYTES)
    sealed_body(data, where)
    move = parse(AliasMove, data, where)
    if (move.alias, move.seq) != (alias, seq):
        raise BankError(f"{where} is refused: it says that it is move {move.seq} of '{move.alias}'")
    return move
