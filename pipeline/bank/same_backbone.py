"""Statements that two backbones are the same: append-only `backbones/<seq>.json`, signed as manifests are.

The weights of a safetensors folder and of the GGUF file made from it have two fingerprints, whose answers are equal.
A statement says so, by whom and on what evidence, and whoever compares fingerprints takes it for an equality.
"""

import logging
from collections.abc import Mapping
from typing import Literal

from pydantic import Field, model_validator

from pipeline.bank.access import BankAccess
from pipeline.bank.manifest import BackboneId, Digest, Id, StoredModel, UtcTime, new_id, utc_now
from pipeline.bank.sealed import canonical, check_sealed, parse, seal
from pipeline.bank.versions import numbered, read_version, version_numbers
from pipeline.errors import BankError, StorageError

_log = logging.getLogger(__name__)
FOLDER = "backbones"
_MAX_BYTES = 64 * 2**10
_MUST_AGREE = ("architecture", "hidden_size", "quantization")


class SameBackbone(StoredModel):
    """One statement about two backbones. Of several about the same two, the last one holds."""

    format: Literal[1] = 1
    kind: Literal["same backbone"] = "same backbone"
    """Tells a statement from what else is signed in a bank."""
    seq: int = Field(ge=1)
    previous: Digest | None
    """The digest of the statement before, so that none can be taken out between two or come from another bank;
    None of the first."""
    same: bool
    """False takes an earlier statement back."""
    first: BackboneId
    second: BackboneId
    rows: int = Field(ge=0)
    """How many rows of text were compared; 0 where a statement is taken back."""
    largest_difference: float = Field(ge=0, allow_inf_nan=False)
    """Between the log-likelihoods of a row, in nats."""
    time: UtcTime
    id: Id
    """Random: tells two statements of the same kind, by the same person, in the same second, apart."""
    by: str

    @model_validator(mode="after")
    def _can_be(self) -> "SameBackbone":
        for part in _MUST_AGREE:
            if getattr(self.first, part) != getattr(self.second, part):
                raise ValueError(f"the two differ in {part}, and cannot be the same")
        if self.first.fingerprint == self.second.fingerprint:
            raise ValueError("the two have one fingerprint, and need no statement")
        if self.same and self.rows < 1:
            raise ValueError("a statement needs rows on which the two were compared")
        if (self.previous is None) != (self.seq == 1):
            raise ValueError("every statement but the first names the digest of the one before")
        return self


def statement_numbers(access: BankAccess) -> tuple[int, ...]:
    """All statements, ascending. Raises: StorageError."""
    return numbered(access.store, FOLDER)


def read_statement(access: BankAccess, seq: int) -> SameBackbone:
    """Raises: BankError when it is damaged, or not signed by a key that is trusted; StorageError."""
    return read_with_digest(access, seq)[0]


def read_with_digest(access: BankAccess, seq: int) -> tuple[SameBackbone, str]:
    """A statement and its digest, which the next one names. Raises: as `read_statement`."""
    return _checked(access, seq, _read(access, seq), _where(access, seq))


def read_statements(access: BankAccess) -> tuple[SameBackbone, ...]:
    """All statements, oldest first. Raises: as `read_statement`, and BankError where one does not follow the other."""
    found = {seq: _read(access, seq) for seq in statement_numbers(access)}
    statements = _row(access, found)
    if access.cache and found:
        access.cache.keep_statements(access.store.uri, list(found.values()))
    return statements


def _known_statements(access: BankAccess) -> tuple[SameBackbone, ...]:
    """Those of the bank, or while its store is gone those that this machine saw last."""
    try:
        return read_statements(access)
    except StorageError as error:
        kept = access.cache.last_statements(access.store.uri) if access.cache else None
        if not kept:
            raise
        _log.warning("%s; going on with the statements on backbones that were seen last", error)
        return _row(access, dict(enumerate(kept, 1)))


def _row(access: BankAccess, found: Mapping[int, bytes]) -> tuple[SameBackbone, ...]:
    statements: list[SameBackbone] = []
    before: str | None = None
    for seq, data in found.items():
        statement, digest = _checked(access, seq, data, _where(access, seq))
        if statement.previous != before:
            raise BankError(follows_no_other(_where(access, seq)))
        statements.append(statement)
        before = digest
    return tuple(statements)


def follows_no_other(where: str) -> str:
    return f"{where} is refused: it does not follow the statement before it, which was removed or replaced"


def _checked(access: BankAccess, seq: int, data: bytes, where: str) -> tuple[SameBackbone, str]:
    """The statement and its digest."""
    sealed = check_sealed(data, where)
    if access.trusted:
        from pipeline.bank.signing import check_signature

        check_signature(sealed, access.trusted, where)
    statement = parse(SameBackbone, data, where)
    if statement.seq != seq:
        raise BankError(f"{where} is refused: it says that it is statement {statement.seq}")
    return statement, sealed.digest


def _read(access: BankAccess, seq: int) -> bytes:
    return access.store.read(f"{FOLDER}/{seq}.json", _MAX_BYTES)


def _where(access: BankAccess, seq: int) -> str:
    return access.store.where(f"{FOLDER}/{seq}.json")


def append_statement(
    access: BankAccess, first: BackboneId, second: BackboneId, rows: int, largest_difference: float, by: str, same: bool
) -> SameBackbone:
    """Append a statement. Raises: BankError when it cannot be true or may not be made, StorageError."""
    if access.trusted and access.sign is None:
        raise BankError(f"cannot write to {access.store.uri}: trusted keys are given, so a signing key is needed too")
    for part in _MUST_AGREE:
        if getattr(first, part) != getattr(second, part):
            raise BankError(f"{first.model} and {second.model} differ in {part}, and cannot be the same backbone")
    if first.fingerprint == second.fingerprint:
        raise BankError(f"{first.model} and {second.model} have one fingerprint, and need no statement")
    newest = max(version_numbers(access.store), default=0)
    if access.sign is None and newest and read_version(access, newest).seal.signature:
        raise BankError(
            f"cannot write to {access.store.uri}: its newest version is signed, and a statement that is not would stop "
            "every reader with trusted keys; give the signing key (--signing-key)"
        )
    while True:
        last = max(statement_numbers(access), default=0)
        previous = read_with_digest(access, last)[1] if last else None
        statement = SameBackbone(
            seq=last + 1,
            previous=previous,
            same=same,
            first=first,
            second=second,
            rows=rows,
            largest_difference=largest_difference,
            time=utc_now(),
            id=new_id(),
            by=by,
        )
        data = seal(canonical(statement.model_dump(mode="json"))[1:] + b"\n", access.sign)
        if access.store.create(f"{FOLDER}/{statement.seq}.json", data):
            return statement


def same_as(access: BankAccess, backbone: BackboneId) -> dict[str, BackboneId]:
    """Fingerprint -> backbone of all that statements say is the same as this one, itself included.

    Raises: as `read_statement`.
    """
    last = {frozenset((each.first.fingerprint, each.second.fingerprint)): each for each in _known_statements(access)}
    found = {backbone.fingerprint: backbone}
    while True:
        before = len(found)
        for statement in last.values():
            pair = (statement.first, statement.second)
            if statement.same and any(side.fingerprint in found for side in pair):
                found |= {side.fingerprint: side for side in pair if side.fingerprint not in found}
        if len(found) == before:
            return found


def is_same(access: BankAccess, backbone: BackboneId, other: BackboneId) -> bool:
    """Whether two fingerprints are equal, or stated to be of the same backbone. Raises: as `read_statement`."""
    return backbone.fingerprint == other.fingerprint or other.fingerprint in same_as(access, backbone)
