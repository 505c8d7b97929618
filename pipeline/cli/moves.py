"""`promote` and `rollback`: moves of an alias."""

import getpass
import os
from typing import Annotated

import typer

from pipeline.bank import AliasMove, PromptBank
from pipeline.cli import completion, output
from pipeline.cli.options import (
    BankOption,
    CacheOption,
    JsonOption,
    TrustedKeysOption,
    command_line,
    connect_bank,
    known_alias,
    snapshot_at,
)

By = Annotated[
    str | None, typer.Option("--by", metavar="NAME", help="Who moves it, for its history. [default: your login name]")
]
AliasToMove = Annotated[str, typer.Argument(metavar="ALIAS", autocompletion=completion.aliases, help="What is moved.")]


def promote(
    version: Annotated[
        str,
        typer.Argument(
            metavar="VERSION", autocompletion=completion.revisions, help="A version, or an alias that is at it."
        ),
    ],
    alias: AliasToMove,
    by: By = None,
    bank: BankOption = None,
    trusted_key: TrustedKeysOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move an alias to a version, forward or back.

    Services that follow the alias load that version's prompts from then on. An alias that is not there is made.

    Examples:

    \b
    promptbank promote 12 prod
    promptbank promote latest prod --by 'release 7'
    """
    opened = connect_bank(bank, alias, trusted_key, cache)
    target = snapshot_at(opened, version)
    before = opened.alias_move(alias)
    # A move to where it stands would make the next rollback go nowhere.
    stays = before is not None and before.manifest == target.digest
    move = before if before is not None and stays else opened.promote(target.version, alias, by or login_name())
    _tell(opened, before, move, not stays, as_json)


def rollback(
    alias: AliasToMove,
    by: By = None,
    bank: BankOption = None,
    trusted_key: TrustedKeysOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Undo the last move of an alias.

    A second time, the move before it. Nothing is lost: a rollback is one more move.

    Examples:

    \b
    promptbank rollback prod
    promptbank rollback prod --by 'on-call' --json
    """
    opened = connect_bank(bank, alias, trusted_key, cache)
    before = known_alias(opened, alias)
    _tell(opened, before, opened.rollback(alias, by or login_name()), True, as_json)


def _tell(bank: PromptBank, before: AliasMove | None, move: AliasMove, moved: bool, as_json: bool) -> None:
    if as_json:
        told = move.model_dump(mode="json", include={"alias", "seq", "action", "by", "time"})
        places = {"from": before and before.version, "to": move.version, "moved": moved}
        output.write_json({"bank": bank.uri, **told, **places})
    elif not moved:
        output.write_line(f"{move.alias}: at version {move.version} already, by {move.by}; nothing was moved")
    else:
        place = f"version {before.version} → {move.version}" if before else f"new alias → version {move.version}"
        output.write_line(f"{move.alias}: {place} ({move.action}, move {move.seq}, by {move.by})")
        if before:
            output.note(f"undo: {command_line(bank, 'rollback', move.alias)}")


def login_name() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return f"user {os.getuid()}"
