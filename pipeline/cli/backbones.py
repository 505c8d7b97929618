"""`same-backbone`: statements that two models are one backbone."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.bank import PromptBank, SameBackbone
from pipeline.cli import output
from pipeline.cli.models import Weights, compare_on_rows
from pipeline.cli.moves import login_name
from pipeline.cli.options import (
    BankOption,
    JsonOption,
    SigningKeyOption,
    TrustedKeysOption,
    connect_bank,
    existing_versions,
)
from pipeline.cli.output import Cell, Column
from pipeline.errors import BankError, SettingsError
from pipeline.reporting.words import counted

_COLUMNS = (
    Column("statement", right=True),
    Column("same"),
    Column("first", free=True),
    Column("second", free=True),
    Column("rows", right=True),
    Column("difference", right=True),
    Column("by", free=True),
    Column("time"),
)
_MODEL = "A folder, hub name, .gguf file or packaged name; read whole."


def same_backbone(
    first: Annotated[str | None, typer.Argument(metavar="MODEL", help=_MODEL)] = None,
    second: Annotated[str | None, typer.Argument(metavar="MODEL", help=_MODEL)] = None,
    weights: Annotated[
        Weights | None, typer.Option(help="How both are held. [default: as the bank's own model]")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Compare on the lines of this file, not on eight built-in rows.")
    ] = None,
    take_back: Annotated[
        int | None, typer.Option("--take-back", metavar="STATEMENT", min=1, help="Take a statement back.")
    ] = None,
    by: Annotated[
        str | None, typer.Option("--by", metavar="NAME", help="Who says so. [default: your login name]")
    ] = None,
    bank: BankOption = None,
    trusted_key: TrustedKeysOption = None,
    signing_key: SigningKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """State that two models are one backbone.

    A model's safetensors folder and the GGUF file made from it have two fingerprints, and prompts of one are refused
    on the other. Here both are run over rows of text; only if all tokens are the same and all log-likelihoods equal,
    a statement is added to the bank, signed with --signing-key, and prompts of either are loaded on both from then
    on. Without models, the statements that there are are listed.

    Examples:

    \b
    promptbank same-backbone ./my-model ./my-model.gguf --signing-key bank.key
    promptbank same-backbone
    promptbank same-backbone --take-back 1
    """
    if (first is None) != (second is None):
        raise SettingsError("name two models, or none to list what is stated")
    if first is not None and take_back is not None:
        raise SettingsError("--take-back names a statement, not models: leave the models out")
    opened = connect_bank(bank, "latest", trusted_key, signing_key=signing_key)
    if take_back is not None:
        statement = opened.take_back_same_backbone(take_back, by or login_name())
    elif first is not None and second is not None:
        statement = _state(opened, first, second, weights, text, by)
    else:
        _list(opened, as_json)
        return
    if as_json:
        output.write_json({"bank": opened.uri, **_document(statement)})
        return
    others = not statement.same and any(
        each.fingerprint == statement.second.fingerprint for each in opened.same_as(statement.first)
    )
    taken_back = "are the same by other statements still" if others else "are not the same after all"
    verdict = "are the same" if statement.same else taken_back
    evidence = f": {counted(statement.rows, 'row')}, {statement.largest_difference:.2g} nats apart at most"
    output.write_line(
        f"statement {statement.seq}: {statement.first.model} and {statement.second.model} {verdict}"
        f"{evidence if statement.same else ''} (by {statement.by})"
    )


def _state(
    bank: PromptBank, first: str, second: str, weights: Weights | None, text: Path | None, by: str | None
) -> SameBackbone:
    like = bank.at(str(existing_versions(bank)[-1])).backbone
    with output.progress(f"comparing {first} and {second}"):
        found = compare_on_rows(first, second, weights, like, None if text is None else _lines(text))
    return bank.state_same_backbone(
        found.first,
        found.second,
        rows=found.rows,
        largest_difference=found.largest_difference,
        by=by or login_name(),
    )


def _lines(text: Path) -> list[str]:
    try:
        return [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BankError(f"cannot read the rows of {text} ({error}); give a text file in UTF-8") from error


def _list(bank: PromptBank, as_json: bool) -> None:
    statements = bank.same_backbones()
    if as_json:
        output.write_json({"bank": bank.uri, "statements": [_document(statement) for statement in statements]})
        return
    rows: list[list[Cell]] = [
        [
            statement.seq,
            "yes" if statement.same else "taken back",
            f"{statement.first.model} {statement.first.fingerprint[:12]}",
            f"{statement.second.model} {statement.second.fingerprint[:12]}",
            statement.rows,
            f"{statement.largest_difference:.2g}",
            statement.by,
            output.moment(statement.time),
        ]
        for statement in statements
    ]
    output.write_table(_COLUMNS, rows)


def _document(statement: SameBackbone) -> dict[str, Any]:
    return statement.model_dump(mode="json", exclude={"format", "kind", "id"})
