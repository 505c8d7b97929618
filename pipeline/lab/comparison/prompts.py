"""The prompts of a comparison: every trial of every sweep, tuned as the main job tunes them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone.files import save_config_and_tokenizer
from pipeline.lab.comparison.candidates import Candidate, Cost, MeasuredCandidate, Method
from pipeline.lab.comparison.choice import choose_best, group_over_seeds
from pipeline.lab.comparison.derived_settings import with_own_bank
from pipeline.lab.comparison.study import Study, without_test_splits
from pipeline.reporting.events import Event
from pipeline.reporting.html.run_files import stages_of
from pipeline.reporting.watched import read_events
from pipeline.run.checks import CheckedRun
from pipeline.run.publishing import publish_prompts
from pipeline.run.results import TaskResult, write_trials
from pipeline.run.stages import announce, finished_states, make_rank_job, retry_while_unreachable
from pipeline.settings import TaskSettings
from pipeline.tuning.state import TrialState, by_task


@dataclass(frozen=True)
class TunedPrompts:
    measured: tuple[MeasuredCandidate, ...]
    """In the trials' order."""
    arrays: Mapping[str, np.ndarray]
    """By candidate, the prompt at its best evaluation, `[P, H]` float32."""
    trials: Mapping[str, TaskSettings]
    """By candidate, its trial's settings."""


def tune_prompts(study: Study, checked: CheckedRun, phase: str, method: Method) -> TunedPrompts:
    """Tune every trial of the settings in `checked`, and resume where an earlier attempt was stopped.

    Tuned prompts are published into the comparison's own bank, and transferred prompts start from it.
    Raises: PromptBankError.
    """
    own = method == "prompt tuning"
    settings = checked.settings
    corpora = {name: corpus for name, corpus in without_test_splits(study.corpora).items() if name in settings.tasks}
    with study.phase(phase) as (folder, log):
        save_config_and_tokenizer(checked.config, checked.tokenizer, folder / "model")
        log.write("begin", tasks=len(corpora))
        rank_job = make_rank_job(checked, corpora, folder, starts_anew=not own)
        announce(rank_job, settings, log)
        states = finished_states(rank_job, settings)
        if states is None:
            study.run_on_ranks(rank_job, log)
            states = finished_states(rank_job, settings)
        if states is None:
            raise study.told_to_stop(phase)
        log.write("stage", name="publish", text=f"{len(states)} trials")
        costs = _costs(folder, states, settings.cluster.num_workers)
        measured = [_measured(state, method, settings.tasks[state.trial.task], costs) for state in states]
        results = _task_results(states, measured, study.metrics)
        write_trials(folder / "trials.json", results)
        version = None
        if own:
            bank = with_own_bank(settings, study.folder)
            put = partial(publish_prompts, bank, checked.identity, results, corpora)
            version = retry_while_unreachable(put, "publish", log)
        log.write("end", version=version, exit=0)
    names = [one.candidate.name for one in measured]
    return TunedPrompts(
        tuple(measured),
        {name: state.best.cpu().numpy() for name, state in zip(names, states, strict=True)},
        {name: state.trial.settings for name, state in zip(names, states, strict=True)},
    )


def _task_results(
    states: Sequence[TrialState], measured: Sequence[MeasuredCandidate], metrics: Mapping[str, str]
) -> list[TaskResult]:
    """The tasks' trials for the report; the chosen one is the best seed of the task's best choice."""
    best = {
        task: group.best(metrics[task]) for (_, task), group in choose_best(group_over_seeds(measured), metrics).items()
    }
    results = []
    for task, trials in by_task(states).items():
        own = [state for state, one in zip(states, measured, strict=True) if one is best.get(task)]
        results.append(TaskResult(trials, own[0] if own else trials[0]))
    return results


def _measured(state: TrialState, method: Method, task: TaskSettings, costs: Mapping[str, Cost]) -> MeasuredCandidate:
    name, best = state.trial.name, state.history[state.best_at]
    failed = state.reason or "it failed" if state.status == "failed" else None
    short = "" if method == "prompt tuning" else "transferred."
    candidate = Candidate(short + name, method, state.trial.task, _choice(task, state.trial.settings), state.trial.seed)
    return MeasuredCandidate(candidate, best.value, best.loss, costs[name], failed)


def _choice(task: TaskSettings, trial: TaskSettings) -> dict[str, Any]:
    """The trial's value of every key that its task sweeps, without the seed."""
    whole = trial.model_dump(mode="json")
    choice = {}
    for key in task.sweep or {}:
        if key != "seed":
            part, _, leaf = key.rpartition(".")
            choice[str(key)] = whole[part][leaf] if part else whole[leaf]
    return choice


def _costs(folder: Path, states: Sequence[TrialState], ranks: int) -> dict[str, Cost]:
    """The trials' costs. Trials tuned together share the phase's time in proportion to the rows that each trained."""
    seconds, peak = _spent(read_events(folder / "events.jsonl"), {state.trial.digest for state in states})
    rows = [state.step * state.trial.settings.batch_size for state in states]
    return {
        state.trial.name: Cost(
            trained_parameters=state.best.numel(),
            stored_bytes=state.best.nbytes,
            rank_seconds=ranks * seconds * trained / max(1, sum(rows)),
            peak_bytes=peak,
            prompt_tokens=len(state.best),
        )
        for state, trained in zip(states, rows, strict=True)
    }


def _spent(events: Iterable[Event], digests: Collection[str]) -> tuple[float, int | None]:
    """Seconds of tuning these trials and the peak bytes meanwhile, over all attempts.

    Settings may change between attempts. If an attempt tuned other trials as well, these get a share by their steps.
    """
    attempts: list[list[Event]] = []
    for event in events:
        if event["event"] == "begin" or not attempts:
            attempts.append([])
        attempts[-1].append(event)
    seconds, peaks = 0.0, []
    for attempt in attempts:
        trials: list[dict[str, Any]] = next((event["trials"] for event in attempt if event["event"] == "launch"), [])
        own = sum(trial["max_steps"] for trial in trials if trial.get("digest") in digests)
        tuning = next((stage for stage in stages_of(attempt) if stage.name == "tuning"), None)
        if own and tuning:
            seconds += tuning.seconds * own / sum(trial["max_steps"] for trial in trials)
            peaks.append(tuning.peak_bytes or 0)
    return seconds, max(peaks, default=0) or None
