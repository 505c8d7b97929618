"""`ls` and `show`: the prompts of a version."""

import json
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import typer

from pipeline.bank import Metrics, PromptBank, PromptRecord, Snapshot, Template
from pipeline.bank.manifest import NOT_LEARNED
from pipeline.cli import completion, output
from pipeline.cli.models import Words, mismatch_warning, nearest_words
from pipeline.cli.options import (
    AliasOption,
    BankOption,
    CacheOption,
    JsonOption,
    ReferenceArgument,
    TrustedKeysOption,
    aliases_of,
    bank_at,
    command_line,
    connect_bank,
    existing_versions,
)
from pipeline.cli.output import Cell, Column
from pipeline.reporting.words import counted

_COLOURS = {"tuned": "green", "kept": "yellow", NOT_LEARNED: "yellow", "failed": "red"}
_COLUMNS = (
    Column("name", free=True),
    Column("status"),
    Column("tuned in", right=True),
    Column("length", right=True),
    Column("metric"),
    Column("before", right=True),
    Column("after", right=True),
    Column("test", right=True, optional=True),
    Column("reason"),
    Column("constant", right=True, optional=True),  # last, so that scripts find the other columns in their old places
)
_ON_TERMINAL = (0, 1, 2, 3, 4, 5, 9, 6, 7)


def list_prompts(
    pattern: Annotated[
        str | None, typer.Argument(metavar="PATTERN", help="Only names like this one, such as 'sst*'.")
    ] = None,
    version: Annotated[
        str | None,
        typer.Option(
            metavar="REV", autocompletion=completion.revisions, help="A version or an alias, in place of --alias."
        ),
    ] = None,
    status: Annotated[
        Literal["tuned", "carried_forward", "kept", "failed", "not_learned"] | None,
        typer.Option(help="Only prompts with this status; not_learned whatever their status."),
    ] = None,
    aliases: Annotated[bool, typer.Option("--aliases", help="List the aliases and their versions instead.")] = False,
    bank: BankOption = None,
    alias: AliasOption = "latest",
    trusted_key: TrustedKeysOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the prompts of a version, or the aliases.

    Figures are those of the dev rows before and after tuning, and of the test rows.

    Examples:

    \b
    promptbank ls
    promptbank ls --version 12 --status failed
    promptbank ls 'sst*' --bank s3://models/prompts --json
    """
    if aliases:
        _list_aliases(connect_bank(bank, alias, trusted_key, cache), as_json)
        return
    opened, snapshot = bank_at(version, bank, alias, trusted_key, cache)
    records = [
        record
        for record in snapshot.records()
        if status in (None, record.status, *([NOT_LEARNED] if record.learned is False else []))
        and (pattern is None or fnmatchcase(record.name, pattern))
    ]
    if as_json:
        prompts = [record.model_dump(mode="json") for record in records]
        output.write_json({**_version_fields(opened, snapshot), "prompts": prompts})
        return
    rows = [_row(record) for record in records]
    if not output.on_terminal():
        output.write_table(_COLUMNS, rows)
        return
    # A terminal is too narrow for a column of sentences.
    output.write_table([_COLUMNS[i] for i in _ON_TERMINAL], [[row[i] for i in _ON_TERMINAL] for row in rows])
    output.note()
    for record in records:
        if record.reason:
            output.note(f"{record.name} {record.state}: {record.reason}")
    output.note(f"{counted(len(records), 'prompt')} of {_title(opened, snapshot)}")


def show_prompt(
    reference: ReferenceArgument,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Show the prompt in words of this model: a folder, hub name, .gguf file or packaged name.",
        ),
    ] = None,
    nearest: Annotated[int, typer.Option(metavar="COUNT", min=1, help="Words for each of its vectors.")] = 5,
    bank: BankOption = None,
    alias: AliasOption = "latest",
    trusted_key: TrustedKeysOption = None,
    cache: CacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show everything that is known about a prompt.

    With --model, also the tokens of the vocabulary that are nearest to each of its vectors, with their cosines.

    Examples:

    \b
    promptbank show sst2
    promptbank show sst2@prod --model smollm2-135m --nearest 3
    promptbank show sst2@12 --json
    """
    name, _, revision = reference.partition("@")
    opened, snapshot = bank_at(revision if "@" in reference else None, bank, alias, trusted_key, cache)
    record = snapshot.known_record(name)
    words: Words | None = None
    warning: str | None = None
    if model is not None:
        prompt = snapshot.load(name)
        with output.progress(f"reading {model}"):
            words = nearest_words(model, prompt.array, nearest)
            warning = mismatch_warning(model, prompt, lambda: opened.same_as(prompt.backbone))
    pointing = aliases_of(opened).get(snapshot.version, [])
    if as_json:
        output.write_json(
            {
                **_version_fields(opened, snapshot),
                "aliases": pointing,
                "prompt": record.model_dump(mode="json"),
                "backbone": snapshot.backbone.model_dump(mode="json"),
                "libraries": dict(snapshot.header.libraries),
                "nearest": words and [[{"token": token, "cosine": cosine} for token, cosine in row] for row in words],
                "warning": warning,
            }
        )
        return
    output.write_fields(_fields(opened, snapshot, record, pointing))
    if words is not None:
        output.write("\n")
        columns = [Column("vector", right=True), *(Column(f"nearest {i + 1}") for i in range(len(words[0])))]
        rows: list[list[Cell]] = [
            [i + 1, *(f"{token} {cosine:.2f}" for token, cosine in row)] for i, row in enumerate(words)
        ]
        output.write_table(columns, rows)
    if warning:
        output.write_error(f"warning: {warning}")


def _list_aliases(bank: PromptBank, as_json: bool) -> None:
    existing_versions(bank)
    found = bank.aliases()
    if as_json:
        rows = [{"alias": alias, "version": version} for alias, version in found.items()]
        output.write_json({"bank": bank.uri, "aliases": rows})
        return
    output.write_table((Column("alias"), Column("version", right=True)), list(found.items()))
    output.note(f"the moves of one: {command_line(bank, 'log', 'ALIAS')}")


def _row(record: PromptRecord) -> list[Cell]:
    metrics = record.metrics
    return [
        record.name,
        (record.state, _COLOURS.get(record.state, "")),
        record.tuned_in,
        record.length,
        record.metric,
        metrics.dev_before,
        metrics.dev_after,
        metrics.test,
        record.reason,
        metrics.dev_constant,
    ]


def _fields(bank: PromptBank, snapshot: Snapshot, record: PromptRecord, pointing: list[str]) -> list[tuple[str, Cell]]:
    backbone, libraries = snapshot.backbone, snapshot.header.libraries
    shape = record.shape
    return [
        ("prompt", record.name),
        ("in", _title(bank, snapshot)),
        ("aliases", ", ".join(pointing) or None),
        ("status", record.state),
        ("reason", record.reason),
        ("tuned in", record.tuned_in),
        ("shape", shape and f"{shape[0]} × {shape[1]} {record.dtype}, {shape[0] * shape[1] * 4:,} bytes"),
        ("digest", record.digest),
        ("task", record.task),
        *_input_fields(record.template),
        ("target", output.quoted(record.template.target)),
        ("labels", ", ".join(map(output.quoted, record.labels)) if record.labels else None),
        *_label_score_fields(record),
        ("metric", record.metric),
        *_metric_fields("", record.metrics),
        *(_metric_fields("parent's ", record.metrics_previous) if record.metrics_previous else []),
        ("initialisation", record.initialisation),
        ("length", record.length),
        ("steps", record.steps),
        ("seed", record.seed),
        ("corpus", record.corpus_digest),
        *_table_fields(record),
        ("settings", record.settings_digest),
        ("backbone", f"{backbone.model}, {backbone.architecture}, hidden size {backbone.hidden_size}"),
        *((part, getattr(backbone, part)) for part in ("fingerprint", "config", "tokenizer", "weights")),
        ("quantization", backbone.quantization),
        ("rows ran", record.rows_run),
        ("libraries", ", ".join(f"{name} {version}" for name, version in sorted(libraries.items())) or None),
    ]


def _input_fields(template: Template) -> list[tuple[str, Cell]]:
    form = template.chat
    if form is None:
        return [("input", output.quoted(template.input)), ("separator", output.quoted(template.separator))]
    options = ", ".join(f"{name} {json.dumps(value)}" for name, value in form.options.items())
    return [
        ("messages", template.input),
        ("chat template", form.template),
        ("chat options", options or None),
        ("before an answer", output.quoted(form.lead) if form.lead else None),
        ("end of an answer", output.quoted(form.end)),
    ]


def _table_fields(record: PromptRecord) -> list[tuple[str, Cell]]:
    return [
        (f"{split} from", ", ".join(state.written + (f" of {state.time}" if state.time else "") for state in states))
        for split, states in (record.tables or {}).items()
    ]


def _label_score_fields(record: PromptRecord) -> list[tuple[str, Cell]]:
    offsets = zip(record.labels or (), record.label_offsets or (), strict=False)
    return [
        ("label scores", "mean of a label's tokens" if record.label_score == "mean" else None),
        ("label offsets", ", ".join(f"{output.quoted(label)} {nats:.3f}" for label, nats in offsets) or None),
    ]


def _metric_fields(whose: str, metrics: Metrics) -> list[tuple[str, Cell]]:
    return [
        (f"{whose}dev", _from_to(metrics.dev_before, metrics.dev_after)),
        (f"{whose}dev loss", _from_to(metrics.dev_loss_before, metrics.dev_loss_after)),
        (f"{whose}dev, row not read", metrics.dev_constant),
        (f"{whose}test", metrics.test),
        (f"{whose}test, row not read", metrics.test_constant),
    ]


def _from_to(before: float | None, after: float | None) -> str | None:
    if before is None and after is None:
        return None
    return " → ".join("-" if value is None else f"{value:.3f}" for value in (before, after))


def _title(bank: PromptBank, snapshot: Snapshot) -> str:
    header = snapshot.header
    return f"version {header.version} of {bank.uri}, {header.time}, run {header.run}"


def _version_fields(bank: PromptBank, snapshot: Snapshot) -> dict[str, Any]:
    header = snapshot.header
    return {"bank": bank.uri, "version": header.version, "time": header.time, "run": header.run}
