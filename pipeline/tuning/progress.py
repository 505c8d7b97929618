"""What is tuned, and where every rank stands with it: the same numbers on each, so that all take the same decisions."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from pipeline.backbone.host import Backbone
from pipeline.corpus.reader import open_split
from pipeline.corpus.source_files import one_line
from pipeline.corpus.task_corpus import UNLABELLED, TaskCorpus
from pipeline.corpus.token_set import TokenSet
from pipeline.errors import CorpusError, StorageError
from pipeline.tuning.checkpoint import load_checkpoint, save_checkpoint
from pipeline.tuning.evaluate import Score, calibration_rows, eval_request, evaluate
from pipeline.tuning.initialise import embeddings_rms
from pipeline.tuning.ranks import rank, sum_over_ranks, world_size
from pipeline.tuning.run_log import RunLog
from pipeline.tuning.state import TrialState, winner
from pipeline.tuning.step import TrialStep
from pipeline.tuning.teaching import Teacher, TeacherKey, asked_at_labels, make_teacher, teacher_key
from pipeline.tuning.trials import Trial


@dataclass(frozen=True)
class TuningRun:
    """What is tuned, and where it is written down."""

    trials: Sequence[Trial]
    corpora: Mapping[str, TaskCorpus]
    """By task."""
    folder: Path
    """The run's own folder, seen by every rank."""
    max_live_trials: int
    checkpoint_every: int
    token_budget: int
    """Tokens that a rank runs at once (a micro-batch)."""
    warm_starts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Prompts `[Q, H]` from a bank, by trial, for `init: bank`."""


@dataclass
class Progress:
    """A run under way. Its methods are called by all ranks alike, unless they only look."""

    run: TuningRun
    backbone: Backbone
    tokenizer: Any
    run_log: RunLog
    step: int
    """Steps taken, over all attempts."""
    states: dict[str, TrialState]
    """Of the trials that have started, by name."""
    ended: dict[str, str] = field(default_factory=dict)
    """Digests of the files of ended trials, by trial (see `save_checkpoint`)."""
    splits: dict[tuple[str, str], TokenSet] = field(default_factory=dict)
    teachers: dict[TeacherKey, Teacher] = field(default_factory=dict)
    """Of the trials that took the last step."""

    def split(self, trial: Trial, name: str) -> TokenSet:
        task = trial.task
        limit = None if name in ("train", UNLABELLED) else trial.settings.eval_rows
        if (task, name) not in self.splits:
            corpus = self.run.corpora[task]
            rows = open_split(corpus.splits[name], limit)
            if name == UNLABELLED:
                assert corpus.labels is not None and corpus.label_ids is not None
                rows = asked_at_labels(rows, corpus.labels, corpus.label_ids)
            self.splits[task, name] = rows
        return self.splits[task, name]

    def work_of(self, states: Sequence[TrialState]) -> list[TrialStep]:
        """The next step of these trials."""
        work = []
        for state, teacher in zip(states, self.teachers_of(states), strict=True):
            trial, has_more = state.trial, UNLABELLED in self.run.corpora[state.trial.task].splits
            train, more = self.split(trial, "train"), self.split(trial, UNLABELLED) if has_more else None
            work.append(TrialStep(trial, state.prompt, state.step, train, teacher, more))
        return work

    def teachers_of(self, states: Sequence[TrialState]) -> list[Teacher | None]:
        """What teaches each trial's prompt beside the labels. Teachers of other trials are let go."""
        before, self.teachers = self.teachers, {}
        keys = [teacher_key(state.trial) for state in states]
        for key, state in zip(keys, states, strict=True):
            if key is not None and key not in self.teachers:
                split = self.split(state.trial, "train")
                made = before.get(key) or make_teacher(state.trial, self.backbone, self.tokenizer, split)
                self.teachers[key] = made
        return [None if key is None else self.teachers[key] for key in keys]

    @cached_property
    def embeddings_rms(self) -> float:
        """RMS of the model's embeddings; every rank must ask for it."""
        return embeddings_rms(self.backbone, self.tokenizer)

    def live(self) -> list[TrialState]:
        return [state for state in self.states.values() if state.status == "live"]

    def due(self) -> list[TrialState]:
        """The live trials whose dev metric is to be measured before they go on."""
        return [state for state in self.live() if state.due]

    def waiting(self) -> list[Trial]:
        return [trial for trial in self.run.trials if trial.name not in self.states]

    def sweeps(self) -> list[list[Trial]]:
        """Every task's trials."""
        of_task: dict[str, list[Trial]] = {}
        for trial in self.run.trials:
            of_task.setdefault(trial.task, []).append(trial)
        return list(of_task.values())

    def measure(self, states: Sequence[TrialState]) -> None:
        """Measure the trials' prompts on dev; each keeps its best one, and may end or pause here."""
        for state, score in zip(states, self._scores(states, "dev"), strict=True):
            state.judge(score)
            self.run_log.evaluated(state)
        self.run_log.paused()

    def save(self) -> None:
        """Write a checkpoint, in which every finished task has its test metric. Raises: StorageError."""
        self._test_winners()  # first: a run killed after its last checkpoint is published as that one has it
        if rank() == 0:
            save_checkpoint(self.run.folder / "checkpoints", self.step, self.states.values(), self.ended)

    def drop_unreadable(self, states: Sequence[TrialState]) -> None:
        """End the trials whose token shards a rank cannot read any more; the others must not stop for them."""
        unreadable = self.unreadable([state.trial for state in states])
        for state in states:
            if state.trial.name in unreadable:
                state.lose(unreadable[state.trial.name])
                self.run_log.finished(state)

    def unreadable(self, trials: Sequence[Trial]) -> dict[str, str]:
        """By trial, why its token shards cannot be read by every rank."""
        lost, reason = torch.zeros(len(trials), device=self.backbone.device), ""
        for place, trial in enumerate(trials):
            try:
                corpus = self.run.corpora[trial.task]
                for split in corpus.splits:
                    self.split(trial, split)
                if trial.settings.calibrate:
                    calibration_rows(corpus.splits["train"])
            except (CorpusError, OSError, ValueError) as error:
                lost[place], reason = 1.0, f" ({one_line(error)})"
        if len(trials):
            sum_over_ranks(lost)
        sentence = f"its token shards could not be read{reason}; a run of another run.name makes them anew"
        return {trial.name: sentence for trial in itertools.compress(trials, lost.tolist())}

    def _test_winners(self) -> None:
        """Measure the prompt that a finished task publishes, and no other, on the test split."""
        of_task = [[self.states.get(trial.name) for trial in trials] for trials in self.sweeps()]
        winners = [winner(states) for states in of_task if all(state and state.ended for state in states)]
        corpora = self.run.corpora
        untested = [s for s in winners if s is not None and s.test is None and "test" in corpora[s.trial.task].splits]
        for state, score in zip(untested, self._scores(untested, "test"), strict=True):
            state.test = score

    def _scores(self, states: Sequence[TrialState], split: Literal["dev", "test"]) -> list[Score]:
        """Scores of the current prompts on dev, or of the best ones on test."""
        if not states:
            return []
        requests = []
        for state in states:
            # The best prompt is tested with the offsets that it was measured with on dev, and is published with.
            prompt, offsets = (state.best, state.label_offsets) if split == "test" else (state.prompt, None)
            corpus = self.run.corpora[state.trial.task]
            requests.append(eval_request(state.trial.settings, prompt, self.split(state.trial, split), corpus, offsets))
        return evaluate(self.backbone, self.tokenizer, requests, self.run.token_budget)


def resume(run: TuningRun, backbone: Backbone, tokenizer: Any) -> Progress:
    """Where the run's newest checkpoint stands, or its start.

    Raises: StorageError when ranks see different checkpoints.
    """
    run_log = RunLog(run.folder, silent=rank() != 0)
    checkpoint = load_checkpoint(run.folder / "checkpoints")
    found = [checkpoint.state_of(trial, backbone.device) for trial in run.trials] if checkpoint else []
    states = {state.trial.name: state for state in found if state is not None}
    # Counted on, even where no trial can be taken up again: a newer checkpoint has the higher step.
    step = checkpoint.step if checkpoint else 0
    seen = torch.zeros(world_size(), 2, device=backbone.device)
    seen[rank()] = torch.tensor([step, len(states)], dtype=seen.dtype)
    if len(sum_over_ranks(seen).unique(dim=0)) > 1:
        raise StorageError(f"ranks see different checkpoints in {run.folder}; run.storage must be one shared folder")
    if states:
        run_log.resumed(step, list(states.values()))
    ended = {name: digest for name, digest in checkpoint.ended.items() if name in states} if checkpoint else {}
    progress = Progress(run, backbone, tokenizer, run_log, step, states, ended)
    progress.drop_unreadable([state for state in states.values() if not state.ended])
    return progress
