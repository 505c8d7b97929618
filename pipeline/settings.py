"""Settings: one YAML file in, one frozen and validated `Settings` out. The only reader of configuration.

A task inherits every key of `defaults` that it does not name itself, key by key
(`prompt: {length: 32}` under a task keeps the default `init`). Relative paths are
relative to the directory that the job is started in.
"""

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.errors import SettingsError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Paths = str | list[str]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RunSettings(_Frozen):
    name: Name = "prompts"
    """The run's folder under `storage`; the same name again resumes it."""
    storage: str = "./runs"
    """A folder that every node sees. All resumable state of the job lives here."""
    seed: int = Field(0, ge=0)
    max_live_trials: int = Field(64, ge=1)
    """Trials tuned at the same time; the others wait for a slot."""
    checkpoint_every: int = Field(25, ge=1)
    """Steps between checkpoints of the prompts and their optimizers."""
    max_failures: int = Field(3, ge=0)
    """How often lost workers are started again before the run gives up."""
    on_bad_task: Literal["refuse", "skip"] = "refuse"
    """A task whose corpus cannot be used stops the run before training, or is reported as failed."""


class ModelSettings(_Frozen):
    path: str
    """A folder, a hub name, a .gguf file, or the name of a packaged model (`smollm2-135m`)."""
    weights: Literal["int8", "full"] = "int8"
    """`int8` quantises every linear layer row by row; `full` keeps the `dtype` below."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and unquantised weights; `auto` is float32 on a CPU, bfloat16 on a GPU."""
    products: Literal["auto", "int8", "exact"] = "auto"
    """How int8 layers multiply while tuning: `int8` quantises activations and gradients too, row by row; `exact`
    does not; `auto` is int8 where the processor has instructions for it."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where a rank's part of the weights waits between uses: on its device, in main memory (`cpu`, for GPUs), or in
    files under `offload_folder` (`nvme`), of which the system keeps in memory what there is room for."""
    offload_folder: str | None = None
    """A folder on each node's own fast disk, for `offload: nvme`."""

    @model_validator(mode="after")
    def _offload_has_its_folder(self) -> "ModelSettings":
        if (self.offload == "nvme") != (self.offload_folder is not None):
            raise ValueError("offload 'nvme' and 'offload_folder' (a folder on a local disk) go together")
        return self


class ClusterSettings(_Frozen):
    num_workers: int = Field(1, ge=1)
    """Ranks; the model is partitioned over them by ZeRO-3."""
    use_gpu: bool = False
    address: str | None = None
    """Ray address; without it RAY_ADDRESS is used, and without that a local Ray is started."""
    cpus_per_worker: int = Field(1, ge=1)
    tokens_per_microbatch: int = Field(2048, ge=64)
    """Prompt, input and target tokens that one rank runs in one forward pass, padding included."""


class PromptSettings(_Frozen):
    length: int = Field(100, ge=1)
    init: Literal["random", "sampled_vocab", "class_labels", "text", "bank"] = "sampled_vocab"
    text: str | None = None
    """The words to start from, with `init: text`."""
    source: str | None = None
    """The prompt to start from, `name` or `name@version`, with `init: bank`."""

    @model_validator(mode="after")
    def _init_has_its_source(self) -> "PromptSettings":
        if self.init == "text" and not self.text:
            raise ValueError("init 'text' needs the setting 'text': the words to start from")
        if self.init == "bank" and not self.source:
            raise ValueError("init 'bank' needs the setting 'source': a prompt's name, such as sst2@latest")
        return self


class OptimizerSettings(_Frozen):
    name: Literal["adafactor", "adamw"] = "adafactor"
    lr: float = Field(0.3, gt=0)
    weight_decay: float = Field(1e-5, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = Field(0, ge=0)
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of this prompt's own gradient; without it only Adafactor's update clipping acts."""


class TaskDefaults(_Frozen):
    """What every task may set. The defaults are Lester et al. (2021), section 3 and appendix A."""

    input: str = "{text}"
    """Template of the model's input; `{column}` stands for a column of the corpus."""
    target: str = "{label}"
    metric: Literal["accuracy", "exact_match", "f1", "rouge_l", "loss"] = "accuracy"
    labels: list[str] | None = None
    """The label set for accuracy and f1; without it, the distinct targets of the train split."""
    prompt: PromptSettings = PromptSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    batch_size: int = Field(32, ge=1)
    max_steps: int = Field(30_000, ge=1)
    eval_every: int = Field(500, ge=1)
    patience: int | None = Field(10, ge=1)
    """Evaluations without a better dev metric after which the trial stops; null never stops early."""
    eval_rows: int = Field(500, ge=1)
    """Dev (and test) rows that an evaluation uses at most: a fixed random subset."""
    seed: int | None = Field(None, ge=0)
    """The trial's own seed; without it `run.seed`."""
    dev_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the train rows held out as dev split, chosen by row content alone."""
    separator: str = " "
    """Put between input and target for decoder-only models."""
    max_input_tokens: int = Field(256, ge=1)
    max_target_tokens: int = Field(64, ge=1)
    max_bad_rows: float = Field(0.05, ge=0, le=1)
    """Largest share of null, empty and over-long rows that is dropped without refusing the task."""


class TaskSettings(TaskDefaults):
    train: Paths
    """Parquet files: a path, folder, glob or object-store URI, or a list of them."""
    dev: Paths | None = None
    test: Paths | None = None

    @model_validator(mode="after")
    def _one_dev_split(self) -> "TaskSettings":
        if (self.dev is None) == (self.dev_fraction is None):
            raise ValueError("give either 'dev' (a path) or 'dev_fraction' (a share of train), and not both")
        return self


class BankSettings(_Frozen):
    uri: str = "./bank"
    """A folder, or an object store such as s3://bucket/prefix."""
    alias: Name = "latest"
    trusted_keys: tuple[str, ...] = ()
    """Public keys (PEM files): versions that none of them signed are refused."""
    signing_key: str | None = None
    """The private key (PEM file) that signs what this run publishes."""


class Settings(_Frozen):
    run: RunSettings = RunSettings()
    model: ModelSettings
    cluster: ClusterSettings = ClusterSettings()
    defaults: TaskDefaults = TaskDefaults()
    tasks: dict[Name, TaskSettings] = Field(min_length=1)
    bank: BankSettings = BankSettings()

    @model_validator(mode="after")
    def _offload_has_a_use(self) -> "Settings":
        if self.model.offload == "cpu" and not self.cluster.use_gpu:
            raise ValueError("model.offload 'cpu' is for GPUs: without them weights are in main memory; use 'nvme'")
        if self.model.offload != "none" and self.cluster.use_gpu and self.cluster.num_workers == 1:
            raise ValueError("model.offload needs cluster.num_workers of 2 or more: a single GPU holds the model whole")
        return self


_TASKS = Settings.model_fields["tasks"].annotation


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read and validate a settings file; `overrides` are `dotted.key=value` with YAML values.

    Raises: SettingsError naming the file, the key and the mend.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read the settings file {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {_one_line(error)}") from error
    return parse_settings(raw, overrides, origin=str(path))


def parse_settings(raw: Any, overrides: Sequence[str] = (), origin: str = "settings") -> Settings:
    """Validate a settings mapping as read from YAML. Raises: SettingsError."""
    if not isinstance(raw, dict):
        raise SettingsError(f"{origin}: expected a mapping with the keys {', '.join(Settings.model_fields)}")
    for override in overrides:
        raw = _with_override(raw, override)
    try:
        return Settings.model_validate(_with_defaults(raw))
    except ValidationError as error:
        details = error.errors()
        in_defaults = {detail["loc"][1:] for detail in details if detail["loc"][:1] == ("defaults",)}
        own = [d for d in details if d["loc"][:1] != ("tasks",) or d["loc"][2:] not in in_defaults]
        sentences = dict.fromkeys(map(_sentence, own))
        raise SettingsError("\n".join(f"{origin}: {sentence}" for sentence in sentences)) from error


def settings_schema() -> str:
    """JSON Schema of the settings file, for editors (`# yaml-language-server: $schema=…`)."""
    return json.dumps(Settings.model_json_schema(), indent=2) + "\n"


def _with_override(raw: dict[str, Any], override: str) -> dict[str, Any]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set {override}: write it as key=value, for example tasks.sst2.max_steps=50")
    result = dict(raw)
    node = result
    *parents, leaf = key.split(".")
    for parent in parents:
        child = node.get(parent)
        if child is not None and not isinstance(child, dict):
            raise SettingsError(f"--set {override}: '{parent}' is a value, not a mapping")
        node[parent] = dict(child or {})
        node = node[parent]
    try:
        node[leaf] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {override}: the value is not valid YAML: {_one_line(error)}") from error
    return result


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    defaults, tasks = raw.get("defaults"), raw.get("tasks")
    if not isinstance(defaults, dict) or not isinstance(tasks, dict):
        return raw
    merged = {name: _merge(defaults, task) if isinstance(task, dict) else task for name, task in tasks.items()}
    for name, task in tasks.items():  # a task's own dev split replaces the inherited one
        if isinstance(task, dict) and "dev" in task and "dev_fraction" not in task:
            merged[name].pop("dev_fraction", None)
    return {**raw, "tasks": merged}


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _sentence(detail: Any) -> str:
    where = ".".join(str(part) for part in detail["loc"] if part not in ("str", "list[str]", "[key]"))
    where = where or "the file"
    match detail["type"]:
        case "extra_forbidden":
            return f"unknown key '{where}'{_suggestion(detail['loc'])}"
        case "missing":
            return f"'{where}' is missing"
        case "string_pattern_mismatch":
            return f"'{where}': {detail['input']!r} may hold only letters, digits, '.', '_' and '-'"
        case _:
            message = detail["msg"].removeprefix("Value error, ")
            return f"'{where}': {message[:1].lower()}{message[1:]}"


def _suggestion(loc: tuple[int | str, ...]) -> str:
    model: Any = Settings
    for part in loc[:-1]:
        # Under `tasks` the key is the task's name; everywhere else it is a field.
        model = TaskSettings if model is _TASKS else model.model_fields[str(part)].annotation
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys here: {', '.join(known)}"


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", str(error))
