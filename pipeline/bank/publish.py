"""Publishing: blobs, then the manifest created only if absent, then the alias.

Killed before the manifest, a publication leaves unreferenced blobs and nothing else;
killed after it, a whole version that the alias does not point to yet.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from pydantic import ValidationError

from pipeline.bank.access import BankAccess, blob_key
from pipeline.bank.aliases import advance_alias, current_move
from pipeline.bank.blobs import MAX_BLOB_BYTES, encode_blob, write_blob
from pipeline.bank.manifest import (
    BackboneId,
    LabelScore,
    Manifest,
    Metrics,
    PromptRecord,
    TableState,
    Template,
    check_name,
    new_id,
    utc_now,
)
from pipeline.bank.same_backbone import is_same
from pipeline.bank.sealed import first_problem
from pipeline.bank.versions import create_version, read_version, version_numbers
from pipeline.errors import BankError


@dataclass(frozen=True, eq=False)
class NewPrompt:
    """One prompt to publish: tuned, with an array, or kept or failed, without one and with a reason."""

    name: str
    array: np.ndarray | None
    """[P, H] float32"""
    task: str
    template: Template
    labels: Sequence[str] | None
    metric: str
    metrics: Metrics
    initialisation: str
    length: int
    steps: int
    seed: int
    corpus_digest: str
    settings_digest: str
    status: Literal["tuned", "kept", "failed"] = "tuned"
    reason: str | None = None
    inputs_digest: str | None = None
    learned: bool | None = None
    rows_run: Literal["packed", "shared", "padded"] | None = None
    label_score: LabelScore = "sum"
    label_offsets: Sequence[float] | None = None
    """In the order of the labels."""
    tables: Mapping[str, Sequence[TableState]] | None = None


@dataclass(frozen=True)
class CarriedPrompt:
    """A prompt of an earlier version that the new version refers to as it is, whatever the newest has of that name."""

    record: PromptRecord
    """The record as the earlier version has it."""
    status: Literal["carried_forward", "kept"] = "carried_forward"
    reason: str | None = None
    inputs_digest: str | None = None
    """Replaces the record's digest after a new prompt was tuned and refused."""


@dataclass(frozen=True)
class Publication:
    """What a new version holds."""

    prompts: Sequence[NewPrompt]
    backbone: BackboneId
    run: str
    libraries: Mapping[str, str]
    carried: Sequence[CarriedPrompt] = ()
    removed: Mapping[str, str] = field(default_factory=dict)
    """Prompts of the parent that the new version no longer has, and why."""
    new_backbone: bool = False
    """The newest version may belong to another backbone: nothing of it is then carried forward."""


def publish(access: BankAccess, new: Publication, alias: str | None) -> int:
    """Publish a new version and return its number; without an alias, none moves.

    Raises: BankError before anything is written, StorageError.
    """
    if access.trusted and access.sign is None:
        raise BankError(f"cannot publish to {access.store.uri}: trusted keys are given, so a signing key is needed too")
    if alias is not None:
        current_move(access, alias)  # a damaged alias is refused before the first write
    _check_prompts(new)
    blobs = {prompt.name: encode_blob(prompt.array) for prompt in new.prompts if prompt.array is not None}
    digests = {name: digest for name, (digest, _) in blobs.items()}
    parent, usable = _parent(access, new)
    manifest = _manifest(parent, usable, new, digests)  # refused, if it must be, before the first write
    referenced = {record.digest for record in parent.prompts.values()} if parent else set()
    for digest, data in blobs.values():
        write_blob(access, digest, data, digest in referenced)
    while (seal := create_version(access, manifest)) is None:
        parent, usable = _parent(access, new)  # another publisher was first: its version becomes the parent
        manifest = _manifest(parent, usable, new, digests)
    # A collector that scanned before this version was visible may have deleted an old blob of the same bytes.
    for digest, data in blobs.values():
        if not access.store.exists(blob_key(digest)):
            access.store.create(blob_key(digest), data)
    if alias is not None:
        advance_alias(access, alias, manifest.version, seal, by=f"run {new.run}")
    return manifest.version


def check_backbone(access: BankAccess, backbone: BackboneId) -> None:
    """Refuse a backbone other than that of the newest version. Raises: BankError."""
    numbers = version_numbers(access.store)
    if numbers:
        version = read_version(access, numbers[-1])
        if not _is_same_now(access, version.header.backbone, backbone):
            raise wrong_backbone_error(version.where, version.header.backbone, backbone)


def _is_same_now(access: BankAccess, owner: BackboneId, other: BackboneId) -> bool:
    """As `is_same`, by the store's statements alone: cached ones are enough for readers, not for a publisher."""
    return is_same(replace(access, cache=None), owner, other)


def wrong_backbone_error(where: str, owner: BackboneId, other: BackboneId) -> BankError:
    """Why the file at `where` is refused: names both backbones, and the parts in which they differ."""
    return BankError(
        f"{where} belongs to the backbone {_described(owner)} and not to {_described(other)}: "
        f"they differ in {', '.join(owner.differing_parts(other))}; use a bank of this backbone, or a new folder, "
        "or state that the two are the same: promptbank same-backbone MODEL MODEL"
    )


def _described(backbone: BackboneId) -> str:
    return f"{backbone.model} (fingerprint {backbone.fingerprint}, {backbone.quantization})"


def _check_prompts(new: Publication) -> None:
    names = [prompt.name for prompt in new.prompts] + [carried.record.name for carried in new.carried]
    if not names:
        raise BankError("there is nothing to publish: no prompt was given")
    for name, count in Counter(names).items():
        check_name("prompt", name)
        if count > 1:
            raise BankError(f"prompt '{name}' is there twice in one publication; give each its own name")
        if name in new.removed:
            raise BankError(f"prompt '{name}' is published and removed at once; do one of them")
    for prompt in new.prompts:
        if (prompt.array is None) == (prompt.status == "tuned"):
            raise BankError(f"prompt '{prompt.name}': an array belongs to the status 'tuned' and to no other")
        if prompt.array is not None:
            _check_array(prompt.name, prompt.array, new.backbone.hidden_size)


def _check_array(name: str, array: np.ndarray, hidden_size: int) -> None:
    if array.dtype != np.float32 or array.ndim != 2 or array.shape[0] < 1 or array.shape[1] != hidden_size:
        found = f"{list(array.shape)} {array.dtype}"
        raise BankError(f"prompt '{name}' is refused: {found} where [P, {hidden_size}] float32 is expected")
    if array.nbytes > MAX_BLOB_BYTES // 2:
        raise BankError(f"prompt '{name}' is refused: {array.nbytes:,} bytes are more than a blob may hold")
    if not np.isfinite(array).all():
        raise BankError(f"prompt '{name}' is refused: it holds values that are not finite (NaN or infinite)")


def _parent(access: BankAccess, new: Publication) -> tuple[Manifest | None, bool]:
    """The newest version, and whether its prompts belong to the publication's backbone.

    Raises: BankError when they belong to another one without `new_backbone`, or the version is damaged; StorageError.
    """
    numbers = version_numbers(access.store)
    if not numbers:
        return None, False
    version = read_version(access, numbers[-1])
    usable = _is_same_now(access, version.header.backbone, new.backbone)  # once: a statement may be taken back
    if not usable and not new.new_backbone:
        raise wrong_backbone_error(version.where, version.header.backbone, new.backbone)
    return version.manifest(), usable


def _manifest(parent: Manifest | None, usable: bool, new: Publication, digests: Mapping[str, str]) -> Manifest:
    """The manifest of the version after the parent: the publication's prompts, and the parent's others by reference."""
    before = parent.prompts if parent and usable else {}
    # A backbone stated to be the parent's goes by the parent's fingerprint, so that a bank keeps one fingerprint.
    stated = parent is not None and usable and parent.backbone.fingerprint != new.backbone.fingerprint
    backbone, tuned_on = (parent.backbone, new.backbone) if parent and stated else (new.backbone, None)
    number = parent.version + 1 if parent else 1
    # A failed record without a blob is not carried forward: there is nothing to refer to.
    records = {
        name: _by_reference(old, "carried_forward", None)
        for name, old in before.items()
        if old.digest and name not in new.removed
    }
    for carried in new.carried:
        old = _by_reference(carried.record, carried.status, carried.reason, carried.inputs_digest)
        records[old.name] = old
    for prompt in new.prompts:
        records[prompt.name] = _record(prompt, before.get(prompt.name), digests.get(prompt.name), number, tuned_on)
    try:
        return Manifest(
            version=number,
            parent=parent.version if parent else None,
            time=utc_now(),
            run=new.run,
            id=new_id(),
            backbone=backbone,
            libraries=new.libraries,
            removed=new.removed,
            prompts=records,
        )
    except ValidationError as error:
        raise BankError(f"version {number} is refused: {first_problem(error)}") from error


def _record(
    prompt: NewPrompt, old: PromptRecord | None, digest: str | None, number: int, tuned_on: BackboneId | None
) -> PromptRecord:
    if prompt.array is None and old is not None and old.digest is not None:
        return _by_reference(old, "kept", prompt.reason)
    if prompt.status == "kept":
        raise BankError(f"prompt '{prompt.name}' cannot be kept: the version before holds none of that name")
    fields = {key: value for key, value in vars(prompt).items() if key != "array"}
    blob = {
        "digest": digest,
        "shape": prompt.array.shape if prompt.array is not None else None,
        "dtype": "float32" if digest else None,
        "tuned_in": number if digest else None,
        "tuned_on": tuned_on if digest else None,
    }
    try:
        return PromptRecord.model_validate({**fields, **blob, "metrics_previous": old.metrics if old else None})
    except ValidationError as error:
        raise BankError(f"prompt '{prompt.name}' is refused: {first_problem(error)}") from error


def _by_reference(
    old: PromptRecord,
    status: Literal["carried_forward", "kept"],
    reason: str | None,
    inputs_digest: str | None = None,
) -> PromptRecord:
    changes = {"status": status, "reason": reason, "metrics_previous": old.metrics}
    changes |= {"inputs_digest": inputs_digest} if inputs_digest else {}
    return PromptRecord.model_validate({**dict(old), **changes})
