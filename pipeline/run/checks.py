"""Everything that can be checked before anything is trained: what `--plan` shows, and a run does first."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PretrainedConfig

from pipeline.backbone.files import (
    Architecture,
    ModelFiles,
    architecture_of,
    check_eos,
    context_length,
    embedding_rows,
    find_model,
    read_config,
    read_generation,
    read_tokenizer,
)
from pipeline.backbone.fingerprint import identify
from pipeline.backbone.host import compute_dtype
from pipeline.backbone.loading import build_skeleton
from pipeline.backbone.memory import MemoryEstimate, estimate_memory
from pipeline.backbone.weights import open_weights
from pipeline.bank import BackboneId, PromptBank
from pipeline.corpus.encoding import encode_targets, missing_embedding
from pipeline.corpus.tables.libraries import Lake
from pipeline.corpus.task_corpus import UNLABELLED, TaskPlan, check_encodable, check_task, task_chat
from pipeline.errors import BackboneError, BankError, PromptBankError, SettingsError, StorageError
from pipeline.reporting.plan import PlanRow, memory_table, plan_table
from pipeline.reporting.words import millions
from pipeline.run.bank import find_bank
from pipeline.run.teachers import check_words
from pipeline.settings import RunSettings, Settings, TaskSettings
from pipeline.whole_files import check_folder

_OTHER_MAPS = 4096
"""Of a rank's libraries, its heap and the model's weights."""


@dataclass(frozen=True)
class CheckedRun:
    """Settings that can be carried out, and what the checks found."""

    settings: Settings
    files: ModelFiles
    config: PretrainedConfig
    tokenizer: Any
    identity: BackboneId
    memory: MemoryEstimate
    plans: Mapping[str, TaskPlan]
    refused: Mapping[str, PromptBankError] = field(default_factory=dict)
    """Tasks that cannot be used, when the settings say to skip them."""

    @property
    def architecture(self) -> Architecture:
        return architecture_of(self.config)


def check_run(settings: Settings, new_backbone: bool = False, publishes: bool = True) -> CheckedRun:
    """Check files, columns, templates, the model folder and the bank.

    new_backbone: the bank may belong to another one.
    publishes: to the bank that the settings name, which must then be one that can be written.

    Raises: the first PromptBankError that stops the run, or one that lists every task's mistake.
    """
    check_storage(settings.run)
    _check_bank(settings.bank.uri, publishes)
    files = find_model(settings.model.path)
    config, tokenizer = read_config(files), read_tokenizer(files)
    check_eos(files.name, config, tokenizer)
    check_forced_start(files, config, tokenizer)
    lake = Lake(settings.catalogs)
    plans: dict[str, TaskPlan] = {}
    refused: dict[str, PromptBankError] = {}
    for name, task in settings.tasks.items():
        try:
            check_context(name, task, config)
            check_words(name, task, config, tokenizer)
            plan = check_task(name, task, lake)
            chat = task_chat(name, task, plan.input, architecture_of(config), tokenizer)
            check_encodable(name, task, task.labels or (), architecture_of(config), tokenizer, chat)
            plans[name] = plan
        except StorageError:  # no mistake of the task's
            raise
        except PromptBankError as error:
            refused[name] = error
    refuse_or_skip(settings, refused)
    check_maps(plans.values())
    int8 = settings.model.weights == "int8"
    weights = open_weights(files, build_skeleton(config, int8=False))
    identity = identify(settings.model.path, config, tokenizer, weights, settings.model.weights)
    bank = find_bank(settings)
    if bank is not None and not new_backbone:
        bank.check_backbone(identity)
    for name in plans:
        try:
            check_start(name, settings, tokenizer, embedding_rows(config), bank, identity)
        except PromptBankError as error:
            refused[name] = error
    refuse_or_skip(settings, refused)
    plans = {name: plan for name, plan in plans.items() if name not in refused}
    place = torch.device("cuda" if settings.cluster.use_gpu else "cpu")
    dtype = compute_dtype(settings.model.dtype, place)
    cluster = settings.cluster
    parts = 1 if cluster.partition == "never" else cluster.num_workers
    memory = estimate_memory(config, int8, dtype, parts, cluster.tokens_per_microbatch, weights)
    return CheckedRun(settings, files, config, tokenizer, identity, memory, plans, refused)


def check_storage(run: RunSettings) -> None:
    """Raises: SettingsError when no folder can have that name, StorageError when it cannot be written now."""
    if "://" in run.storage:
        raise SettingsError(f"run.storage {run.storage}: must be a folder that every node sees, not a URI")
    folder = Path(run.storage).expanduser().resolve() / run.name
    check_folder(folder, f"run.storage {run.storage}", "name a folder that every node can write")


def check_maps(plans: Collection[TaskPlan], limit: Path = Path("/proc/sys/vm/max_map_count")) -> None:
    """A rank maps the shard of every source file, and Linux allows a process so many maps. Raises: SettingsError."""
    files = [len(source.files) for plan in plans for source in plan.sources.values()]
    files += [len(plan.sources["train"].files) for plan in plans if plan.dev_fraction is not None]  # mapped for dev too
    try:
        most = int(limit.read_text())
    except (OSError, ValueError):  # another system
        return
    if sum(files) > most - _OTHER_MAPS:
        raise SettingsError(
            f"tasks: their corpora lie in {sum(files)} files, each of which a rank maps, and a process here may have "
            f"{most} maps; compact the corpora into fewer files, or raise vm.max_map_count on every node"
        )


def _check_bank(uri: str, publishes: bool) -> None:
    folder = Path(uri).expanduser().resolve()
    if "://" in uri or (not publishes and (folder.is_dir() or not folder.exists())):
        return
    check_folder(folder, f"bank.uri {uri}", "name a folder that can be written, or an object store")


def refuse_or_skip(settings: Settings, refused: Mapping[str, PromptBankError]) -> None:
    """Raises: the errors of the refused tasks as one, unless `run.on_bad_task` says to go on with the others."""
    if refused and (settings.run.on_bad_task == "refuse" or len(refused) == len(settings.tasks)):
        first = next(iter(refused.values()))
        raise type(first)("\n".join(str(error) for error in refused.values()))


def check_context(name: str, task: TaskSettings, config: PretrainedConfig) -> None:
    """Raises: SettingsError when prompt, input and target may be longer than the model's context."""
    context = context_length(config)
    length = max(trial.prompt.length for trial in task.trials(name).values())
    before = f"prompt.length {length} + max_input_tokens {task.max_input_tokens}"
    target = f"max_target_tokens {task.max_target_tokens}"
    rows = {f"{before} + {target}": length + task.max_input_tokens + task.max_target_tokens}
    if config.is_encoder_decoder:  # its decoder counts anew
        rows = {before: length + task.max_input_tokens, target: task.max_target_tokens}
    for what, most in rows.items():
        if context is not None and most > context:
            raise SettingsError(
                f"task '{name}': {what} = {most} is longer than the model's context of {context} tokens; lower one of "
                "them"
            )


def check_forced_start(files: ModelFiles, config: PretrainedConfig, tokenizer: Any) -> None:
    """Raises: BackboneError when the model begins its answers with a token that targets do not begin with."""
    forced = read_generation(files, config).forced_bos_token_id if config.is_encoder_decoder else None
    if forced is not None and (first := encode_targets(tokenizer, "encoder-decoder", "", ["a"])[0][0]) != forced:
        forced_word, word = tokenizer.convert_ids_to_tokens([forced, first])
        raise BackboneError(
            f"model.path {files.name}: every answer has to begin with {forced_word!r} (forced_bos_token_id), but its "
            f"tokenizer begins targets with {word!r}; for a translator set tgt_lang in tokenizer_config.json to the "
            "language that it answers in, else take forced_bos_token_id out of generation_config.json"
        )


def check_start(
    name: str, settings: Settings, tokenizer: Any, rows: int, bank: PromptBank | None, identity: BackboneId
) -> None:
    """Raises: SettingsError when a task's prompt has nothing to start from."""
    prompts = [trial.prompt for trial in settings.tasks[name].trials(name).values()]
    for text in {prompt.text for prompt in prompts if prompt.init == "text"}:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if (reason := missing_embedding(tokenizer, ids, rows)) is not None:
            raise SettingsError(f"task '{name}': prompt.text {text!r} {reason}")
        if not ids:
            raise SettingsError(f"task '{name}': prompt.text {text!r} holds no token; give some words")
    for source in sorted({source for prompt in prompts if prompt.init == "bank" for source in prompt.sources}):
        if bank is None:
            raise SettingsError(f"task '{name}': prompt.source {source}: there is no bank at {settings.bank.uri}")
        try:
            bank.load(source, backbone=identity)
        except BankError as error:
            raise SettingsError(f"task '{name}': prompt.source {source}: {error}") from error


def print_plan(checked: CheckedRun, console: Console) -> None:
    """Show the tasks with their rows, trials and steps, the model, and the memory that each rank needs."""
    settings = checked.settings
    rows = []
    for name, plan in checked.plans.items():
        task = settings.tasks[name]
        trials = task.trials(name).values()
        row = PlanRow(
            task=name,
            train_rows=plan.rows["train"],
            dev_rows=None if task.dev_fraction else plan.rows["dev"],
            test_rows=plan.rows.get("test"),
            trials=len(trials),
            max_steps=task.max_steps,
            prompt_length=max(trial.prompt.length for trial in trials),
            metric=task.metric,
            dev_fraction=task.dev_fraction,
            unlabelled_rows=plan.rows.get(UNLABELLED),
        )
        rows.append(row)
    console.print(plan_table(rows))
    for plan in checked.plans.values():
        for remark in (*plan.remarks, *plan.left_out):
            console.print(remark, markup=False)
    for name, error in checked.refused.items():
        console.print(f"left out: {name}: {error}", markup=False)
    memory = checked.memory
    console.print(
        f"model {settings.model.path}: {checked.config.model_type}, {millions(memory.parameters)} parameters, "
        f"{settings.model.weights}, backbone {checked.identity.fingerprint[:12]}",
        markup=False,
    )
    console.print(memory_table(memory.parts, settings.cluster.num_workers))
    if settings.cluster.partition == "auto" and settings.cluster.num_workers > 1:
        console.print("(partitioned; where every rank has room for four times the whole model, each holds it whole)")
    storage, bank = (os.path.expanduser(place) for place in (settings.run.storage, settings.bank.uri))
    console.print(f"run {storage}/{settings.run.name} -> bank {bank} ({settings.bank.alias})", markup=False)
