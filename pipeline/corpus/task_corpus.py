"""A task's corpus: first what can be checked without tokenising, then its splits, counts and label set."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, compress, islice
from pathlib import Path
from typing import Any

from pipeline.corpus.chat import ChatInput, ModelChat, bind_chat, parse_chat
from pipeline.corpus.encoding import (
    Architecture,
    TokenizerSpec,
    can_lose_text,
    encode_plain,
    encode_targets,
    encodes_beginnings_differently,
    load_tokenizer,
    missing_embedding,
    unencodable,
)
from pipeline.corpus.reader import SplitRef, changed_targets, summarise_split, unencodable_targets, unique_targets
from pipeline.corpus.rows import Recipe
from pipeline.corpus.source_files import ParquetSource, TableVersion
from pipeline.corpus.sources import open_split_source
from pipeline.corpus.tables.libraries import Lake
from pipeline.corpus.tally import SplitSummary
from pipeline.corpus.template import TextTemplate, check_class_names, check_columns, parse_template, render_row
from pipeline.corpus.values import find_integer_columns
from pipeline.errors import CorpusError, PromptBankError
from pipeline.settings import Split, TaskSettings

SPLITS = ("train", "dev", "test")
UNLABELLED = "unlabelled"
"""The split of rows without targets, where a task's teacher has some."""
_MOST_LABELS = 64


@dataclass(frozen=True)
class TaskPlan:
    """What is known of a task's corpus before anything is tokenised."""

    task: str
    sources: Mapping[str, ParquetSource]
    """By setting: `train`, and `dev`, `test` and `unlabelled` where they are given."""
    input: TextTemplate | ChatInput
    target: TextTemplate
    dev_fraction: float | None
    integer_columns: Mapping[str, str] = field(default_factory=dict)
    """Columns whose floats are written as integers: see `find_integer_columns`."""

    @property
    def rows(self) -> dict[str, int]:
        """Rows per split, unusable ones included. With `dev_fraction`, dev and train are estimates."""
        rows = {split: source.rows for split, source in self.sources.items()}
        if self.dev_fraction is not None:
            dev = round(rows["train"] * self.dev_fraction)
            rows |= {"train": rows["train"] - dev, "dev": dev}
        return {split: rows[split] for split in (*SPLITS, UNLABELLED) if split in rows}

    @property
    def left_out(self) -> list[str]:
        """A sentence for each setting whose folders hold data files that are not read."""
        return [
            f"{source.where}: {len(source.left_out)} other data files are not read, such as {source.left_out[0]}"
            for source in self.sources.values()
            if source.left_out
        ]

    @property
    def remarks(self) -> list[str]:
        """Sentences for the plan: versions of tables, types that were inferred, counts that are not exact."""
        return [
            f"{source.where}: {remark}"
            for source in self.sources.values()
            for remark in (
                *(f"{table.address} at version {table.version}{_since(table)}" for table in source.tables),
                *source.remarks,
                *([] if source.exact else [_inexact(source)]),
            )
        ]


@dataclass(frozen=True)
class TaskCorpus:
    """A task's splits ready to read; plain data, so that it travels to workers."""

    task: str
    splits: Mapping[str, SplitRef]
    """`train`, `dev` and, if the task has them, `test` and `unlabelled`, whose rows have no targets."""
    labels: tuple[str, ...] | None
    label_ids: tuple[tuple[int, ...], ...] | None
    """[labels][T] target tokens of each label, eos included."""
    counts: Mapping[str, Mapping[str, int]]
    """Rows per split by status: ok, null, empty, input_long, target_long."""
    digest: str
    """Digest of all splits' rows: the same rows in other files give the same digest."""
    chat: Mapping[str, Any] | None = None
    """What the prompt's record tells of a chat (`ChatForm`)."""
    tables: Mapping[str, tuple[TableVersion, ...]] = field(default_factory=dict)
    """By split, the versions of the tables that its rows were read from."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` gives the same corpus back."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    @staticmethod
    def from_dict(plain: Mapping[str, Any]) -> "TaskCorpus":
        label_ids = plain["label_ids"]
        return TaskCorpus(
            task=plain["task"],
            splits={split: SplitRef(**ref) for split, ref in plain["splits"].items()},
            labels=None if plain["labels"] is None else tuple(plain["labels"]),
            label_ids=None if label_ids is None else tuple(map(tuple, label_ids)),
            counts=plain["counts"],
            digest=plain["digest"],
            chat=plain.get("chat"),
            tables={
                split: tuple(TableVersion(**table) for table in tables)
                for split, tables in plain.get("tables", {}).items()
            },
        )


def check_task(name: str, task: TaskSettings, lake: Lake | None = None) -> TaskPlan:
    """Find a task's files, read their footers and check its templates against them; no Ray, no tokenizer.

    lake: catalogs, and the tables that other tasks of the run have opened already.
    Raises: CorpusError naming the task, the file and the fix.
    """
    here = f"task '{name}'"
    lake = lake or Lake()
    asked, target = task_input(name, task), parse_template(task.target, f"{here}, target")
    if not asked.columns:
        raise CorpusError(f"{here}, input: the template {asked.text!r} names no column; write one such as {{text}}")
    inputs = [message.content for message in asked.messages] if isinstance(asked, ChatInput) else [asked]
    labelled = {
        split: _source(rows, f"{here}, {split}", [*inputs, target], lake)
        for split, rows in zip(SPLITS, (task.train, task.dev, task.test), strict=True)
        if rows is not None
    }
    sources = labelled
    if task.teacher is not None and task.teacher.unlabelled is not None:
        unlabelled = _source(task.teacher.unlabelled, f"{here}, teacher.unlabelled", inputs, lake)
        sources = labelled | {UNLABELLED: unlabelled}
    # Of unlabelled rows nobody reads a target: what its column holds there, or whether there is one, does not matter.
    check_class_names(list(sources.values()), inputs)
    check_class_names(list(labelled.values()), [target])
    _check_labels_are_names(here, task, target, labelled["train"])
    columns = dict.fromkeys(column for template in inputs for column in template.columns)
    others = [column for column in target.columns if column not in columns]
    integer_columns = find_integer_columns(sources, columns) | find_integer_columns(labelled, others)
    return TaskPlan(name, sources, asked, target, task.dev_fraction, integer_columns)


def _inexact(source: ParquetSource) -> str:
    filtered = any(file.view is not None and file.view.where is not None for file in source.files)
    meaning = "the most that its filter can leave" if filtered else "a guess"
    return f"the plan's number of its rows is {meaning}; they are counted when they are read"


def _since(table: TableVersion) -> str:
    return f", written {table.time}" if table.time else ""


def _source(split: Split, where: str, templates: Sequence[TextTemplate], lake: Lake) -> ParquetSource:
    """Files that have rows, and the columns of these templates. Raises: CorpusError."""
    source = open_split_source(split, where, lake)
    check_columns(source, templates)
    if not source.rows:
        empty = source.files[0].path if source.files else source.tables[0].address if source.tables else "the corpus"
        raise CorpusError(f"{source.where}: {empty} holds no row; give a file that does")
    return source


def task_input(name: str, task: TaskSettings) -> TextTemplate | ChatInput:
    """The template of a task's input. Raises: CorpusError when it is broken."""
    where = f"task '{name}', input"
    if isinstance(task.input, str):
        return parse_template(task.input, where)
    return parse_chat([(message.role, message.content) for message in task.input], task.chat_options, where)


def task_chat(
    name: str, task: TaskSettings, asked: TextTemplate | ChatInput, architecture: Architecture, tokenizer: Any
) -> ModelChat | None:
    """A task's chat as the model writes it; None for a task whose input is one text.

    Raises: CorpusError naming the task when the model takes no such chat, or its template would change a label.
    """
    if not isinstance(asked, ChatInput):
        return None
    where = f"task '{name}', input"
    if architecture != "decoder-only":
        raise CorpusError(f"{where}: messages are for decoder-only models, and this is an {architecture}; write a text")
    chat = bind_chat(asked, tokenizer, where)
    labels = task.labels or ()
    for label in compress(labels, chat.changed(labels)):
        raise CorpusError(
            f"task '{name}': the model's chat template does not write the label {label!r} as it stands; "
            "write it without white space around it, and without the template's own marks"
        )
    return chat


def _check_labels_are_names(here: str, task: TaskSettings, target: TextTemplate, train: ParquetSource) -> None:
    """Raises: CorpusError when `labels` holds none of the names that the target's numbers stand for."""
    names = dict(train.files[0].class_names).get(target.columns[0]) if len(target.columns) == 1 else None
    if names is None or task.labels is None:
        return
    targets = [render_row(target, {target.columns[0]: name}) for name in names]
    if not set(targets) & set(task.labels):
        raise CorpusError(
            f"{here}: 'labels' is [{', '.join(task.labels)}], but the numbers of the column {target.columns[0]!r} have "
            f"names in {train.files[0].path} and targets are made of those; write labels: {json.dumps(targets)}"
        )


def prepare_task(
    name: str,
    task: TaskSettings,
    tokenizer: TokenizerSpec,
    storage: Path,
    connect: Callable[[], None] = lambda: None,
    lake: Lake | None = None,
) -> TaskCorpus:
    """The corpus of one task; see `check_task` and `prepare_tasks`.

    Raises: CorpusError naming the task and the fix; StorageError when `storage` cannot be written.
    """
    plan = check_task(name, task, lake)
    prepared = prepare_tasks({name: task}, {name: plan}, tokenizer, storage, connect)[name]
    if isinstance(prepared, PromptBankError):
        raise prepared
    return prepared


def prepare_tasks(
    tasks: Mapping[str, TaskSettings],
    plans: Mapping[str, TaskPlan],
    tokenizer: TokenizerSpec,
    storage: Path,
    connect: Callable[[], None] = lambda: None,
) -> dict[str, TaskCorpus | PromptBankError]:
    """Build the token shards that are not there yet, and check what can be known only from the rows.

    By task its corpus, or what is wrong with it in one sentence. Small corpora are tokenised side by side.
    plans: what `check_task` found; the files and versions of tables that it names are read, and no newer ones.
    connect: called when shards must be built, which needs a connection to Ray; by default there is one already.
    Raises: StorageError when `storage` cannot be written, TuningError when workers or nodes were lost.
    """
    from pipeline.corpus.shards import ShardRequest, build_side_by_side  # here: reading a corpus never imports ray

    prepared: dict[str, TaskCorpus | PromptBankError] = {}
    drafts: dict[str, _Draft] = {}
    for name, task in tasks.items():
        try:
            drafts[name] = _draft(plans[name], task, tokenizer)
        except PromptBankError as error:
            prepared[name] = error
    splits = [(name, split, source) for name, draft in drafts.items() for split, source in draft.plan.sources.items()]
    requests = [ShardRequest(source, drafts[name].recipe_of(split)) for name, split, source in splits]
    outcomes = build_side_by_side(requests, tokenizer, storage, connect)
    built: dict[str, dict[str, Path | PromptBankError]] = {name: {} for name in drafts}
    for (name, split, _), outcome in zip(splits, outcomes, strict=True):
        built[name][split] = outcome
    for name, draft in drafts.items():
        try:
            prepared[name] = _finish(draft, built[name], tokenizer)
        except PromptBankError as error:
            prepared[name] = error
    return {name: prepared[name] for name in tasks}


@dataclass(frozen=True)
class _Draft:
    """A task whose settings and files are checked, and whose rows are not."""

    plan: TaskPlan
    task: TaskSettings
    recipe: Recipe

    def recipe_of(self, split: str) -> Recipe:
        return without_targets(self.recipe) if split == UNLABELLED else self.recipe


def _draft(plan: TaskPlan, task: TaskSettings, tokenizer: TokenizerSpec) -> _Draft:
    recipe = task_recipe(plan, task, tokenizer)
    loaded = load_tokenizer(tokenizer.dir)
    encode_targets(loaded, tokenizer.architecture, "", ["a"], recipe.chat)  # has an eos, before any work
    check_encodable(plan.task, task, task.labels or (), recipe.architecture, loaded, recipe.chat)
    return _Draft(plan, task, recipe)


def _finish(draft: _Draft, built: Mapping[str, Path | PromptBankError], tokenizer: TokenizerSpec) -> TaskCorpus:
    """Check a task's token shards and describe them. Raises: what its shards could not be built for, CorpusError."""
    plan, task, recipe, name = draft.plan, draft.task, draft.recipe, draft.plan.task
    whole: dict[str, SplitRef] = {}
    for split, outcome in built.items():
        if isinstance(outcome, PromptBankError):
            raise outcome
        whole[split] = SplitRef(str(outcome))
    _check_rows(draft, whole, load_tokenizer(tokenizer.dir))
    # Both splits by fraction are ranges of ids in one shard folder: no row is written twice.
    splits = dict(whole)
    if plan.dev_fraction is not None:
        folder, share = whole["train"].dir, plan.dev_fraction
        splits |= {"train": SplitRef(folder, share, 1.0), "dev": SplitRef(folder, 0.0, share)}
    splits = {split: splits[split] for split in (*SPLITS, UNLABELLED) if split in splits}
    summaries = {split: summarise_split(ref) for split, ref in splits.items()}
    for split, summary in summaries.items():
        if not summary.counts["ok"]:
            where = plan.sources[split].where if split in plan.sources else f"task '{name}', {split}"
            of_fraction = plan.dev_fraction is not None and split in ("train", "dev")
            fraction = f" or fix dev_fraction {plan.dev_fraction}" if of_fraction else ""
            raise CorpusError(f"{where}: no usable row is left ({_counted(summary)}); give more rows{fraction}")
    labels = _label_set(name, task, {split: ref for split, ref in splits.items() if split != UNLABELLED})
    return TaskCorpus(
        task=name,
        splits=splits,
        labels=labels,
        label_ids=None if labels is None else _label_ids(name, labels, recipe, tokenizer),
        counts={split: summary.counts for split, summary in summaries.items()},
        digest=_digest(summaries, recipe),
        chat=recipe.chat.form.model_dump(mode="json") if recipe.chat else None,
        tables={split: source.tables for split, source in plan.sources.items() if source.tables},
    )


def _check_rows(draft: _Draft, whole: Mapping[str, SplitRef], loaded: Any) -> None:
    """Labels must be encodable; of other targets a few may be lost, which `max_bad_rows` bounds."""
    task, recipe = draft.task, draft.recipe
    for split, ref in whole.items():
        if split != UNLABELLED and (task.labels is not None or task.metric in ("accuracy", "f1")):
            lost = tuple(islice(unencodable_targets(ref), 1))
            check_encodable(draft.plan.task, task, lost, recipe.architecture, loaded, recipe.chat)
        refused = next(chain(unencodable_targets(ref), changed_targets(ref)), None)
        _check_bad_rows(draft.plan.sources[split].where, task, summarise_split(ref), refused)


def task_recipe(plan: TaskPlan, task: TaskSettings, tokenizer: TokenizerSpec) -> Recipe:
    """All that decides the task's tokens besides the tokenizer; encoder-decoders and chats have no separator.

    Raises: CorpusError naming the task when the model takes no such chat.
    """
    loaded, decodes_alone = load_tokenizer(tokenizer.dir), tokenizer.architecture == "decoder-only"
    chat = task_chat(plan.task, task, plan.input, tokenizer.architecture, loaded)
    separated = decodes_alone and chat is None
    asked = chat or plan.input
    assert not isinstance(asked, ChatInput), "a chat was bound to its model"
    return Recipe(
        input=asked,
        target=plan.target,
        separator=task.separator if separated else "",
        max_input_tokens=task.max_input_tokens,
        max_target_tokens=task.max_target_tokens,
        architecture=tokenizer.architecture,
        embedding_rows=tokenizer.embedding_rows,
        integer_columns=plan.integer_columns,
        targets_encoded_after_text=separated and encodes_beginnings_differently(loaded, task.separator),
        counts_unencodable=can_lose_text(loaded),
    )


def without_targets(recipe: Recipe) -> Recipe:
    """The recipe of a task's unlabelled rows: what concerns its targets alone does not decide their shards."""
    return Recipe(
        input=recipe.input,
        target=None,
        separator="",
        max_input_tokens=recipe.max_input_tokens,
        max_target_tokens=0,
        architecture=recipe.architecture,
        embedding_rows=recipe.embedding_rows,
        integer_columns=recipe.integer_columns,
        unlabelled=True,
    )


def check_encodable(
    name: str,
    task: TaskSettings,
    labels: Sequence[str],
    architecture: Architecture,
    tokenizer: Any,
    chat: ModelChat | None = None,
) -> None:
    """Raises: CorpusError naming a label that is lost in its tokens, so that no prompt could ever produce it."""
    separator = task.separator if architecture == "decoder-only" and chat is None else ""
    lost = unencodable(tokenizer, architecture, separator, labels, chat)
    for label in compress(labels, lost):
        tokens = " ".join(tokenizer.convert_ids_to_tokens(encode_plain(tokenizer, [label])[0]))
        raise CorpusError(
            f"task '{name}': the tokenizer cannot encode the label {label!r} (its tokens are {tokens or 'none'}); "
            "word it in characters that the model's vocabulary has"
        )


def _check_bad_rows(where: str, task: TaskSettings, summary: SplitSummary, refused: str | None) -> None:
    if not summary.rows:
        raise CorpusError(f"{where}: no row of the corpus is one that 'where' asks for; fix the filter")
    share = 1 - summary.counts["ok"] / summary.rows
    example = "" if refused is None else f", such as {refused[:60]!r}"
    if share > task.max_bad_rows:
        raise CorpusError(
            f"{where}: {share:.1%} of {summary.rows} rows cannot be used ({_counted(summary)}{example}), "
            f"more than max_bad_rows {task.max_bad_rows:.1%}; fix the rows, or raise max_input_tokens "
            f"({task.max_input_tokens}), max_target_tokens ({task.max_target_tokens}) or max_bad_rows"
        )


def _counted(summary: SplitSummary) -> str:
    words = {"null": "null", "empty": "empty", "input_long": "input over-long", "target_long": "target over-long"}
    words["no_embedding"] = "with a token that the model has no embedding for"
    words["target_unsayable"] = "with a target that the tokenizer cannot encode"
    words["target_changed"] = "with a target that the chat template does not write as it stands"
    return ", ".join(f"{count} {word}" for key, word in words.items() if (count := summary.counts.get(key))) or "0 rows"


def _label_set(name: str, task: TaskSettings, splits: Mapping[str, SplitRef]) -> tuple[str, ...] | None:
    """The task's labels where its metric or initialisation needs them; every split's targets must be among them."""
    class_labels_asked = any(trial.prompt.init == "class_labels" for trial in task.trials(name).values())
    needs = [f"metric '{task.metric}'"] * (task.metric in ("accuracy", "f1"))
    needs += ["prompt init 'class_labels'"] * (class_labels_asked)
    if task.labels is None and not needs:
        return None
    labels = tuple(dict.fromkeys(task.labels)) if task.labels is not None else _found_labels(name, splits, needs[0])
    for split, ref in splits.items():
        unknown = next((target for target in unique_targets(ref) if target not in labels), None)
        if unknown is not None:
            raise CorpusError(
                f"task '{name}', {split}: the target {unknown!r} is not in the label set "
                f"({', '.join(map(repr, labels))}); add it to 'labels' or fix the rows"
            )
    return labels


def _found_labels(name: str, splits: Mapping[str, SplitRef], need: str) -> tuple[str, ...]:
    found = sorted(islice(unique_targets(splits["train"]), _MOST_LABELS + 1))
    if len(found) > _MOST_LABELS:
        raise CorpusError(
            f"task '{name}', train: {need} needs a label set, but there are more than {_MOST_LABELS} different "
            f"targets such as {found[0]!r}; set 'labels', or choose another {need.rpartition(' ')[0]}"
        )
    return tuple(found)


def _label_ids(
    name: str, labels: tuple[str, ...], recipe: Recipe, tokenizer: TokenizerSpec
) -> tuple[tuple[int, ...], ...]:
    loaded = load_tokenizer(tokenizer.dir)
    ids = [tuple(row) for row in encode_targets(loaded, recipe.architecture, recipe.separator, labels, recipe.chat)]
    for label, tokens, alone in zip(labels, ids, encode_plain(loaded, labels), strict=True):
        if (reason := missing_embedding(loaded, [*tokens, *alone], recipe.embedding_rows)) is not None:
            raise CorpusError(f"task '{name}': the label {label!r} {reason}")
    first: dict[tuple[int, ...], str] = {}
    for label, tokens in zip(labels, ids, strict=True):
        if first.setdefault(tokens, label) != label:
            raise CorpusError(
                f"task '{name}': the labels {first[tokens]!r} and {label!r} have the same tokens, so the model cannot "
                "tell them apart; word them differently"
            )
    return tuple(ids)


def _digest(summaries: Mapping[str, SplitSummary], recipe: Recipe) -> str:
    # What decides the tokens but is not in the rows' texts is added, only where it matters: others keep their digest.
    parts: dict[str, Any] = {split: summary.digest for split, summary in summaries.items()}
    if recipe.targets_encoded_after_text:
        parts["targets"] = "behind a text"
    if recipe.chat is not None:
        parts["chat"] = recipe.chat.digest
    lost = {split: count for split, s in summaries.items() if (count := s.counts.get("target_unsayable"))}
    if lost:
        parts["unsayable"] = lost
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
