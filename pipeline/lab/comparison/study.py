"""A comparison under way: what all of its phases share, and how one of them is put to the ranks.

Every phase has a folder of its own in the run's folder, which is that of an ordinary run: events, checkpoints, pages.
"""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import SettingsError, TuningError
from pipeline.lab.comparison.questions import Split
from pipeline.reporting.events import EventLog, telling_why
from pipeline.run.checks import CheckedRun
from pipeline.run.tracking import followed
from pipeline.settings import BankSettings, Settings, TaskSettings, changed_settings
from pipeline.tuning.connection import Connect
from pipeline.tuning.launch import launch
from pipeline.tuning.loop import tune_on_rank
from pipeline.tuning.rank_job import RankJob


class PhaseJob(Protocol):
    """What the ranks are sent of a phase that tunes no prompts: a frozen dataclass of plain values."""

    @property
    def run_folder(self) -> str: ...

    def carry_out(self, device: torch.device, node_leaves: Callable[[], bool]) -> None:
        """On a rank. `node_leaves` is that of `StopSignal`."""


@dataclass(frozen=True)
class Study:
    checked: CheckedRun
    """With the comparison's own settings (`compared_settings`)."""
    folder: Path
    corpora: Mapping[str, TaskCorpus]
    """By task, test splits included: never given to ranks that tune (`seen_while_tuning`)."""
    console: Console
    connect: Connect

    @property
    def settings(self) -> Settings:
        return self.checked.settings

    @property
    def metrics(self) -> dict[str, str]:
        return {task: self.settings.tasks[task].metric for task in self.corpora}

    @property
    def model_folder(self) -> Path:
        """Config and tokenizer, for every rank."""
        return self.folder / "model"

    def rows(self, task: str, split: Split) -> int | None:
        """How many rows of a split are answered at most; None: all."""
        return self.settings.tasks[task].eval_rows if split == "dev" else self.settings.compare.test_rows

    def deciding(self, task: str) -> tuple[str, str]:
        """What answers to a task's rows depend on beside question and model: the rows, and how they count."""
        corpus, own = self.corpora[task], self.settings.tasks[task]
        # Of which rows are usable, and how they are put, the corpus' digest says nothing.
        rows = f"{corpus.counts} {own.max_input_tokens} {own.max_target_tokens} {own.separator!r}"
        return corpus.digest, f"{rows} {corpus.labels} {own.metric} {self.settings.model.dtype}"

    @contextmanager
    def phase(self, name: str) -> Iterator[tuple[Path, EventLog]]:
        """A phase's folder and event log; what happens within is shown while it does."""
        folder = self.folder / name
        with EventLog(folder / "events.jsonl") as log, telling_why(log), followed(self.settings, folder, self.console):
            yield folder, log

    def on_ranks(self, job: RankJob | PhaseJob, log: EventLog) -> None:
        """Raises: the PromptBankError that a rank ended with; TuningError when ranks were lost too often."""
        self.connect()
        work = partial(tune_on_rank, job) if isinstance(job, RankJob) else job.carry_out
        launch(work, Path(job.run_folder), self.settings.cluster, self.settings.run, log)

    def told_to_stop(self, phase: str) -> TuningError:
        """For a phase whose ranks ended before it was done."""
        name = self.settings.run.name
        return TuningError(f"comparison '{name}' was told to stop in its phase '{phase}'; start it again to go on")


def seen_while_tuning(corpora: Mapping[str, TaskCorpus]) -> dict[str, TaskCorpus]:
    """The corpora without their test splits: nothing that is tuned or chosen can depend on what it is not given."""
    return {
        task: replace(corpus, splits={name: ref for name, ref in corpus.splits.items() if name != "test"})
        for task, corpus in corpora.items()
    }


def compared_settings(settings: Settings) -> Settings:
    """The settings with the comparison's seeds in every sweep that names none, and every trial tuned to its end.

    Raises: SettingsError when a method is asked for that is not installed, or there would be too many trials.
    """
    if settings.compare.lora is not None and importlib.util.find_spec("peft") is None:
        raise SettingsError("compare.lora: PEFT is not installed; pip install 'promptbank[compare]', or set it to null")
    tasks = {name: _with_seeds(task, settings.compare.seeds) for name, task in settings.tasks.items()}
    plain = {name: task.model_dump(mode="json") for name, task in tasks.items()}
    try:
        return changed_settings(settings, tasks=plain)
    except SettingsError as error:
        raise SettingsError(f"with compare.seeds {settings.compare.seeds}: {error}") from error


def with_own_bank(settings: Settings, folder: Path) -> Settings:
    """A comparison publishes into a bank in its own folder: every trial's prompt, under the trial's name."""
    bank = {"uri": str(folder / "bank"), "publish": "all", "alias": "latest"}
    return settings.model_copy(update={"bank": BankSettings.model_validate(bank)})


def _with_seeds(task: TaskSettings, seeds: int) -> TaskSettings:
    # A mean over seeds of which halving stopped some is a mean of unlike things.
    whole = task.model_copy(update={"halving": None})
    if task.seed is not None or "seed" in (task.sweep or {}):
        return whole
    return whole.model_copy(update={"sweep": {**(task.sweep or {}), "seed": list(range(seeds))}})
