"""What a task may set: its prompt, how that is trained and measured, and its corpora."""

import math
from collections.abc import Mapping
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from pipeline.settings.comparing import parts
from pipeline.settings.corpora import Split
from pipeline.settings.fields import LARGEST, Count, Seed, SettingsModel, Tokens
from pipeline.settings.recipes import RECIPES, Recipe, laid_over
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


class PromptSettings(SettingsModel):
    """The length of a prompt, where it starts, and what of it is trained."""

    length: Tokens = 100
    """Vectors of the prompt."""
    init: Literal["random", "sampled_vocab", "class_labels", "text", "examples", "bank"] = "sampled_vocab"
    """Where the prompt starts: at random vectors of the size of the model's embeddings, at embeddings of tokens drawn
    from the vocabulary, at embeddings of the labels (and drawn tokens behind them), at embeddings of your own words
    (`text`), at those of solved train rows (`examples`), or at a prompt of the bank (`source`)."""
    text: str | None = None
    """The words to start from, with `init: text`: repeated to the prompt's length, or, where they have more tokens,
    each vector is the mean of several."""
    starts: int = Field(1, ge=1, le=100)
    """How many starts are drawn; the one with the lowest loss on a few dev rows is taken. `text` and `bank` draw
    nothing, and have one."""
    source: str | None = None
    """The prompt to start from, `name` or `name@version`, with `init: bank`; of several, `sst2+mr@3`, their mean."""
    parameters: Literal["direct", "residual", "mlp", "superposition", "low_rank"] = "direct"
    """What is trained: the prompt itself (`direct`), or parameters from which it is computed. `residual`: vectors, and
    a small network whose output is added to them. `mlp`: P-tuning's encoder. `superposition`: each vector as a mix of
    vocabulary embeddings. `low_rank`: a change of low rank. All start at `init`, and only the prompt is published."""
    width: Count | None = None
    """How wide these parameters are: the hidden layer of `residual` and `mlp` (null: 128), the vocabulary embeddings of
    `superposition` (null: 128), or the rank of `low_rank` (null: 8). A direct prompt has no width."""

    @property
    def draws(self) -> int:
        """Starts that are drawn."""
        return 1 if self.init in ("text", "bank") else self.starts

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


def _rate_or_auto(value: Any) -> Any:
    # One sentence, where pydantic would have one for each type that the value is not.
    if value == "auto":
        return value
    try:
        rate = float(value)
    except (TypeError, ValueError):
        rate = math.nan
    if isinstance(value, bool) or not (0 < rate < math.inf):
        raise ValueError("Input should be a number greater than 0, or auto")
    return rate


Rate = Annotated[
    float | Literal["auto"],
    BeforeValidator(_rate_or_auto, json_schema_input_type=Annotated[float, Field(gt=0)] | Literal["auto"]),
]


class OptimizerSettings(SettingsModel):
    """How a prompt is updated."""

    name: Literal["adafactor", "adamw"] = "adafactor"
    """Adafactor as in Lester et al. (2021), or AdamW."""
    lr: Rate = "auto"
    """The learning rate: about how far a step moves an entry of the prompt. `auto` is 0.3 times the RMS of the model's
    embeddings."""
    weight_decay: float = Field(1e-5, ge=0)
    """How strongly the prompt, or what is trained in its place, is drawn towards zero."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What the rate does after the warm-up: it stays, or it falls to 0 at `max_steps`."""
    warmup_steps: int = Field(0, ge=0, le=LARGEST)
    """Steps in which the rate rises to `lr`."""
    clip_norm: float | None = Field(None, gt=0)
    """Largest norm of this prompt's own gradient; without it, only Adafactor clips its updates."""

    @property
    def rate(self) -> float:
        """The learning rate, where it is a number."""
        assert isinstance(self.lr, float | int)
        return self.lr


class HalvingSettings(SettingsModel):
    """Successive halving (Jamieson & Talwalkar 2016): of a sweep's trials that reach a rung, the best go on."""

    first: Count = 1
    """Evaluations of a trial before the first rung; each rung after it is `factor` times as far."""
    factor: int = Field(3, ge=2, le=LARGEST)
    """At each rung one trial in `factor` goes on, and never fewer than one."""


class TeacherSettings(SettingsModel):
    """Words that a prompt is to stand for: behind them, the frozen model itself is the prompt's teacher."""

    text: str | None = Field(None, min_length=1)
    """The words: a long instruction, or a document."""
    text_file: str | None = None
    """A text file with the words, in place of `text`; it is read when the settings are."""
    examples: Count | None = None
    """So many solved rows of train, drawn by the trial's seed; they stand behind `text`, where there is one."""
    between: str = "\n\n"
    """Put between the text, the solved rows and the row itself."""
    weight: float = Field(0.5, gt=0, le=1)
    """The teacher's share of the loss; the labels have the rest. With 1, they only say where the teacher is asked."""
    unlabelled: Split | None = None
    """Rows without targets, in Parquet files or whatever `train` may be, which have the columns of `input`: the teacher
    teaches by them, too, and half of every step's rows are theirs. For tasks with a label set."""

    @model_validator(mode="before")
    @classmethod
    def _read_text_file(cls, given: Any) -> Any:
        # Every rank validates settings anew, and the words decide the prompt: so they are read once, and here.
        if not isinstance(given, dict) or not isinstance(path := given.get("text_file"), str):
            return given
        if given.get("text") is not None:
            raise ValueError("give either 'text' or 'text_file', and not both")
        try:
            words = Path(path).expanduser().read_text(encoding="utf-8")
            if not words:
                raise ValueError("it is empty")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or (
                "it is not UTF-8" if isinstance(error, UnicodeError) else error
            )
            raise ValueError(f"text_file {path}: cannot be read: {reason}") from error
        return {**given, "text_file": None, "text": words}

    @model_validator(mode="after")
    def _has_words(self) -> Self:
        if self.text is None and self.examples is None:
            raise ValueError("a teacher needs 'text', 'text_file' or 'examples': the words that it stands behind")
        return self


class Message(SettingsModel):
    """One message of a chat."""

    role: str = Field(min_length=1)
    """Who says it, as the model's chat template calls it: `system`, `user`, `assistant`."""
    content: str
    """Template of what is said; `{column}` stands for a column of the corpus."""


class TaskDefaults(SettingsModel):
    """What every task may set. The defaults learn on models of any family without a sweep (docs/quality.md); those of
    the paper are `recipe: lester2021`."""

    recipe: Recipe | None = None
    """A paper's choices, which take the place of the defaults; what `defaults` or a task sets itself wins.
    `lester2021`: length 100 from class labels, Adafactor at a constant 0.3 with weight decay 1e-5, 30,000 steps of 32
    rows."""
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
    label_score: Literal["sum", "mean"] = "sum"
    """What labels are compared by: the log-likelihood of all of a label's tokens, or its mean over them, which does not
    favour short labels. It is recorded with the prompt, and a service scores by it."""
    calibrate: bool = False
    """Take each label's prior off its score (Zhao et al. 2021): the log of its mean probability over the inputs of 100
    train rows, measured anew at every evaluation. The prior behind the published prompt is recorded, and a service
    takes it off. For `accuracy` and `f1` where every label should be answered about equally often; on skewed rows
    accuracy may fall."""
    balance: bool = False
    """Every step takes as many rows of one label as of any other, however rare it is in the train split. For skewed
    labels, with the metric `f1`."""
    prompt: PromptSettings = PromptSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    teacher: TeacherSettings | None = None
    """Words that the prompt is to stand for (context distillation): an instruction, a document, or solved rows."""
    batch_size: int = Field(32, ge=1, le=10**7)
    """Rows that the task has in every step."""
    max_steps: Count = 1_000
    """Steps after which a trial ends."""
    eval_every: Count = 100
    """Steps between two evaluations on dev."""
    patience: Count | None = 5
    """Evaluations without a better dev metric after which a trial stops. Two are enough where the dev loss is far above
    that of the start. Null: it never stops early."""
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

    @model_validator(mode="before")
    @classmethod
    def _recipe_fills_in(cls, written: Any) -> Any:
        if isinstance(written, dict) and written.get("recipe") in get_args(Recipe):
            return laid_over(RECIPES[written["recipe"]], written)
        return written

    @model_validator(mode="after")
    def _sweep_is_valid(self) -> Self:
        if self.sweep is not None:
            if "teacher.weight" in self.sweep and self.teacher is None:
                raise ValueError("sweep: teacher.weight: there is no teacher; set 'teacher' too")
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
    def _teacher_is_of_texts(self) -> Self:
        if self.teacher is not None and not isinstance(self.input, str):
            raise ValueError(
                "teacher: its words stand before a text, but the input is a chat; write the input as one text"
            )
        return self

    @model_validator(mode="after")
    def _unlabelled_rows_have_a_place(self) -> Self:
        if self.teacher is None or self.teacher.unlabelled is None:
            return self
        if self.metric not in ("accuracy", "f1") and self.labels is None:
            raise ValueError(
                f"teacher.unlabelled: the teacher is asked at a label, and with the metric '{self.metric}' targets are "
                "open texts; leave 'unlabelled' out, or give 'labels'"
            )
        if self.batch_size < 2:
            raise ValueError("teacher.unlabelled: half of a step's rows are unlabelled; set batch_size to 2 or more")
        return self

    @model_validator(mode="after")
    def _targets_are_labels_where_they_must_be(self) -> Self:
        labelled = self.metric in ("accuracy", "f1")
        if self.calibrate and not labelled:
            raise ValueError(
                f"calibrate: the metric '{self.metric}' compares no labels; leave 'calibrate' out, or measure by "
                "accuracy or f1"
            )
        if self.balance and not labelled and self.labels is None:
            raise ValueError(
                f"balance: with the metric '{self.metric}' targets are open texts, which have no equal shares; leave "
                "'balance' out, or give 'labels'"
            )
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

    train: Split
    """Parquet files: a path, folder, glob or object-store URI, or a list of them. Also a table (`delta:///path@12`,
    `iceberg://catalog/namespace.table`, `lance://path@3`), JSON lines or CSV, a dataset of the hub, or a mapping with
    `path` and what to take of it (docs/corpora.md)."""
    dev: Split | None = None
    """The rows that choose the best step and trial; without them, `dev_fraction`."""
    test: Split | None = None
    """Rows that are measured once, for the prompt that is published."""

    @model_validator(mode="after")
    def _one_dev_split(self) -> "TaskSettings":
        if (self.dev is None) == (self.dev_fraction is None):
            raise ValueError("give either 'dev' (a path) or 'dev_fraction' (a share of train), and not both")
        return self


def _written(choice: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in choice.items())
