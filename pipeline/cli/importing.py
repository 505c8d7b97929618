"""`import`: publishes prompts that other people's tools have made."""

import string
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.bank import BackboneId, LabelScore, PromptBank, Template
from pipeline.bank.imports import import_npy, import_peft, imported_prompt
from pipeline.cli import completion, output
from pipeline.cli.models import Weights, identity_of
from pipeline.cli.options import (
    BankOption,
    JsonOption,
    SigningKeyOption,
    TrustedKeysOption,
    command_line,
    connect_bank,
    snapshot_at,
)
from pipeline.errors import BankError, SettingsError

_LIBRARIES = ("numpy", "safetensors")

Metric = Literal["accuracy", "exact_match", "f1", "rouge_l", "loss"]
Name = Annotated[str, typer.Argument(metavar="NAME", help="What the prompt will be called.")]
SourcePath = Annotated[Path, typer.Argument(metavar="SOURCE", help="A PEFT adapter's folder, or a file ….npy.")]
Form = Annotated[Literal["peft", "npy"], typer.Option("--from", help="What SOURCE is.")]
InputTemplate = Annotated[
    str, typer.Option("--input", metavar="TEMPLATE", help="How the model's input was written: 'Review: {text}'.")
]
TargetTemplate = Annotated[
    str, typer.Option("--target", metavar="TEMPLATE", help="How its answer was written: '{label}'.")
]
Labels = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="TEXT", help="One of the answers to choose from. May be repeated."),
]
ComparedBy = Annotated[
    LabelScore, typer.Option(help="What answers are compared by: the log-likelihood's sum, or its mean.")
]
LabelOffsets = Annotated[
    list[float] | None,
    typer.Option("--label-offset", metavar="NATS", help="What is taken off an answer's score; one for each --label."),
]
Separator = Annotated[
    str,
    typer.Option(
        metavar="TEXT", show_default="a space", help="What stood between input and answer (decoder-only models)."
    ),
]
MeasuredBy = Annotated[
    Metric | None, typer.Option(help="What it is measured by. [default: accuracy with labels, else exact_match]")
]
Task = Annotated[str | None, typer.Option(metavar="TASK", help="Its task. [default: NAME]")]
Half = Annotated[Literal["encoder"] | None, typer.Option(help="Of a PEFT adapter with two halves (T5), take this one.")]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL", help="The model it was made on: a folder, hub name, .gguf file or packaged name; read whole."
    ),
]
HeldAs = Annotated[
    Weights | None, typer.Option(help="How --model is held. [default: as the bank's own model, else int8]")
]
BackboneOf = Annotated[
    str | None,
    typer.Option(metavar="REV", autocompletion=completion.revisions, help="In place of --model: that of a version."),
]
Create = Annotated[bool, typer.Option("--create", help="Make the bank if there is none.")]
MovedAlias = Annotated[
    str,
    typer.Option(
        "--alias",
        metavar="ALIAS",
        envvar="PROMPT_BANK_ALIAS",
        autocompletion=completion.aliases,
        help="What is moved to the new version.",
    ),
]


def import_prompt(
    name: Name,
    source: SourcePath,
    form: Form,
    input_template: InputTemplate,
    target_template: TargetTemplate,
    labels: Labels = None,
    label_score: ComparedBy = "sum",
    label_offsets: LabelOffsets = None,
    separator: Separator = " ",
    metric: MeasuredBy = None,
    task: Task = None,
    half: Half = None,
    model: Model = None,
    weights: HeldAs = None,
    backbone_of: BackboneOf = None,
    create: Create = False,
    bank: BankOption = None,
    alias: MovedAlias = "latest",
    trusted_key: TrustedKeysOption = None,
    signing_key: SigningKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a prompt that another tool has made.

    It comes into a new version of the bank, beside the prompts that are there. Name the model that it was made on,
    for it works on no other: --model computes that model's identity, --backbone-of latest says that it is the bank's
    own.

    Examples:

    \b
    promptbank import sst2 adapters/sst2 --from peft --input '{text}' --target '{label}' \\
        --label negative --label positive --backbone-of latest
    promptbank import qa qa.npy --from npy --input 'Q: {q} A:' --target '{a}' --model ./my-model --bank new --create
    """
    if (model is None) == (backbone_of is None):
        raise SettingsError(
            "name the model that the prompt was made on: --model MODEL, or --backbone-of latest for the bank's own, "
            "and not both"
        )
    if weights and not model:
        raise SettingsError("--weights belongs to --model: leave it out")
    if half and form != "peft":
        raise SettingsError("--half belongs to --from peft: leave it out")
    _check_template("--input", input_template)
    _check_template("--target", target_template)
    if metric in ("accuracy", "f1") and not labels:
        raise SettingsError(f"--metric {metric} needs the answers to choose from: add --label for each")
    if label_offsets and len(label_offsets) != len(labels or ()):
        raise SettingsError(f"{len(label_offsets)} --label-offset for {len(labels or ())} --label: give one for each")
    array = import_npy(source) if form == "npy" else import_peft(source, half)
    new = imported_prompt(
        name,
        array,
        task=task or name,
        template=Template(input=input_template, target=target_template, separator=separator),
        labels=labels or None,
        metric=metric or ("accuracy" if labels else "exact_match"),
        source=f"{form} {source.name}",
        label_score=label_score,
        label_offsets=label_offsets or None,
    )
    opened = connect_bank(bank, alias, trusted_key, signing_key=signing_key, create=create)
    backbone = _backbone(opened, model, weights, backbone_of, create)
    libraries = {library: version_of(library) for library in _LIBRARIES}
    number = opened.publish([new], backbone, run="import", libraries=libraries, alias=alias)
    if as_json:
        fields = {"prompt": name, "shape": list(array.shape), "version": number, "alias": alias}
        output.write_json({"bank": opened.uri, **fields, "backbone": backbone.model_dump(mode="json")})
        return
    output.write_line(f"published '{name}' {list(array.shape)} in version {number}, for the alias '{alias}'")
    output.note(f"look at it: {command_line(opened, 'show', f'{name}@{number}')}")


def _backbone(
    bank: PromptBank, model: str | None, weights: Weights | None, backbone_of: str | None, create: bool
) -> BackboneId:
    numbers = bank.versions()
    if not numbers and not create:
        raise BankError(f"there is no prompt bank at {bank.uri}: fix the path, or add --create to make one")
    if backbone_of is not None:
        return snapshot_at(bank, backbone_of).backbone
    own = bank.at(str(numbers[-1])).backbone if numbers else None
    assert model is not None, "one of the two is named"
    with output.progress(f"reading the weights of {model}"):
        return identity_of(model, weights, own)


def _check_template(option: str, template: str) -> None:
    """Check that a template has plain `{column}` placeholders, at least one. Raises: SettingsError."""
    try:
        pieces = [piece for piece in string.Formatter().parse(template) if piece[1] is not None]
        plain = bool(pieces) and all(
            column and not set(column) & set(".[]{}") and not spec and not conversion
            for _, column, spec, conversion in pieces
        )
    except ValueError:
        plain = False
    if not plain:
        raise SettingsError(
            f"{option} {output.quoted(template)}: name at least one column, in braces such as {{text}}, "
            "and write {{ and }} for braces themselves"
        )
