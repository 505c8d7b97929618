"""Which trials are tuned now: a run has `max_live_trials` slots, and a trial that ends frees its own."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from pipeline.tuning.evaluate import EvalRequest, evaluate
from pipeline.tuning.halving import SweepTrial, ranking, rungs, verdicts
from pipeline.tuning.initialise import initial_prompt
from pipeline.tuning.optimise import AUTO_RATE
from pipeline.tuning.parameters import initial_parameters
from pipeline.tuning.progress import Progress
from pipeline.tuning.state import TrialState, start, start_again
from pipeline.tuning.trials import Trial

_LOOKED_AT = 64
"""Dev rows that tell starts apart, before the first step."""


def fill_slots(progress: Progress) -> None:
    """Leave no slot free while a trial waits for one, or is paused and may go on.

    A trial that starts is measured before its first step: what it is given must not be worse than where it started.
    """
    run, run_log = progress.run, progress.run_log
    while True:  # a trial may fail where it starts, and its slot is free again
        free = max(0, run.max_live_trials - len(progress.live()))
        resumed = _halve(progress)[:free]
        for state in resumed:
            state.status = "live"
        waiting = progress.waiting()[: free - len(resumed)]
        if not waiting:
            return
        unreadable = progress.unreadable(waiting)
        starts = _starting_prompts(progress, [trial for trial in waiting if trial.name not in unreadable])
        admitted = []
        for trial in waiting:
            state = progress.states[trial.name] = _started(progress, trial, starts.get(trial.name))
            run_log.started(state)
            if trial.name in unreadable:
                state.lose(unreadable[trial.name])
                run_log.finished(state)
            else:
                admitted.append(state)
        progress.measure(admitted)
        progress.save()


def restart(progress: Progress, state: TrialState) -> None:
    """Put a trial that exploded back to its start, at a lower rate."""
    parameters = initial_parameters(state.trial, state.best, progress.backbone, progress.tokenizer)
    again = progress.states[state.trial.name] = start_again(state, parameters)
    progress.run_log.restarted(again)


def _started(progress: Progress, trial: Trial, prompt: Tensor | None) -> TrialState:
    """A trial at its first prompt `[P, H]`; None where its rows cannot be read."""
    optimizer = trial.settings.optimizer
    rate = AUTO_RATE * progress.embeddings_rms if optimizer.lr == "auto" else optimizer.rate
    if prompt is None:
        return start(trial, progress.backbone.no_prompt(), rate=rate)
    return start(trial, prompt, initial_parameters(trial, prompt, progress.backbone, progress.tokenizer), rate)


def _starting_prompts(progress: Progress, trials: Sequence[Trial]) -> dict[str, Tensor]:
    """The prompt `[P, H]` that each trial starts from: of `prompt.starts` draws, that of the lowest loss on dev."""
    chosen = {}
    for trial in trials:  # one by one: the draws of all of them may be more than memory holds
        drawn = [_draw(progress, trial, draw) for draw in range(trial.settings.prompt.draws)]
        best = 0
        if len(drawn) > 1:
            few = progress.split(trial, "dev").head(_LOOKED_AT)
            requests = [EvalRequest(prompt, few, "loss", None, None, 1) for prompt in drawn]
            scores = evaluate(progress.backbone, progress.tokenizer, requests, progress.run.token_budget)
            best = int(np.nan_to_num([score.loss for score in scores], nan=np.inf).argmin())
        chosen[trial.name] = drawn[best]
    return chosen


def _draw(progress: Progress, trial: Trial, draw: int) -> Tensor:
    run = progress.run
    labels, train = run.corpora[trial.task].labels, progress.split(trial, "train")
    return initial_prompt(trial, progress.backbone, progress.tokenizer, labels, run.warm_starts, train, draw)


def _halve(progress: Progress) -> list[TrialState]:
    """End the paused trials that halving gives up; those that may go on, the furthest first."""
    go_on = []
    for trials in progress.sweeps():
        settings = trials[0].settings
        states = [progress.states.get(trial.name) for trial in trials]
        if settings.halving is None or not any(state and state.status == "paused" for state in states):
            continue
        sweep = [SweepTrial(state.scores, state.role) if state else SweepTrial((), "waiting") for state in states]
        for place, verdict in verdicts(sweep, rungs(settings), settings.halving.factor).items():
            state = states[place]
            assert state is not None
            if verdict == "go on":
                go_on.append(state)
            elif verdict == "out":
                reached = ranking(sweep, len(state.scores))
                state.halve(reached.index(place) + 1, len(reached))
                progress.run_log.finished(state)
    return sorted(go_on, key=lambda state: -state.step)
