"""What becomes of each task: its prompt in the new version, and its line in the night's record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.bank import CarriedPrompt, NewPrompt, PromptRecord
from pipeline.refresh.gate import judge
from pipeline.refresh.inputs import NightInputs
from pipeline.refresh.plan import PlannedTask
from pipeline.refresh.record import TaskRecord
from pipeline.refresh.starts import is_warm
from pipeline.refresh.tuned import NightResults
from pipeline.run.publishing import new_prompt, written_tables
from pipeline.run.results import TaskResult
from pipeline.settings import Settings
from pipeline.tuning.state import Evaluation, TrialState, winner

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


def decide(settings: Settings, inputs: NightInputs, tuned: NightResults) -> list[NightDecision]:
    """By task, in the plan's order."""
    return [_decide(planned, settings, inputs, tuned) for planned in inputs.plan]


def _decide(planned: PlannedTask, settings: Settings, inputs: NightInputs, tuned: NightResults) -> NightDecision:
    record = planned_record(planned, settings)
    if planned.task in inputs.corpora:
        corpus = inputs.corpora[planned.task]
        record = replace(record, rows=corpus.counts, tables=written_tables(corpus))
    if planned.decision == "removed":
        return NightDecision(replace(record, result="removed"))
    if planned.decision == "carried":
        assert planned.incumbent is not None
        return NightDecision(replace(record, result="carried", stays=True), CarriedPrompt(planned.incumbent))
    if planned.decision == "unusable":
        return _failed(record, planned, planned.why)
    result, corpus = tuned.results[planned.task], inputs.corpora[planned.task]
    record, new = _with_figures(record, result, inputs.bank.version), new_prompt(result, corpus, settings)
    if result.failed:
        return _failed(record, planned, result.reason or "no reason was recorded", new)
    if planned.incumbent is not None:
        return _compared(record, planned, result, new, settings, tuned)
    if result.withheld:
        return _failed(record, planned, f"not learned, and withheld: {result.reason}", new)
    return NightDecision(replace(record, result="promoted", reason=result.reason), new)


def _failed(record: TaskRecord, planned: PlannedTask, reason: str, failed: NewPrompt | None = None) -> NightDecision:
    """A task without a new prompt. The digest of its inputs is not written down, so that tomorrow it is tuned again."""
    record = replace(record, result="failed", reason=reason)
    if planned.incumbent is None:
        return NightDecision(record, failed)
    return NightDecision(replace(record, stays=True), CarriedPrompt(planned.incumbent, "kept", reason))


def _compared(
    record: TaskRecord,
    planned: PlannedTask,
    result: TaskResult,
    new: NewPrompt,
    settings: Settings,
    tuned: NightResults,
) -> NightDecision:
    """A task with a prompt in the bank: the gate decides which of the two is published."""
    assert planned.incumbent is not None
    pair, gate, seed = tuned.pairs[planned.task], settings.refresh, settings.run.seed
    verdict = judge(settings.tasks[planned.task].metric, pair, gate.alpha, gate.margin, seed, result.dev_constant)
    record = replace(
        record, incumbent=verdict.incumbent, new=verdict.new, p_value=verdict.p_value, dev_rows=len(pair.new)
    )  # fmt: skip
    same = np.array_equal(result.chosen.best.cpu().numpy(), tuned.incumbents[planned.task]) and (
        # A prompt whose labels are scored in another way now is another one, although its vectors are the same.
        _label_scoring(new) == _label_scoring(planned.incumbent)
    )
    reason = _NO_BETTER if same else verdict.refused
    if reason is None and result.withheld:
        reason = f"not learned, and withheld: {result.reason}"
    if reason is None:
        return NightDecision(replace(record, result="promoted", reason=result.reason), new)
    record = replace(record, result="kept", reason=reason, worse=not same, stays=True)
    # What the refused prompt was tuned from is noted: while that stays as it is, it is not tuned again.
    return NightDecision(record, CarriedPrompt(planned.incumbent, "kept", reason, new.inputs_digest))


def _label_scoring(prompt: NewPrompt | PromptRecord) -> tuple[str, bool]:
    return prompt.label_score, prompt.label_offsets is not None


def _with_figures(record: TaskRecord, result: TaskResult, version: int | None) -> TaskRecord:
    """The record with the trials' figures, and which start served better."""
    warm = _best([state for state in result.trials if is_warm(state.trial, version)])
    cold = _best([state for state in result.trials if not is_warm(state.trial, version)])
    beat = warm.better(str(record.metric), cold) if warm and cold else None
    return replace(
        record,
        start=None if result.failed else result.dev_before,
        constant=result.dev_constant,
        learned=result.learned,
        new=None if result.failed else result.dev_after,
        warm=warm.value if warm else None,
        cold=cold.value if cold else None,
        warm_beat_cold=beat,
        trial=None if result.failed else result.chosen.trial.name,
        trials=tuple(state.trial.name for state in result.trials),
        steps=sum(state.step for state in result.trials),
    )


def _best(states: Sequence[TrialState]) -> Evaluation | None:
    best = winner(states)
    return None if best is None else best.history[best.best_at]
