"""The settings of a run, key by key; the docstring below a key says what it means."""

from collections.abc import Mapping
from operator import attrgetter
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    ValidationError,
    model_validator,
)

from pipeline.settings.comparing import CompareSettings, parts
from pipeline.settings.fields import LARGEST, Address, Count, Name, Paths, Seed, SettingsModel, Tokens
from pipeline.settings.sweeps import (
    MOST_TRIALS,
    SweptKey,
    WrittenSweep,
    apply_choice,
    choices,
    count_choices,
    expand_seeds,
    trial_name,
)

Sweep = Annotated[
    dict[SweptKey, Annotated[list[Any], Field(min_length=1)]],
    BeforeValidator(expand_seeds, json_schema_input_type=WrittenSweep),
]


_OF_CHAT_TEMPLATES = ("messages", "add_generation_prompt", "continue_final_message", "chat_template", "conversations")
MOST_SECONDS = 10**9
"""About thirty years."""


class RunSettings(SettingsModel):
    """What the run is called, where it keeps its files, and how it treats faults."""

    name: Name = "prompts"
    """The run's folder under `storage`; the same name again resumes it."""
    storage: Address = "./runs"
    """A folder that every node sees. All resumable state of the job lives here."""
    seed: Seed = 0
    """What every trial without a seed of its own draws its numbers from."""
    max_live_trials: int = Field(64, ge=1, le=1_000_000)
    """Most trials tuned at the same time; the others wait for a slot."""
    checkpoint_every: Count = 25
    """Steps between checkpoints of the prompts and their optimizers."""
    max_failures: int = Field(3, ge=0, le=1_000_000)
    """How many times the ranks are restarted after a loss. Then the run gives up."""
    hang_timeout: float = Field(600.0, gt=0, le=MOST_SECONDS)
    """A rank is ended after this many seconds without a sign of life. A sign of life is that a layer of the model
    begins to run. All ranks then start again from the last checkpoint, as after a loss. While ranks load, they have
    four times as long. It must be longer than the backward pass of `cluster.tokens_per_microbatch` tokens."""
    on_bad_task: Literal["refuse", "skip"] = "refuse"
    """What happens when a task's corpus cannot be used. `refuse` stops the run before training. `skip` reports the task
    as failed and goes on. A nightly refresh always goes on."""


class ModelSettings(SettingsModel):
    """The frozen model."""

    path: Address
    """A folder, a hub name, a .gguf file, or the name of a packaged model (`smollm2-135m`, `gemma3-270m`)."""
    weights: Literal["int8", "full"] = "int8"
    """`int8` quantises linear layers and experts row by row; `full` keeps the `dtype` below."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of activations and unquantised weights; `auto` is float32 on a CPU, bfloat16 on a GPU."""
    products: Literal["auto", "int8", "int8_forward", "exact"] = "auto"
    """How int8 layers multiply while tuning: `int8` quantises activations and gradients too, row by row; `int8_forward`
    activations only; `exact` neither; `auto` is int8 where every rank's hardware has instructions for it. Dev and test
    metrics are measured with the same products; the service uses exact ones."""
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where a rank's part of the weights waits between uses: on its device, in main memory (`cpu`, for GPUs), or in
    files under `offload_folder` (`nvme`). The system keeps as much of these files in memory as it has room for."""
    offload_folder: str | None = None
    """A folder on each node's own fast disk, for `offload: nvme`."""

    @model_validator(mode="after")
    def _offload_has_its_folder(self) -> "ModelSettings":
        if (self.offload == "nvme") != (self.offload_folder is not None):
            raise ValueError("offload 'nvme' and 'offload_folder' (a folder on a local disk) go together")
        return self


class ClusterSettings(SettingsModel):
    """Ranks, GPUs and memory."""

    num_workers: int = Field(1, ge=1, le=10_000)
    """Number of ranks. They share the rows of every step, and the model when it is partitioned."""
    partition: Literal["auto", "always", "never"] = "auto"
    """Whether ZeRO-3 partitions the model over the ranks. `auto` does so unless the model takes less than a quarter of
    every rank's free memory. A model that is whole on every rank need not be gathered. With `model.offload`, `auto`
    means `always`."""
    use_gpu: bool = False
    """Whether each rank takes one GPU."""
    address: Address | None = None
    """Ray address; without it RAY_ADDRESS is used, and without that a local Ray is started."""
    cpus_per_worker: int = Field(1, ge=1, le=10_000)
    """CPUs that each rank takes."""
    tokens_per_microbatch: int = Field(2048, ge=64, le=10**9)
    """Most prompt, input and target tokens, padding included, that one rank runs in one forward pass."""
    price_per_rank_hour: float | None = Field(None, ge=0)
    """The price of an hour of one rank, in your currency; the report then shows the cost of the run."""


class PromptSettings(SettingsModel):
    """The length of a prompt, and where it starts."""

    length: Tokens = 100
    """Vectors of the prompt."""
    init: Literal["random", "sampled_vocab", "class_labels", "text", "bank"] = "sampled_vocab"
    """Where the prompt starts: at random vectors, at embeddings of tokens drawn from the vocabulary, at embeddings of
    the labels (and drawn tokens behind them), at embeddings of your own words (`text`), or at a prompt of the bank
    (`source`)."""
    text: str | None = None
    """The words to start from, with `init: text`."""
    source: str | None = None
    """The prompt to start from, `name` or `name@version`, with `init: bank`; of several, `sst2+mr@3`, their mean."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The prompts of a bank whose mean this one starts from, with `init: bank`."""
        return parts(self.source or "")

    @model_validator(mode="after")
    def _init_has_its_source(self) -> "PromptSettings":
        if self.init == "text" and not self.text:
            raise ValueError("init 'text' needs the setting 'text': the words to start from")
        if self.init == "bank" and not all(self.sources):
            raise ValueError("init 'bank' needs the setting 'source': a prompt's name, such as sst2@latest, or sst2+mr")
        return self


class OptimizerSettings(SettingsModel):
    """How a prompt is updated."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    """Adafactor as in Lester et al. (2021), or AdamW."""
    lr: float = Field(0.3, gt=0)
    """The learning rate."""
    weight_decay: float = Field(1e-5, ge=0)
    """How strongly the prompt is drawn towards zero."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What the rate does after the warm-up: it stays, or it falls to 0 at `max_steps`."""
    warmup_steps: int = Field(0, ge=0, le=LARGEST)
    """Steps in which the rate rises to `lr`."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of this prompt's own gradient; without it, only Adafactor clips its updates."""


class HalvingSettings(SettingsModel):
    """Successive halving (Jamieson & Talwalkar 2016): of a sweep's trials that reach a rung, the best go on."""

    first: Count = 1
    """Evaluations of a trial before the first rung; each rung after it is `factor` times as far."""
    factor: int = Field(3, ge=2, le=LARGEST)
    """At each rung one trial in `factor` goes on, and never fewer than one."""


class Message(SettingsModel):
    """One message of a chat."""

    role: str = Field(min_length=1)
    """Who says it, as the model's chat template calls it: `system`, `user`, `assistant`."""
    content: str
    """Template of what is said; `{column}` stands for a column of the corpus."""


class TaskDefaults(SettingsModel):
    """What every task may set. The defaults are Lester et al. (2021), section 3 and appendix A."""

    input: str | Annotated[list[Message], Field(min_length=1)] = "{text}"
    """Template of the model's input; `{column}` stands for a column of the corpus. For a chat model also a list of
    messages, each with a `role` and a `content`, which is a template: the model's own chat template renders them, and
    the target is what the assistant says next."""
    target: str = "{label}"
    """Template of what the model should answer."""
    chat_options: dict[str, Any] = Field(default_factory=dict)
    """What the chat template is given besides the messages of `input`. `enable_thinking` is false unless it stands
    here, so that a thinking model writes an empty thought, and the target follows at once."""
    metric: Literal["accuracy", "exact_match", "f1", "rouge_l", "loss"] = "accuracy"
    """What chooses the best step and trial on dev. `accuracy` and `f1` are of labels, `exact_match` and `rouge_l` of
    decoded texts."""
    labels: list[str] | None = None
    """The label set for accuracy and f1; without it, the distinct targets of the train split."""
    prompt: PromptSettings = PromptSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    batch_size: int = Field(32, ge=1, le=10**7)
    """Rows that the task has in every step."""
    max_steps: Count = 30_000
    """Steps after which a trial ends."""
    eval_every: Count = 500
    """Steps between two evaluations on dev."""
    patience: Count | None = 10
    """Evaluations without a better dev metric after which a trial stops; null: it never stops early."""
    eval_rows: Count = 500
    """Most dev (and test) rows that an evaluation uses, a fixed random subset."""
    seed: Seed | None = None
    """The trial's own seed; without it `run.seed`."""
    dev_fraction: float | None = Field(None, gt=0, lt=1)
    """Share of the train rows held out as the dev split; the rows' content alone decides which."""
    separator: str = " "
    """Put between input and target for decoder-only models; a chat has none."""
    max_input_tokens: Tokens = 256
    """A row with a longer input is left out and counted."""
    max_target_tokens: Tokens = 64
    """A row with a longer target is left out and counted. Decoded answers are no longer than this."""
    max_bad_rows: float = Field(0.05, ge=0, le=1)
    """Largest share of null, empty and over-long rows that is dropped without refusing the task."""
    sweep: Sweep | None = None
    """Lists of values, such as `{prompt.length: [20, 100], optimizer.lr: [0.03, 0.1], seeds: 3}`: every combination is
    tuned as a trial of its own, and the one with the best dev metric is published (all of them: `bank.publish`).
    `seeds: 3` is short for `seed: [0, 1, 2]`."""
    halving: HalvingSettings | None = None
    """Stops hopeless trials of a sweep early; without it, every trial is tuned to its end."""

    def trials(self, name: str) -> dict[str, Self]:
        """The settings of every trial of the task of this name, by trial; one, of the task's name, without a sweep.

        Raises: ValueError naming the choice that is not valid, or is there twice.
        """
        if self.sweep is None:
            return {name: self}
        whole = self.model_dump(exclude={"sweep"})
        trials: dict[str, Self] = {}
        for choice in choices(self.sweep):
            try:
                trial = type(self).model_validate(apply_choice(whole, choice))
            except ValidationError as error:
                detail = error.errors()[0]
                wrong = f"{'.'.join(map(str, detail['loc']))}: {detail['msg'].removeprefix('Value error, ')}"
                raise ValueError(f"sweep: with {_written(choice)}, {wrong}") from error
            # After validation, because 1 and 1.0 are one learning rate.
            read = {key: attrgetter(key)(trial) for key in choice}
            if trial_name(name, read) in trials:
                raise ValueError(f"sweep: {_written(read)} is there twice; give each value once")
            trials[trial_name(name, read)] = trial
        return trials

    @model_validator(mode="after")
    def _sweep_is_valid(self) -> Self:
        if self.sweep is not None:
            count = count_choices(self.sweep)
            if count > MOST_TRIALS:
                raise ValueError(f"sweep: its lists make {count:,} trials, more than {MOST_TRIALS:,}; shorten them")
            self.trials("")
        return self

    @model_validator(mode="after")
    def _chat_is_the_templates(self) -> Self:
        taken = next((key for key in _OF_CHAT_TEMPLATES if key in self.chat_options), None)
        if taken is not None:
            raise ValueError(f"chat_options: '{taken}' is given to every chat template; leave it out")
        wrong = next(
            (key for key, value in self.chat_options.items() if not isinstance(value, str | int | float)), None
        )
        if wrong is not None:
            raise ValueError(f"chat_options: '{wrong}' must be a text, a number, true or false")
        if not isinstance(self.input, str) and self.input[-1].role == "assistant":
            raise ValueError("input: the last message is the assistant's, but the target is what it says; leave it out")
        return self

    @model_validator(mode="after")
    def _labels_are_a_choice(self) -> Self:
        if self.labels is not None:
            twice = next((label for at, label in enumerate(self.labels) if label in self.labels[:at]), None)
            if twice is not None:
                raise ValueError(f"labels: {twice!r} is there twice; give each label once")
            if len(self.labels) < 2:
                raise ValueError(
                    f"labels: {len(self.labels)} label(s) leave nothing to choose from; give two or more, or leave "
                    "'labels' out to take the targets of the train split"
                )
        return self


class TaskSettings(TaskDefaults):
    """A task by name: its corpora, and what it sets differently from `defaults`."""

    train: Paths
    """Parquet files: a path, folder, glob or object-store URI, or a list of them."""
    dev: Paths | None = None
    """The rows that choose the best step and trial; without them, `dev_fraction`."""
    test: Paths | None = None
    """Rows that are measured once, for the prompt that is published."""

    @model_validator(mode="after")
    def _one_dev_split(self) -> "TaskSettings":
        if (self.dev is None) == (self.dev_fraction is None):
            raise ValueError("give either 'dev' (a path) or 'dev_fraction' (a share of train), and not both")
        return self


class BankSettings(SettingsModel):
    """Where the prompts are published."""

    uri: Address = "./bank"
    """A folder, or an object store such as s3://bucket/prefix."""
    alias: Name = "latest"
    """The alias that moves to the new version."""
    trusted_keys: tuple[str, ...] = ()
    """Public keys (PEM files); versions that none of them signed are refused."""
    publish: Literal["best", "all"] = "best"
    """Of a task's sweep, the best prompt under the task's name; `all` publishes beside it every trial's, each under the
    trial's own name (`sst2.length-20.seed-1`), which a nightly refresh drops again."""
    not_learned: Literal["publish", "withhold"] = "publish"
    """What happens to a prompt that has not learned: its dev metric is not above that of always giving the train
    split's most frequent target, or not above that of the prompt that it started from (unless `init: bank`). It is
    published and marked as such, or withheld as if its task had failed; the job then ends with code 3 or 4."""
    signing_key: str | None = None
    """The private key (PEM file) that signs what this run publishes."""


class TrackingSettings(SettingsModel):
    """Tools that get a run's figures. None of them can stop the run. Ray's metrics have the figures always."""

    tensorboard: bool = False
    """Scalars for TensorBoard, in the run's folder (`tensorboard/`)."""
    mlflow: Address | None = None
    """The URI of an MLflow tracking server, which gets the run's scalars and how it ended. Its password, if it needs
    one, comes from MLFLOW_TRACKING_PASSWORD."""
    experiment: str = "promptbank"
    """The MLflow experiment that the runs belong to."""
    log: Literal["auto", "json"] = "auto"
    """What the job prints while it runs: bars or lines for people, or every event as a line of JSON."""


class RefreshSettings(SettingsModel):
    """What `jobs/refresh_prompts.py` does every night. Other jobs do not read it."""

    alpha: float = Field(0.05, gt=0, lt=1)
    """The level of the gate's paired test on tonight's dev rows: the largest share of equally good new prompts that it
    refuses by chance. A smaller level refuses less."""
    margin: float | None = Field(0.1, gt=0)
    """A new prompt whose dev metric is worse by more than this is refused even where the rows are too few for the test.
    For the metric `loss` it is a share of the old loss. Null leaves the decision to the test."""
    cold_side: bool = True
    """Whether a task that is tuned from the bank's prompt is also tuned from a fresh start, to compare the two."""
    min_refreshed: float = Field(0.5, ge=0, le=1)
    """The alias moves only if at least this share of the tasks that had to be tuned did not fail."""
    canaries: tuple[Name, ...] = ()
    """If one of these tasks fails or comes out worse, the alias stays where it is."""
    wait_for_lease: float = Field(0, ge=0, allow_inf_nan=True)
    """Seconds that a second night of the same `run.name` waits for the first to end before it gives up."""
    lease_expiry: float = Field(60, gt=0, le=MOST_SECONDS)
    """Seconds without a sign of life after which a night counts as dead and another may begin."""


class Settings(SettingsModel):
    """A settings file."""

    run: RunSettings = RunSettings()
    model: ModelSettings
    cluster: ClusterSettings = ClusterSettings()
    defaults: TaskDefaults = TaskDefaults()
    tasks: dict[Name, TaskSettings] = Field(min_length=1)
    bank: BankSettings = BankSettings()
    tracking: TrackingSettings = TrackingSettings()
    refresh: RefreshSettings = RefreshSettings()
    compare: CompareSettings = CompareSettings()

    @model_validator(mode="after")
    def _compared_are_tasks(self) -> Self:
        for where, name in self.compare.tasks_named():
            if name not in self.tasks:
                raise ValueError(f"compare.{where}: there is no task '{name}'; name tasks of this file")
        return self

    @model_validator(mode="after")
    def _canaries_are_tasks(self) -> Self:
        unknown = [name for name in self.refresh.canaries if name not in self.tasks]
        if unknown:
            raise ValueError(f"refresh.canaries: there is no task '{unknown[0]}'; name tasks of this file")
        return self

    @model_validator(mode="after")
    def _halving_can_act(self) -> Self:
        for name, task in self.tasks.items():
            if task.halving is None:
                continue
            if task.sweep is None:
                raise ValueError(f"task '{name}': halving is there to stop trials of a sweep; give a 'sweep', too")
            if task.halving.first * task.eval_every >= task.max_steps:
                raise ValueError(
                    f"task '{name}': halving.first {task.halving.first} x eval_every {task.eval_every} is not before "
                    f"max_steps {task.max_steps}, so that no trial would stop early; lower one of the first two"
                )
        return self

    @model_validator(mode="after")
    def _offload_has_a_use(self) -> "Settings":
        if self.model.offload == "cpu" and not self.cluster.use_gpu:
            raise ValueError("model.offload 'cpu' is for GPUs: without them weights are in main memory; use 'nvme'")
        alone = self.cluster.num_workers == 1 or self.cluster.partition == "never"
        if self.model.offload != "none" and self.cluster.use_gpu and alone:
            raise ValueError(
                "model.offload needs cluster.num_workers of 2 or more and no partition 'never': a single GPU holds the "
                "model whole"
            )
        return self

    @model_validator(mode="after")
    def _trials_names_differ(self) -> Self:
        owner: dict[str, str] = {}
        for name, task in self.tasks.items():
            for trial in task.trials(name):
                if trial in owner:
                    raise ValueError(
                        f"tasks '{owner[trial]}' and '{name}' both have a trial '{trial}'; rename one task"
                    )
                owner[trial] = name
        return self


def _written(choice: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in choice.items())
