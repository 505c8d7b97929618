"""`export`: prompts for other people's tools."""

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.backbone.packaged import PACKAGED
from pipeline.bank import Prompt
from pipeline.bank.exports import export_llama_cpp, export_npy, export_peft, export_sglang, export_vllm
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

ExportFormat = Literal["peft", "npy", "vllm", "llama-cpp", "sglang"]


def export_prompt(
    reference: ReferenceArgument,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder; for npy, a new file ….npy.")],
    to: Annotated[ExportFormat, typer.Option("--to", help="For which tool.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model as that tool loads it, if it is not by the bank's name for it."),
    ] = None,
    block_size: Annotated[
        int, typer.Option("--block-size", metavar="TOKENS", min=1, help="For vllm: its block, to warn by.")
    ] = 32,
    bank: BankOption = None,
    alias: AliasOption = "latest",
    trusted_key: TrustedKeysOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a prompt as another tool takes it.

    PEFT, NumPy, vLLM, llama.cpp or SGLang. A prompt.json beside it holds the template, the labels and the backbone.
    Nothing is overwritten.

    Examples:

    \b
    promptbank export sst2 adapters/sst2 --to peft --model HuggingFaceTB/SmolLM2-135M-Instruct
    promptbank export sst2@prod sst2.npy --to npy
    promptbank export sst2@12 vllm/sst2 --to vllm --model ./smollm2
    promptbank export sst2 llama/sst2 --to llama-cpp --model smollm2.gguf
    """
    if model is not None and to == "npy":
        raise SettingsError("--model does not belong to --to npy: leave it out")
    name, mark, revision = reference.partition("@")
    _, snapshot = bank_at(revision if mark else None, bank, alias, trusted_key, cache)
    prompt = snapshot.load(name)
    match to:
        case "peft":
            place = export_peft(prompt, destination, model or prompt.backbone.model)
            read_it = f"peft.PeftModel.from_pretrained(model, {str(place)!r})"
        case "npy":
            place = export_npy(prompt, destination)
            read_it = f"numpy.load({str(place)!r})"
        case "vllm":
            at = model or _name_of_folder(prompt)
            place = export_vllm(prompt, destination, at)
            read_it = _command(place / "ask_vllm.py", at)
            _warn_of_blocks(prompt, block_size)
        case "llama-cpp":
            at = model or _name_of_gguf(prompt)
            place = export_llama_cpp(prompt, destination, at)
            read_it = _command(place / "ask_llama_cpp.py", at)
        case "sglang":
            at = model or _name_of_folder(prompt)
            place = export_sglang(prompt, destination, at)
            read_it = _command(place / "ask_sglang.py", at)
    if as_json:
        output.write_json({"prompt": name, "version": snapshot.version, "format": to, "path": str(place)})
        return
    output.write_line(f"wrote '{name}' of version {snapshot.version} to {place}")
    output.note(f"read it: {read_it}")


def _name_of_folder(prompt: Prompt) -> str | None:
    """The bank's name for the model, where it can be a folder or a hub name; the script asks for it otherwise."""
    name = prompt.backbone.model
    return None if name in PACKAGED or name.endswith(".gguf") else name


def _name_of_gguf(prompt: Prompt) -> str | None:
    return prompt.backbone.model if prompt.backbone.model.endswith(".gguf") else None


def _command(script: Path, model: str | None) -> str:
    return shlex.join(["python", str(script), *([] if model else ["--model", "MODEL"]), "COLUMN=TEXT"])


def _warn_of_blocks(prompt: Prompt, block_size: int) -> None:
    length = len(prompt.array)
    if left := length % block_size:
        output.write_error(
            f"warning: vLLM shares whole blocks of a prompt between rows: with --block-size {block_size}, "
            f"{length - left} of {length} vectors; a prompt.length that is a multiple of {block_size} is shared whole"
        )
