"""`log` and `diff`: what changed from version to version."""

from collections import Counter
from typing import Annotated, Any

import typer

from pipeline.bank import PromptBank
from pipeline.bank.manifest import Status
from pipeline.cli import completion, output
from pipeline.cli.options import (
    BankOption,
    CacheOption,
    JsonOption,
    TrustedKeysOption,
    aliases_of,
    connect_bank,
    existing_versions,
    known_alias,
    snapshot_at,
)
from pipeline.cli.output import Cell, Column
from pipeline.cli.version_diff import FieldChange, VersionDiff, diff_versions
from pipeline.errors import BankError

_STATUSES: tuple[Status, ...] = ("tuned", "carried_forward", "kept", "failed")
_VERSION_COLUMNS = (
    Column("version", right=True),
    Column("parent", right=True),
    Column("time"),
    Column("run", free=True),
    Column("tuned", right=True),
    Column("carried", right=True),
    Column("kept", right=True),
    Column("failed", right=True),
    Column("aliases", free=True, optional=True),
    Column("signed by", optional=True),
    Column("problem", free=True, optional=True),
)
_MOVE_COLUMNS = (
    Column("move", right=True),
    Column("version", right=True),
    Column("action"),
    Column("by", free=True),
    Column("time"),
)
_DIFF_COLOURS = {"added": "green", "removed": "red", "changed": "yellow"}
_TOLD_OF_WHOLE_PROMPTS = (
    "status",
    "reason",
    "learned",
    "digest",
    "metrics.dev_constant",
    "metrics.dev_after",
    "metrics.test",
)
_DIGESTS = (
    "digest",
    "corpus_digest",
    "settings_digest",
    "inputs_digest",
    "fingerprint",
    "config",
    "tokenizer",
    "weights",
)
_DIGEST_SHOWN = 12


def show_log(
    alias: Annotated[
        str | None,
        typer.Argument(metavar="ALIAS", autocompletion=completion.aliases, help="Show the moves of this alias."),
    ] = None,
    last: Annotated[int, typer.Option("--last", "-n", metavar="COUNT", min=1, help="How many, newest first.")] = 20,
    bank: BankOption = None,
    trusted_key: TrustedKeysOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the versions, newest first, or the moves of an alias.

    For every version: how many of its prompts were tuned, carried forward from its parent, kept because the new one
    was worse, or failed. The line of a damaged or untrusted version says what is wrong; the exit code is then 1.

    Examples:

    \b
    promptbank log
    promptbank log prod --last 5
    promptbank log --trusted-key bank.pub --json
    """
    opened = connect_bank(bank, "latest", trusted_key, cache)
    if alias is not None:
        _show_moves(opened, alias, last, as_json)
        return
    numbers = existing_versions(opened)[::-1]
    pointing = aliases_of(opened)
    versions = [_version(opened, number, pointing.get(number, [])) for number in numbers[:last]]
    older = max(0, len(numbers) - last)
    if as_json:
        output.write_json({"bank": opened.uri, "versions": versions, "older": older})
    else:
        output.write_table(_VERSION_COLUMNS, [_version_row(version) for version in versions])
        output.note(f"{older:,} older versions: --last {len(numbers)} shows all" if older else "")
    if any(version["problem"] for version in versions):
        raise typer.Exit(1)


def show_differences(
    before: Annotated[
        str, typer.Argument(metavar="V1", autocompletion=completion.revisions, help="A version or an alias.")
    ],
    after: Annotated[
        str, typer.Argument(metavar="V2", autocompletion=completion.revisions, help="A version or an alias.")
    ],
    bank: BankOption = None,
    trusted_key: TrustedKeysOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what differs between two versions.

    Which prompts V2 adds to V1, removes or changes, and in what; and what differs in the backbone and the
    libraries. A prompt that was only carried forward has not changed.

    Examples:

    \b
    promptbank diff 11 12
    promptbank diff prod latest --json
    """
    opened = connect_bank(bank, "latest", trusted_key, cache)
    old, new = snapshot_at(opened, before), snapshot_at(opened, after)
    found = diff_versions(old, new)
    if as_json:
        output.write_json(
            {
                "bank": opened.uri,
                "from": old.version,
                "to": new.version,
                "header": [_change_document(change) for change in found.header],
                "prompts": [
                    {"name": prompt.name, "change": prompt.kind, "fields": list(map(_change_document, prompt.fields))}
                    for prompt in found.prompts
                ],
                "unchanged": found.unchanged,
            }
        )
        return
    sides = [Column(f"version {snapshot.version}", free=True) for snapshot in (old, new)]
    if rows := _diff_rows(found):
        output.write_table([Column("prompt", free=True), Column("change"), Column("what"), *sides], rows)
        output.note()
    counts = {kind: sum(prompt.kind == kind for prompt in found.prompts) for kind in _DIFF_COLOURS}
    output.note(", ".join(f"{n:,} {kind}" for kind, n in {**counts, "unchanged": found.unchanged}.items()))


def _show_moves(bank: PromptBank, alias: str, last: int, as_json: bool) -> None:
    known_alias(bank, alias)
    moves = bank.alias_history(alias)[::-1]
    if as_json:
        fields = {"seq", "version", "manifest", "action", "by", "time"}
        documents = [move.model_dump(mode="json", include=fields) for move in moves[:last]]
        output.write_json({"bank": bank.uri, "alias": alias, "moves": documents, "older": max(0, len(moves) - last)})
        return
    rows: list[list[Cell]] = [
        [move.seq, move.version, move.action, move.by, output.moment(move.time)] for move in moves[:last]
    ]
    output.write_table(_MOVE_COLUMNS, rows)


def _version(bank: PromptBank, number: int, aliases: list[str]) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "version": number,
        **dict.fromkeys(("parent", "time", "run", *_STATUSES)),
        "aliases": aliases,
        "signed_by": None,
        "problem": None,
    }
    try:
        snapshot = bank.at(str(number))
        header = snapshot.header
        counts = Counter(record.status for record in snapshot.records())
        told = {"parent": header.parent, "time": header.time, "run": header.run, "signed_by": snapshot.signer}
        return {**fields, **told, **{status: counts[status] for status in _STATUSES}}
    except BankError as error:
        return {**fields, "problem": str(error)}


def _version_row(version: dict[str, Any]) -> list[Cell]:
    signer = version["signed_by"]
    return [
        *(version[field] for field in ("version", "parent")),
        version["time"] and output.moment(version["time"]),
        *(version[field] for field in ("run", *_STATUSES)),
        ", ".join(version["aliases"]) or None,
        signer and signer[:_DIGEST_SHOWN],
        version["problem"] and (version["problem"], "red"),
    ]


def _diff_rows(found: VersionDiff) -> list[list[Cell]]:
    rows: list[list[Cell]] = [[None, "changed", *_change_cells(change)] for change in found.header]
    for prompt in found.prompts:
        whole = prompt.kind != "changed"
        for change in prompt.fields:
            if not whole or change.field in _TOLD_OF_WHOLE_PROMPTS or change.field.startswith("tables."):
                rows.append([prompt.name, (prompt.kind, _DIFF_COLOURS[prompt.kind]), *_change_cells(change)])
    return rows


def _change_cells(change: FieldChange) -> list[Cell]:
    return [change.field, _shown(change.field, change.before), _shown(change.field, change.after)]


def _shown(field: str, value: Any) -> Cell:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, str) and field.startswith("template."):
        return output.quoted(value)
    if isinstance(value, str) and field.removeprefix("backbone.") in _DIGESTS:
        return value[:_DIGEST_SHOWN]
    return value


def _change_document(change: FieldChange) -> dict[str, Any]:
    return {"field": change.field, "from": change.before, "to": change.after}
