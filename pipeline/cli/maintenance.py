"""`verify` and `gc`: whether a bank is whole, and what it does not need."""

import re
from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.bank.verify import Verification
from pipeline.cli import output
from pipeline.cli.options import BankOption, JsonOption, TrustedKeysOption, connect_bank, existing_versions
from pipeline.errors import BankError, SettingsError
from pipeline.reporting.words import counted

_DURATION = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


def verify(bank: BankOption = None, trusted_key: TrustedKeysOption = None, as_json: JsonOption = False) -> None:
    """Read the whole bank and tell what is wrong with it.

    One problem a line, and exit code 1 if there is any. Every version, every move of an alias and every blob is
    checked against its digest, and, with --trusted-key, every version's signature. Nothing is repaired.

    Examples:

    \b
    promptbank verify
    promptbank verify --trusted-key bank.pub --json
    """
    opened = connect_bank(bank, "latest", trusted_key)
    with output.progress("verifying") as step:
        found = opened.verify(step)
    if not found.versions and not found.aliases:
        raise BankError(f"there is no prompt bank at {opened.uri}: publish to it first, or mend the path")
    if as_json:
        output.write_json({"bank": opened.uri, **asdict(found), "signatures_checked": bool(trusted_key)})
    else:
        for problem in found.problems:
            output.write_line(problem)
        output.write_line(_summary(found, bool(trusted_key)))
    if found.problems:
        raise typer.Exit(1)


def collect_garbage(
    grace: Annotated[
        str, typer.Option(metavar="TIME", help="Spare what is younger: a number and s, m, h, d or w; 1h at least.")
    ] = "7d",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be deleted.")] = False,
    bank: BankOption = None,
    trusted_key: TrustedKeysOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete what killed publishers have left.

    Blobs that no version refers to, and temporary files. Versions, and all that any of them refers to, stay.

    Examples:

    \b
    promptbank gc --dry-run
    promptbank gc --grace 36h
    """
    seconds = _seconds(grace)
    opened = connect_bank(bank, "latest", trusted_key)
    existing_versions(opened)  # a wrong path, where other programs' files may lie
    found = opened.collect(seconds, dry_run)
    if as_json:
        places = {"keys": list(found.keys), "bytes": found.bytes}
        output.write_json({"bank": opened.uri, "dry_run": dry_run, "grace_seconds": seconds, **places})
        return
    for key in found.keys:
        output.write_line(key)
    gone = "would be deleted" if dry_run else "deleted"
    output.write_line(f"{counted(len(found.keys), 'file')}, {counted(found.bytes, 'byte')} {gone}")


def _summary(found: Verification, signed: bool) -> str:
    statements = f"{counted(found.statements, 'statement')} on backbones, " if found.statements else ""
    checked = (
        f"{counted(found.versions, 'version')}, {statements}{counted(found.aliases, 'alias', 'aliases')} and "
        f"{counted(found.blobs, 'blob')} were checked, {'signatures too' if signed else 'signatures were not'}"
    )
    spare = len(found.unreferenced)
    unused = f"; {counted(spare, 'blob')} of no version: promptbank gc deletes them in time" if spare else ""
    return f"{counted(len(found.problems), 'problem') if found.problems else 'no problems'}: {checked}{unused}"


def _seconds(text: str) -> float:
    match = _DURATION.fullmatch(text)
    if match is None:
        raise SettingsError(f"--grace {text}: write a number and a unit, such as 36h or 7d")
    return float(match[1]) * _SECONDS[match[2]]
