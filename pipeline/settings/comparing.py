"""The settings of `jobs/compare_methods.py`, which the other jobs ignore."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from pipeline.settings.fields import LARGEST, Count, Name, SettingsModel
from pipeline.settings.sweeps import SweptKey

PANEL_KEYS = tuple(key for key in get_args(SweptKey) if key != "seed")


def _each(value: Any) -> Any:
    return value if isinstance(value, list | tuple) else [value]


def _each_once(values: tuple[Any, ...]) -> tuple[Any, ...]:
    twice = next((value for place, value in enumerate(values) if value in values[:place]), None)
    if twice is not None:
        raise ValueError(f"{twice} is there twice; give each value once")
    return values


Once = AfterValidator(_each_once)
"""Refuses a value that is given twice, because it would count as two seeds."""
Rates = Annotated[
    tuple[Annotated[float, Field(gt=0)], ...],
    Field(min_length=1),
    Once,
    BeforeValidator(_each, json_schema_input_type=float | list[float]),
]


class InstructionSearchSettings(SettingsModel):
    """A search over instructions by GEPA (Agrawal et al. 2025). The frozen model itself writes them."""

    rows: Count = 64
    """Train rows that an instruction is judged on."""
    answers: Count = 400
    """Rows answered in a search, over all instructions. A search ends when it has reached this number."""
    shown: int = Field(3, ge=1, le=100)
    """Train rows, with the model's answers and the right ones, that a new instruction is written from."""
    max_tokens: Count = 128
    """Most tokens of a new instruction."""


class HardPromptSettings(SettingsModel):
    """Prompts of words: what people write instead of tuning."""

    zero_shot: bool = True
    """The task's own text, or nothing where it has none, before the row."""
    shots: Annotated[tuple[Annotated[int, Field(ge=1, le=1_000_000)], ...], Once] = (4,)
    """Numbers of solved train rows, drawn by the seed, that stand between the text and the row."""
    draw: Literal["random", "balanced"] = "random"
    """How solved rows are drawn: from all of train, or in turn from the rows of each target, as people choose them."""
    text: dict[Name, str | Annotated[tuple[str, ...], Field(min_length=1), Once]] = Field(default_factory=dict)
    """By task, the words that stand before everything, as you would write them; of a list, each text is a choice."""
    between: str = "\n\n"
    """Put between the text, the solved rows and the row itself."""
    search: InstructionSearchSettings | None = None
    """A search for better words, for every task and seed. It begins with the task's first text, or with its labels.
    Null: no search."""


class TrainingSettings(SettingsModel):
    """How a method that changes weights is trained; what is null is as the task's prompts have it."""

    lr: Rates
    """A learning rate, or a list of them: each is a choice, and the best is found on dev."""
    weight_decay: float = Field(0.0, ge=0)
    """How strongly weights are drawn towards zero."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the rate does after the warm-up: it stays, or it falls to 0 at `max_steps`."""
    warmup_steps: int = Field(0, ge=0, le=LARGEST)
    """Steps in which the rate rises."""
    batch_size: int | None = Field(None, ge=1, le=10**7)
    """Rows of a step; null: as the task has it."""
    max_steps: Count | None = None
    """Steps of a training; null: as the task has it."""
    eval_every: Count | None = None
    """Steps between two evaluations on dev; null: as the task has it."""
    tasks: tuple[Name, ...] | None = None
    """Only these tasks; null: every task."""


class LoraSettings(TrainingSettings):
    """Low-rank adapters (Hu et al. 2021) of the model in float, by PEFT."""

    lr: Rates = (1e-3,)
    """A learning rate, or a list of them: each is a choice, and the best is found on dev."""
    rank: int = Field(8, ge=1, le=1_000_000)
    """Rank of the adapters."""
    alpha: Count = 16
    """The adapters' product is scaled by `alpha / rank`."""
    targets: tuple[str, ...] | Literal["all-linear"] | None = None
    """Names of the layers that get an adapter; null: PEFT's own choice for the model's family."""


class FineTuningSettings(TrainingSettings):
    """All of the model's weights, partitioned over the ranks by ZeRO-3 (Lester et al. 2021: model tuning)."""

    lr: Rates = (3e-5,)
    """A learning rate, or a list of them: each is a choice, and the best is found on dev."""
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    """PyTorch's AdamW, or Adafactor relative to each parameter's size."""
    checkpoint_every: Count = 500
    """Steps between checkpoints; one takes as much room as the weights and their optimizer."""
    keep_models: bool = False
    """Whether the tuned models stay in the run's folder after evaluation; each is as large as the model."""


class TransferSettings(SettingsModel):
    """What a prompt of one task is worth to another (SPoT, Vu et al. 2022)."""

    matrix: bool = True
    """Evaluate every task's best prompt on every task, and measure how similar the prompts are."""
    starts: dict[Name, Annotated[tuple[str, ...], Once]] = Field(default_factory=dict)
    """By task, prompts of other tasks to start its own from: a task's name, or several as in `sst2+mr`, their mean.
    Everything else is as in the task's best choice."""


class CompareSettings(SettingsModel):
    """What `jobs/compare_methods.py` compares. Other jobs do not read it."""

    seeds: int = Field(3, ge=1, le=100)
    """Seeds 0 to n - 1 for every method, and for prompts where neither a task nor its sweep names a seed."""
    test_rows: Count | None = None
    """Most test rows to answer, a fixed random subset; null: all. Dev rows are `eval_rows`, as in tuning."""
    hard_prompts: HardPromptSettings | None = HardPromptSettings()
    """Null leaves the method out."""
    lora: LoraSettings | None = None
    """Null leaves the method out."""
    fine_tuning: FineTuningSettings | None = None
    """Null leaves the method out."""
    ensembles: bool = True
    """Whether the seeds of a task's best choice also answer together (Lester et al. 2021, section 6)."""
    transfer: TransferSettings | None = None
    """Null leaves the questions out."""
    domain_shift: dict[Name, Annotated[tuple[Name, ...], Once]] = Field(default_factory=dict)
    """By task, other tasks with the same labels; its prompts also answer their test rows: `{sst2: [mr, cr]}`."""
    panels: Annotated[tuple[SweptKey, ...], Once] = ()
    """Swept keys to draw the test metric over, each with the best of the others: `[prompt.length, prompt.init]`."""

    @model_validator(mode="after")
    def _panels_are_of_prompts(self) -> Self:
        if not set(self.panels) <= set(PANEL_KEYS):
            raise ValueError("panels: a seed is no choice; its spread is shown in every panel")
        return self

    @model_validator(mode="after")
    def _shifts_are_to_other_tasks(self) -> Self:
        for task, others in self.domain_shift.items():
            if task in others:
                raise ValueError(f"domain_shift.{task}: name other tasks; {task} itself is always tested")
        return self

    def tasks_named(self) -> Sequence[tuple[str, str]]:
        """(where, task) of every task that these settings name."""
        named = [("hard_prompts.text", task) for task in (self.hard_prompts.text if self.hard_prompts else ())]
        for where, method in (("lora", self.lora), ("fine_tuning", self.fine_tuning)):
            named += [(f"{where}.tasks", task) for task in (method.tasks or () if method else ())]
        for task, starts in (self.transfer.starts if self.transfer else {}).items():
            sources = [name for start in starts for name in parts(start)]
            named += [("transfer.starts", name) for name in (task, *sources)]
        for task, others in self.domain_shift.items():
            named += [("domain_shift", name) for name in (task, *others)]
        return named


def parts(start: str) -> tuple[str, ...]:
    """The prompts whose mean a start such as `sst2+mr` is."""
    return tuple(part.strip() for part in start.split("+"))
