"""A comparison under way: what all of its phases share, and how a phase runs on the ranks.

Every phase has a folder of its own in the run's folder, with the files of an ordinary run: events, checkpoints, pages.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from rich.console import Console

from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import TuningError
from pipeline.lab.comparison.questions import Split
from pipeline.reporting.events import EventLog, telling_why
from pipeline.run.checks import CheckedRun
from pipeline.run.tracking import followed
from pipeline.settings import Settings
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
    """With the comparison's own settings (`comparison_settings`)."""
    folder: Path
    corpora: Mapping[str, TaskCorpus]
    """By task, test splits included; ranks that tune get them without (`without_test_splits`)."""
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
        """How many rows of a split are answered at most; None for all."""
        return self.settings.tasks[task].eval_rows if split == "dev" else self.settings.compare.test_rows

    def deciding(self, task: str) -> tuple[str, str]:
        """What answers to a task's rows depend on, beside question and model: the rows, and how they count."""
        corpus, own = self.corpora[task], self.settings.tasks[task]
        # The corpus' digest does not cover which rows are usable and how they are separated from targets.
        rows = f"{corpus.counts} {own.max_input_tokens} {own.max_target_tokens} {own.separator!r}"
        scored = "" if own.label_score == "sum" and not own.calibrate else f" {own.label_score} {own.calibrate}"
        return corpus.digest, f"{rows} {corpus.labels} {own.metric} {self.settings.model.dtype}{scored}"

    @contextmanager
    def phase(self, name: str) -> Iterator[tuple[Path, EventLog]]:
        """A phase's folder and event log; its events are shown while they happen."""
        folder = self.folder / name
        with EventLog(folder / "events.jsonl") as log, telling_why(log), followed(self.settings, folder, self.console):
            yield folder, log

    def run_on_ranks(self, job: RankJob | PhaseJob, log: EventLog) -> None:
        """Raises: the PromptBankError that a rank ended with; TuningError when ranks were lost too often."""
        self.connect()
        work = partial(tune_on_rank, job) if isinstance(job, RankJob) else job.carry_out
        launch(work, Path(job.run_folder), self.settings.cluster, self.settings.run, log)

    def told_to_stop(self, phase: str) -> TuningError:
        """The error for a phase whose ranks ended before it was done."""
        name = self.settings.run.name
        return TuningError(f"comparison '{name}' was told to stop in its phase '{phase}'; start it again to resume")


def without_test_splits(corpora: Mapping[str, TaskCorpus]) -> dict[str, TaskCorpus]:
    """The corpora without their test splits, so that nothing that is tuned or chosen can depend on them."""
    return {
        task: replace(corpus, splits={name: ref for name, ref in corpus.splits.items() if name != "test"})
        for task, corpus in corpora.items()
    }
