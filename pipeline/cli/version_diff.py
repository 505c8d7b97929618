"""What differs between two versions of a bank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.bank import PromptRecord, Snapshot

_ABOUT_THE_VERSION = {"name", "status", "reason", "tuned_in", "metrics_previous", "shape", "dtype"}
"""Fields of a record that say how it came into this version, or that follow from other fields."""


@dataclass(frozen=True)
class FieldChange:
    field: str
    """A dotted path, such as `metrics.dev_after`."""
    before: Any
    after: Any


@dataclass(frozen=True)
class PromptChange:
    name: str
    kind: Literal["added", "removed", "changed"]
    fields: tuple[FieldChange, ...]
    """All fields of a prompt that was added or removed."""


@dataclass(frozen=True)
class VersionDiff:
    header: tuple[FieldChange, ...]
    """Changes in `backbone` and `libraries`."""
    prompts: tuple[PromptChange, ...]
    """By name."""
    unchanged: int


def diff_versions(before: Snapshot, after: Snapshot) -> VersionDiff:
    """What changed from one version to another. Raises: BankError when one is damaged, StorageError."""
    old = {record.name: record for record in before.records()}
    new = {record.name: record for record in after.records()}
    changes = [_compare_prompts(name, old.get(name), new.get(name)) for name in sorted(old.keys() | new.keys())]
    found = tuple(change for change in changes if change)
    return VersionDiff(_changes(_header(before), _header(after)), found, len(changes) - len(found))


def _compare_prompts(name: str, old: PromptRecord | None, new: PromptRecord | None) -> PromptChange | None:
    if old is not None and new is not None:
        # A status counts as a change only when the prompt was kept, failed, or no longer fails; being carried is none.
        news = new.status in ("kept", "failed") or old.status == "failed"
        fields = _changes(_fields(old, news), _fields(new, news))
        return PromptChange(name, "changed", fields) if fields else None
    fields = _changes(_fields(old, True) if old else {}, _fields(new, True) if new else {})
    return PromptChange(name, "added" if old is None else "removed", fields)


def _fields(record: PromptRecord, with_status: bool) -> dict[str, Any]:
    dropped = _ABOUT_THE_VERSION - ({"status", "reason"} if with_status else set())
    tables = {split: ", ".join(state.written for state in states) for split, states in (record.tables or {}).items()}
    return _flat(record.model_dump(mode="json", exclude={*dropped, "tables"}) | ({"tables": tables} if tables else {}))


def _header(snapshot: Snapshot) -> dict[str, Any]:
    return _flat(snapshot.header.model_dump(mode="json", include={"backbone", "libraries"}))


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for field, value in fields.items():
        if isinstance(value, dict):
            flat |= {f"{field}.{key}": inner for key, inner in _flat(value).items()}
        else:
            flat[field] = value
    return flat


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[FieldChange, ...]:
    differing = [field for field in dict.fromkeys([*old, *new]) if old.get(field) != new.get(field)]
    return tuple(FieldChange(field, old.get(field), new.get(field)) for field in differing)
