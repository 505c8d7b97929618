"""The options that commands share, and the bank that they name."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from pipeline.bank import AliasMove, PromptBank, Snapshot
from pipeline.cli import completion
from pipeline.cli.output import write_error
from pipeline.errors import BankError

BANK_VARIABLE = "PROMPT_BANK_URI"

BankOption = Annotated[
    str | None,
    typer.Option(
        "--bank", metavar="URI", envvar=BANK_VARIABLE, help="The bank: a folder, or a URI such as s3://bucket/prompts."
    ),
]
AliasOption = Annotated[
    str,
    typer.Option(
        "--alias",
        metavar="ALIAS",
        envvar="PROMPT_BANK_ALIAS",
        autocompletion=completion.aliases,
        help="The version meant when none is named.",
    ),
]
TrustedKeysOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--trusted-key",
        metavar="FILE",
        envvar="PROMPT_BANK_TRUSTED_KEYS",
        help="A public key (PEM); versions that none of these signed are refused. May be repeated.",
    ),
]
SigningKeyOption = Annotated[
    Path | None,
    typer.Option(
        "--signing-key",
        metavar="FILE",
        envvar="PROMPT_BANK_SIGNING_KEY",
        help="The private key (PEM) that signs the new version.",
    ),
]
CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        metavar="FOLDER",
        help="Keep what is read in this folder (for an object store that is done anyway, in ~/.cache/promptbank).",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else.")]
ReferenceArgument = Annotated[
    str,
    typer.Argument(
        metavar="NAME[@REV]", autocompletion=completion.references, help="A prompt; REV is a version or an alias."
    ),
]


def connect_bank(
    uri: str | None,
    alias: str,
    keys: Sequence[Path] | None,
    cache: Path | None = None,
    signing_key: Path | None = None,
    create: bool = False,
) -> PromptBank:
    """The bank, whatever state its alias is in. Raises: BankError when it is not named or not there, StorageError."""
    return PromptBank.connect(
        _named(uri), alias, create=create, cache=cache, trusted_keys=keys or (), signing_key=signing_key
    )


def existing_versions(bank: PromptBank) -> tuple[int, ...]:
    """All versions, ascending. Raises: BankError when there is none, StorageError."""
    numbers = bank.versions()
    if not numbers:
        raise BankError(f"there is no prompt bank at {bank.uri}: publish to it first, or mend the path")
    return numbers


def bank_at(
    revision: str | None, uri: str | None, alias: str, keys: Sequence[Path] | None, cache: Path | None
) -> tuple[PromptBank, Snapshot]:
    """The bank and a version of it: the revision's, or without one the alias'. Raises: BankError, StorageError."""
    if revision is not None:
        bank = connect_bank(uri, alias, keys, cache)
        return bank, snapshot_at(bank, revision)
    bank = PromptBank.open(_named(uri), alias, cache=cache, trusted_keys=keys or ())
    assert bank.current is not None, "a bank that is not created is opened at a version"
    return bank, bank.current


def snapshot_at(bank: PromptBank, revision: str) -> Snapshot:
    """A version by number or alias. Raises: BankError that tells which there are, StorageError."""
    if revision.isdecimal() and revision not in map(str, numbers := existing_versions(bank)):
        raise BankError(f"the bank {bank.uri} has no version {revision}; the newest is {numbers[-1]}")
    return bank.at(revision)


def aliases_of(bank: PromptBank) -> dict[int, list[str]]:
    """Version -> the aliases that point to it now; with a damaged one, a warning and none. Raises: StorageError."""
    found: dict[int, list[str]] = {}
    try:
        for alias, version in bank.aliases().items():
            found.setdefault(version, []).append(alias)
    except BankError as error:
        write_error(f"warning: the aliases are not shown: {error}")
    return found


def known_alias(bank: PromptBank, alias: str) -> AliasMove:
    """The move of an alias that is in force. Raises: BankError when it was never set, StorageError."""
    move = bank.alias_move(alias)
    if move is None:
        existing_versions(bank)
        known = ", ".join(bank.aliases()) or "none"
        raise BankError(f"the bank {bank.uri} has no alias '{alias}'; known: {known}")
    return move


def command_line(bank: PromptBank, *words: str) -> str:
    """What to type next on the same bank."""
    place = [] if os.environ.get(BANK_VARIABLE) == bank.uri else ["--bank", bank.uri]
    return shlex.join(["promptbank", *words, *place])


def _named(uri: str | None) -> str:
    if not uri:
        raise BankError(f"no bank is named: add --bank FOLDER (or --bank s3://bucket/prompts), or set {BANK_VARIABLE}")
    return uri
