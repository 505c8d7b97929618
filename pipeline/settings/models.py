"""The settings of a run, key by key; the docstring below a key says what it means."""

from typing import Literal, Self

from pydantic import Field, model_validator

from pipeline.settings.comparing import CompareSettings
from pipeline.settings.corpora import CatalogSettings
from pipeline.settings.fields import Address, Count, Name, Seed, SettingsModel
from pipeline.settings.tasks import TaskDefaults, TaskSettings

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
    metrics are measured with the same products; a service has a setting of its own."""
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
    """Most prompt, input and target tokens, padding included, that one rank runs in one forward pass. On a CPU that
    holds the model whole, a pass has about a thousand at most, or a trial's rows: larger ones gain nothing there."""
    price_per_rank_hour: float | None = Field(None, ge=0)
    """The price of an hour of one rank, in your currency; the report then shows the cost of the run."""


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
    catalogs: dict[Name, CatalogSettings] = Field(default_factory=dict)
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
