"""What becomes of each task: its prompt in the new version, and its line in the night's record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.bank import CarriedPrompt, NewPrompt
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.refresh.gate import judge
from pipeline.refresh.inputs import NightInputs
from pipeline.refresh.plan import PlannedTask
from pipeline.refresh.record import TaskRecord
from pipeline.refresh.starts import is_warm
from pipeline.refresh.tuned import NightResults
from pipeline.run.publishing import new_prompt
from pipeline.run.results import TaskResult
from pipeline.settings import Settings
from pipeline.tuning.state import Evaluation, TrialState, winner
from pipeline.tuning.trials import inputs_digest

_NO_BETTER = "no step was better than the bank's prompt, which it started from"


@dataclass(frozen=True)
class NightDecision:
    record: TaskRecord
    prompt: NewPrompt | CarriedPrompt | None = None
    """What the new version has of the task; None for nothing."""


def planned_record(planned: PlannedTask, settings: Settings) -> TaskRecord:
    """The line of a task before anything is done with it."""
    own = settings.tasks.get(planned.task)
    metric = own.metric if own else planned.incumbent.metric if planned.incumbent else None
    canary = planned.task in settings.refresh.canaries
    return TaskRecord(planned.task, planned.decision, planned.why, canary=canary, metric=metric)


def decide(settings: Settings, found: NightInputs, tuned: NightResults) -> list[NightDecision]:
    """By task, in the plan's order."""
    return [_decide(planned, settings, found, tuned) for planned in found.plan]


def _decide(planned: PlannedTask, settings: Settings, found: NightInputs, tuned: NightResults) -> NightDecision:
    record = planned_record(planned, settings)
    if planned.task in found.corpora:
        record = replace(record, rows=found.corpora[planned.task].counts)
    if planned.decision == "removed":
        return NightDecision(replace(record, result="removed"))
    if planned.decision == "carried":
        assert planned.incumbent is not None
        return NightDecision(replace(record, result="carried", stays=True), CarriedPrompt(planned.incumbent))
    if planned.decision == "unusable":
        return _failed(record, planned, planned.why)
    entry, corpus = tuned.entries[planned.task], found.corpora[planned.task]
    record = _with_figures(record, entry, found.bank.version)
    if entry.failed:
        reason = entry.reason or "no reason was recorded"
        return _failed(record, planned, reason, new_prompt(entry, corpus, settings))
    if planned.incumbent is None:
        if entry.withheld:
            return _failed(
                record, planned, f"not learned, and withheld: {entry.reason}", new_prompt(entry, corpus, settings)
            )
        return NightDecision(
            replace(record, result="promoted", reason=entry.reason), new_prompt(entry, corpus, settings)
        )
    return _compared(record, planned, entry, corpus, settings, tuned)


def _failed(record: TaskRecord, planned: PlannedTask, reason: str, failed: NewPrompt | None = None) -> NightDecision:
    """What it was tuned from is not noted with a prompt that stays: tomorrow it is tried again."""
    record = replace(record, result="failed", reason=reason)
    if planned.incumbent is None:
        return NightDecision(record, failed)
    return NightDecision(replace(record, stays=True), CarriedPrompt(planned.incumbent, "kept", reason))


def _compared(
    record: TaskRecord,
    planned: PlannedTask,
    entry: TaskResult,
    corpus: TaskCorpus,
    settings: Settings,
    tuned: NightResults,
) -> NightDecision:
    """A task with a prompt in the bank: the gate."""
    assert planned.incumbent is not None
    pair, chosen = tuned.pairs[planned.task], entry.chosen
    own = settings.tasks[planned.task]
    verdict = judge(
        own.metric, pair, settings.refresh.alpha, settings.refresh.margin, settings.run.seed, entry.constant.get("dev")
    )
    record = replace(
        record, incumbent=verdict.incumbent, new=verdict.new, p_value=verdict.p_value, dev_rows=len(pair.new)
    )  # fmt: skip
    same = np.array_equal(chosen.best.cpu().numpy(), tuned.incumbents[planned.task])
    reason = _NO_BETTER if same else verdict.refused
    if reason is None and entry.withheld:
        reason = f"not learned, and withheld: {entry.reason}"
    if reason is None:
        return NightDecision(
            replace(record, result="promoted", reason=entry.reason), new_prompt(entry, corpus, settings)
        )
    inputs = inputs_digest(settings, planned.task, corpus.digest)
    record = replace(record, result="kept", reason=reason, worse=not same, stays=True)
    return NightDecision(record, CarriedPrompt(planned.incumbent, "kept", reason, inputs))


def _with_figures(record: TaskRecord, entry: TaskResult, version: int | None) -> TaskRecord:
    """What the trials came to, and which start served better."""
    warm = _best([state for state in entry.trials if is_warm(state.trial, version)])
    cold = _best([state for state in entry.trials if not is_warm(state.trial, version)])
    beat = warm.better(str(record.metric), cold) if warm and cold else None
    return replace(
        record,
        start=None if entry.failed else entry.chosen.history[0].value,
        constant=entry.constant.get("dev"),
        learned=entry.learned,
        new=None if entry.failed else entry.chosen.history[entry.chosen.best_at].value,
        warm=warm.value if warm else None,
        cold=cold.value if cold else None,
        warm_beat_cold=beat,
        trial=None if entry.failed else entry.chosen.trial.name,
        trials=tuple(state.trial.name for state in entry.trials),
        steps=sum(state.step for state in entry.trials),
    )


def _best(states: Sequence[TrialState]) -> Evaluation | None:
    best = winner(states)
    return None if best is None else best.history[best.best_at]
