"""The prompts of a comparison: the main job's own tuning, of every trial of every sweep."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.backbone.files import save_description
from pipeline.comparison.candidates import Candidate, Cost, Measured, Method
from pipeline.comparison.study import Study, seen_while_tuning, with_own_bank
from pipeline.reporting.html.run_files import stages_of
from pipeline.reporting.watched import read_events
from pipeline.run.checks import CheckedRun
from pipeline.run.patience import patiently
from pipeline.run.publishing import publish_prompts
from pipeline.run.results import choose as choose_trials
from pipeline.run.results import write_trials
from pipeline.run.stages import announce, finished_states, make_order
from pipeline.settings import TaskSettings
from pipeline.tuning.state import TrialState


@dataclass(frozen=True)
class TunedPrompts:
    measured: tuple[Measured, ...]
    """In the trials' order."""
    arrays: Mapping[str, np.ndarray]
    """By candidate, the prompt at its best evaluation, `[P, H]` float32."""
    trials: Mapping[str, TaskSettings]
    """By candidate, its trial's settings."""


def tune_prompts(study: Study, checked: CheckedRun, phase: str, method: Method, publish: bool = False) -> TunedPrompts:
    """Tune every trial of the settings in `checked`, going on where an attempt before was stopped.

    `publish` puts them into the comparison's own bank. Raises: PromptBankError.
    """
    settings = checked.settings
    corpora = {name: corpus for name, corpus in seen_while_tuning(study.corpora).items() if name in settings.tasks}
    with study.phase(phase) as (folder, log):
        save_description(checked.config, checked.tokenizer, folder / "model")
        log.write("begin", tasks=len(corpora))
        order = make_order(checked, corpora, folder)
        announce(order, settings, log)
        states = finished_states(order, settings)
        if states is None:
            study.on_ranks(order, log)
            states = finished_states(order, settings)
        if states is None:
            raise study.told_to_stop(phase)
        entries = choose_trials(states)
        log.write("stage", name="publish", text=f"{len(states)} trials")
        write_trials(folder / "trials.json", entries)
        version = None
        if publish:
            own = with_own_bank(settings, study.folder)
            put = partial(publish_prompts, own, checked.identity, entries, corpora)
            version = patiently(put, "publish", log)
        log.write("end", version=version, exit=0)
    costs = _costs(folder, states, settings.cluster.num_workers)
    measured = [_measured(state, method, settings.tasks[state.trial.task], costs) for state in states]
    names = [one.candidate.name for one in measured]
    return TunedPrompts(
        tuple(measured),
        {name: state.best.cpu().numpy() for name, state in zip(names, states, strict=True)},
        {name: state.trial.settings for name, state in zip(names, states, strict=True)},
    )


def _measured(state: TrialState, method: Method, task: TaskSettings, costs: Mapping[str, Cost]) -> Measured:
    name, best = state.trial.name, state.history[state.best_at]
    failed = state.reason or "it failed" if state.status == "failed" else None
    short = "" if method == "prompt tuning" else "transferred."
    candidate = Candidate(short + name, method, state.trial.task, _choice(task, state.trial.settings), state.trial.seed)
    return Measured(candidate, best.value, best.loss, costs[name], failed)


def _choice(task: TaskSettings, trial: TaskSettings) -> dict[str, Any]:
    """The trial's value of every key that its task sweeps, but for the seed."""
    whole = trial.model_dump(mode="json")
    choice = {}
    for key in task.sweep or {}:
        if key != "seed":
            part, _, leaf = key.rpartition(".")
            choice[str(key)] = whole[part][leaf] if part else whole[leaf]
    return choice


def _costs(folder: Path, states: Sequence[TrialState], ranks: int) -> dict[str, Cost]:
    """Trials tuned side by side share the phase's time by the rows that each trained."""
    stages = {stage.name: stage for stage in stages_of(read_events(folder / "events.jsonl"))}
    tuning = stages.get("tuning")
    rows = [state.step * state.trial.settings.batch_size for state in states]
    seconds = ranks * tuning.seconds / max(1, sum(rows)) if tuning else 0.0
    shared = Cost(peak_bytes=tuning.peak_bytes if tuning else None)
    return {
        state.trial.name: replace(
            shared,
            trained_parameters=state.best.numel(),
            stored_bytes=state.best.nbytes,
            rank_seconds=seconds * trained,
            prompt_tokens=len(state.best),
        )
        for state, trained in zip(states, rows, strict=True)
    }
