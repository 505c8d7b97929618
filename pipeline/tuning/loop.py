"""The tuning of many trials on one backbone: slots are filled, stepped, evaluated and freed again.

Every rank runs this loop over the same numbers, and so takes the same decisions.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.backbone.host import Backbone
from pipeline.corpus.files import one_line
from pipeline.corpus.reader import TokenSet, open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import CorpusError, StorageError
from pipeline.tuning.checkpoint import load_checkpoint, save_checkpoint
from pipeline.tuning.evaluate import eval_request, evaluate
from pipeline.tuning.halving import SweepTrial, ranking, rungs, verdicts
from pipeline.tuning.initialise import initial_prompt
from pipeline.tuning.optimise import update
from pipeline.tuning.ranks import rank, sum_over_ranks, world_size
from pipeline.tuning.run_log import RunLog
from pipeline.tuning.state import TrialState, start, winner
from pipeline.tuning.step import TrialStep, losses_and_gradients
from pipeline.tuning.stop_signal import StopSignal
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
    warm_starts: Mapping[str, np.ndarray] = field(default_factory=dict)
    """Prompts `[Q, H]` from a bank, by trial, for `init: bank`."""


@dataclass
class _Progress:
    run: TuningRun
    backbone: Backbone
    tokenizer: Any
    journal: RunLog
    step: int
    states: dict[str, TrialState]
    splits: dict[tuple[str, str], TokenSet] = field(default_factory=dict)

    def split(self, state: TrialState, name: str) -> TokenSet:
        task = state.trial.task
        limit = None if name == "train" else state.trial.settings.eval_rows
        if (task, name) not in self.splits:
            self.splits[task, name] = open_split(self.run.corpora[task].splits[name], limit)
        return self.splits[task, name]

    def live(self) -> list[TrialState]:
        return [state for state in self.states.values() if state.status == "live"]

    def due(self) -> list[TrialState]:
        return [state for state in self.live() if state.due]

    def waiting(self) -> list[Trial]:
        return [trial for trial in self.run.trials if trial.name not in self.states]

    def sweeps(self) -> list[list[Trial]]:
        """Every task's trials."""
        of_task: dict[str, list[Trial]] = {}
        for trial in self.run.trials:
            of_task.setdefault(trial.task, []).append(trial)
        return list(of_task.values())


def tune(run: TuningRun, backbone: Backbone, tokenizer: Any, notices: StopSignal | None = None) -> list[TrialState]:
    """Tune every trial to its end, resuming from the run's newest checkpoint; their final states.

    Given notice to stop, it leaves after the step that it is at, with the states of the trials that have started.
    Raises: StorageError when a checkpoint cannot be written.
    """
    progress = _resume(run, backbone, tokenizer)
    while not _must_stop(progress, notices):
        if _evaluate_due(progress):  # also what a run that was stopped left due
            _save(progress)
        _fill_slots(progress)
        if not progress.live():
            break
        _step(progress)
        if progress.step % run.checkpoint_every == 0 and not progress.due():
            _save(progress)
    _save(progress)
    return [progress.states[trial.name] for trial in run.trials if trial.name in progress.states]


def _must_stop(progress: _Progress, notices: StopSignal | None) -> bool:
    notice = notices.next(progress.backbone.device) if notices else "go on"
    if notice == "save":
        _save(progress)
    elif notice == "stop":
        progress.journal.event("stage", name="tuning", text=f"stopping at step {progress.step}, with a checkpoint")
    return notice == "stop"


def _resume(run: TuningRun, backbone: Backbone, tokenizer: Any) -> _Progress:
    journal = RunLog(run.folder, silent=rank() != 0)
    checkpoint = load_checkpoint(run.folder / "checkpoints")
    found = [checkpoint.state_of(trial, backbone.device) for trial in run.trials] if checkpoint else []
    states = {state.trial.name: state for state in found if state is not None}
    # Counted on, even where no trial can be taken up again: a newer checkpoint has the higher step.
    step = checkpoint.step if checkpoint else 0
    _check_ranks_agree(run, step, len(states), backbone)
    if states:
        journal.resumed(step, list(states.values()))
    progress = _Progress(run, backbone, tokenizer, journal, step, states)
    _drop_unreadable(progress, [state for state in states.values() if not state.ended])
    return progress


def _check_ranks_agree(run: TuningRun, step: int, states: int, backbone: Backbone) -> None:
    seen = torch.zeros(world_size(), 2, device=backbone.device)
    seen[rank()] = torch.tensor([step, states], dtype=seen.dtype)
    if len(sum_over_ranks(seen).unique(dim=0)) > 1:
        raise StorageError(f"ranks see different checkpoints in {run.folder}; run.storage must be one shared folder")


def _fill_slots(progress: _Progress) -> None:
    """Before every step: no slot stays free while a trial waits for one, or is paused and may go on."""
    while True:  # a trial may fail where it starts
        free = max(0, progress.run.max_live_trials - len(progress.live()))
        resumed = _halve(progress)[:free]
        for state in resumed:
            state.status = "live"
        admitted = progress.waiting()[: free - len(resumed)]
        if not admitted:
            break
        _admit(progress, admitted)


def _halve(progress: _Progress) -> list[TrialState]:
    """End the paused trials that halving gives up; those that may go on, the furthest first."""
    go_on = []
    for trials in progress.sweeps():
        settings = trials[0].settings
        states = [progress.states.get(trial.name) for trial in trials]
        if settings.halving is None or not any(state and state.status == "paused" for state in states):
            continue
        entrants = [SweepTrial(state.scores, state.role) if state else SweepTrial((), "waiting") for state in states]
        for place, verdict in verdicts(entrants, rungs(settings), settings.halving.factor).items():
            state = states[place]
            assert state is not None
            if verdict == "go on":
                go_on.append(state)
            elif verdict == "out":
                reached = ranking(entrants, len(state.scores))
                state.halve(reached.index(place) + 1, len(reached))
                progress.journal.finished(state)
    return sorted(go_on, key=lambda state: -state.step)


def _admit(progress: _Progress, trials: Sequence[Trial]) -> None:
    """Start trials, and measure where they start from."""
    run = progress.run
    admitted = []
    for trial in trials:
        labels = run.corpora[trial.task].labels
        prompt = initial_prompt(trial, progress.backbone, progress.tokenizer, labels, run.warm_starts)
        state = start(trial, prompt)
        progress.states[trial.name] = state
        progress.journal.started(state)
        admitted.append(state)
    _drop_unreadable(progress, admitted)
    _measure(progress, [state for state in admitted if not state.ended])
    _save(progress)


def _drop_unreadable(progress: _Progress, states: Sequence[TrialState]) -> None:
    """End the trials whose token shards a rank cannot read any more; the others must not stop for them."""
    lost, reason = torch.zeros(len(states), device=progress.backbone.device), ""
    for place, state in enumerate(states):
        try:
            for split in progress.run.corpora[state.trial.task].splits:
                progress.split(state, split)
        except (CorpusError, OSError, ValueError) as error:
            lost[place], reason = 1.0, f" ({one_line(error)})"
    if len(states):
        sum_over_ranks(lost)
    for state in itertools.compress(states, lost.tolist()):
        state.lose(f"its token shards could not be read{reason}; a run of another run.name makes them anew")
        progress.journal.finished(state)


def _step(progress: _Progress) -> None:
    live = progress.live()
    work = [TrialStep(s.trial, s.prompt, s.step, progress.split(s, "train")) for s in live]
    losses, tokens = losses_and_gradients(progress.backbone, work, progress.run.token_budget)
    progress.step += 1
    for state, loss in zip(live, losses, strict=True):
        settings = state.trial.settings
        if not np.isfinite(loss) or not bool(state.prompt.grad.isfinite().all()):  # type: ignore[union-attr]
            state.fail_at("loss", float(loss))
            progress.journal.finished(state)
            continue
        update(state.optimizer, settings.optimizer, state.step, settings.max_steps)
        state.step += 1
    stepped = [state for state in live if state.status == "live"]
    by_name = {state.trial.name: float(loss) for state, loss in zip(live, losses, strict=True)}
    progress.journal.stepped(progress.step, stepped, by_name, tokens, progress.backbone.traffic.gathered)


def _evaluate_due(progress: _Progress) -> bool:
    due = progress.due()
    if due:
        _measure(progress, due)
    return bool(due)


def _measure(progress: _Progress, states: Sequence[TrialState]) -> None:
    scores = _exam(progress, states, "dev") if states else []
    for state, score in zip(states, scores, strict=True):
        state.judge(score)
        progress.journal.evaluated(state)
    progress.journal.paused()


def _test_winners(progress: _Progress) -> None:
    """Measure on its test split, where it has one, the prompt that a task publishes, and no other."""
    of_task = [[progress.states.get(trial.name) for trial in trials] for trials in progress.sweeps()]
    winners = [winner(states) for states in of_task if all(state and state.ended for state in states)]
    corpora = progress.run.corpora
    untested = [s for s in winners if s is not None and s.test is None and "test" in corpora[s.trial.task].splits]
    for state, score in zip(untested, _exam(progress, untested, "test") if untested else [], strict=True):
        state.test = score


def _exam(progress: _Progress, states: Sequence[TrialState], split: str) -> list[Any]:
    exams = []
    for state in states:
        prompt = state.best if split == "test" else state.prompt
        corpus = progress.run.corpora[state.trial.task]
        exams.append(eval_request(state.trial.settings, prompt, progress.split(state, split), corpus))
    return evaluate(progress.backbone, progress.tokenizer, exams, progress.run.token_budget)


def _save(progress: _Progress) -> None:
    _test_winners(progress)  # first: a run killed after its last checkpoint is published as that one has it
    if rank() == 0:
        save_checkpoint(progress.run.folder / "checkpoints", progress.step, progress.states.values())
