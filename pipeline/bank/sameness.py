"""Statements that two backbones are the same: append-only `backbones/<seq>.json`, signed as manifests are.

The weights of a safetensors folder and of the GGUF file made from it have two fingerprints, whose answers are equal.
A statement says so, by whom and on what evidence, and whoever compares fingerprints takes it for an equality.
"""

from typing import Literal

from pydantic import Field, model_validator

from pipeline.bank.manifest import BackboneId, Frozen, Id, UtcTime, new_id, utc_now
from pipeline.bank.sealed import canonical, check_sealed, parse, seal
from pipeline.bank.source import Source
from pipeline.bank.versions import numbered
from pipeline.errors import BankError

FOLDER = "backbones"
_MAX_BYTES = 64 * 2**10
_MUST_AGREE = ("architecture", "hidden_size", "quantization")


class SameBackbone(Frozen):
    """One statement about two backbones. Of several about the same two, the last one holds."""

    format: Literal[1] = 1
    kind: Literal["same backbone"] = "same backbone"
    """Tells a statement from what else is signed in a bank."""
    seq: int = Field(ge=1)
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
        return self


def statement_numbers(source: Source) -> tuple[int, ...]:
    """All statements, ascending. Raises: StorageError."""
    return numbered(source.store, FOLDER)


def read_statement(source: Source, seq: int) -> SameBackbone:
    """Raises: BankError when it is damaged, or not signed by a key that is trusted; StorageError."""
    key = f"{FOLDER}/{seq}.json"
    where = source.store.where(key)
    data = source.store.read(key, _MAX_BYTES)
    sealed = check_sealed(data, where)
    if source.trusted:
        from pipeline.bank.signing import check_signature

        check_signature(sealed, source.trusted, where)
    statement = parse(SameBackbone, data, where)
    if statement.seq != seq:
        raise BankError(f"{where} is refused: it says that it is statement {statement.seq}")
    return statement


def read_statements(source: Source) -> tuple[SameBackbone, ...]:
    """All statements, oldest first. Raises: as `read_statement`."""
    return tuple(read_statement(source, seq) for seq in statement_numbers(source))


def state(
    source: Source, first: BackboneId, second: BackboneId, rows: int, largest_difference: float, by: str, same: bool
) -> SameBackbone:
    """Append a statement. Raises: BankError when it cannot be true or may not be made, StorageError."""
    if source.trusted and source.sign is None:
        raise BankError(f"cannot write to {source.store.uri}: trusted keys are given, so a signing key is needed too")
    for part in _MUST_AGREE:
        if getattr(first, part) != getattr(second, part):
            raise BankError(f"{first.model} and {second.model} differ in {part}, and cannot be the same backbone")
    if first.fingerprint == second.fingerprint:
        raise BankError(f"{first.model} and {second.model} have one fingerprint, and need no statement")
    while True:
        statement = SameBackbone(
            seq=max(statement_numbers(source), default=0) + 1,
            same=same,
            first=first,
            second=second,
            rows=rows,
            largest_difference=largest_difference,
            time=utc_now(),
            id=new_id(),
            by=by,
        )
        data = seal(canonical(statement.model_dump(mode="json"))[1:] + b"\n", source.sign)
        if source.store.create(f"{FOLDER}/{statement.seq}.json", data):
            return statement


def same_as(source: Source, backbone: BackboneId) -> dict[str, BackboneId]:
    """Fingerprint -> backbone of all that statements say is the same as this one, itself included.

    Raises: as `read_statement`.
    """
    last = {frozenset((each.first.fingerprint, each.second.fingerprint)): each for each in read_statements(source)}
    found = {backbone.fingerprint: backbone}
    while True:
        before = len(found)
        for statement in last.values():
            pair = (statement.first, statement.second)
            if statement.same and any(side.fingerprint in found for side in pair):
                found |= {side.fingerprint: side for side in pair if side.fingerprint not in found}
        if len(found) == before:
            return found


def is_same(source: Source, backbone: BackboneId, other: BackboneId) -> bool:
    """Whether two fingerprints are equal, or stated to be of the same backbone. Raises: as `read_statement`."""
    return backbone.fingerprint == other.fingerprint or other.fingerprint in same_as(source, backbone)
