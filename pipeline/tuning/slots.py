"""Which trials are tuned now: a run has `max_live_trials` slots, and a trial that ends frees its own."""

from pipeline.tuning.halving import SweepTrial, ranking, rungs, verdicts
from pipeline.tuning.initialise import initial_prompt
from pipeline.tuning.parameters import initial_parameters
from pipeline.tuning.progress import Progress
from pipeline.tuning.state import TrialState, start


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
        admitted = []
        for trial in progress.waiting()[: free - len(resumed)]:
            labels = run.corpora[trial.task].labels
            prompt = initial_prompt(trial, progress.backbone, progress.tokenizer, labels, run.warm_starts)
            parameters = initial_parameters(trial, prompt, progress.backbone, progress.tokenizer)
            state = progress.states[trial.name] = start(trial, prompt, parameters)
            run_log.started(state)
            admitted.append(state)
        if not admitted:
            return
        progress.drop_unreadable(admitted)
        progress.measure([state for state in admitted if not state.ended])
        progress.save()


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
