"""`export`: prompts for other people's tools."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.bank import Prompt
from pipeline.bank.exports import export_npy, export_peft, export_vllm
from pipeline.cli import output
from pipeline.cli.options import (
    AliasOption,
    BankOption,
    CacheOption,
    JsonOption,
    ReferenceArgument,
    TrustedKeysOption,
    bank_at,
)
from pipeline.errors import SettingsError

ExportFormat = Literal["peft", "npy", "vllm"]


def export_prompt(
    reference: ReferenceArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder; for npy, a new file ….npy.")],
    to: Annotated[ExportFormat, typer.Option("--to", help="For which tool.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="For peft: the base model, if PEFT knows it by another name than the bank."),
    ] = None,
    bank: BankOption = None,
    alias: AliasOption = "latest",
    trusted_key: TrustedKeysOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a prompt as PEFT, NumPy or vLLM read it.

    A prompt.json beside it tells the template, the labels and the backbone. Nothing is overwritten.

    Examples:

    \b
    promptbank export sst2 adapters/sst2 --to peft --model HuggingFaceTB/SmolLM2-135M-Instruct
    promptbank export sst2@prod sst2.npy --to npy
    promptbank export sst2@12 vllm/sst2 --to vllm
    """
    if model is not None and to != "peft":
        raise SettingsError("--model belongs to --to peft alone: leave it out")
    name, at, revision = reference.partition("@")
    _, snapshot = bank_at(revision if at else None, bank, alias, trusted_key, cache)
    prompt = snapshot.load(name)
    place = _exported(prompt, destination, to, model)
    if as_json:
        output.write_json({"prompt": name, "version": snapshot.version, "format": to, "path": str(place)})
        return
    output.write_line(f"wrote '{name}' of version {snapshot.version} to {place}")
    output.note(f"read it: {_how_to_read(place, to)}")


def _exported(prompt: Prompt, destination: Path, to: ExportFormat, model: str | None) -> Path:
    match to:
        case "peft":
            return export_peft(prompt, destination, model or prompt.backbone.model)
        case "npy":
            return export_npy(prompt, destination)
        case "vllm":
            return export_vllm(prompt, destination)


def _how_to_read(place: Path, to: ExportFormat) -> str:
    match to:
        case "peft":
            return f"peft.PeftModel.from_pretrained(model, {str(place)!r})"
        case "npy":
            return f"numpy.load({str(place)!r})"
        case "vllm":
            return shlex.join(["python", str(place / "ask_vllm.py"), "COLUMN=TEXT"])
