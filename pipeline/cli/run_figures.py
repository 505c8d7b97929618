"""Runs and their trials as `promptbank runs` prints them: table rows, fields and JSON documents."""

from datetime import UTC, datetime
from typing import Any

from pipeline.cli.output import Cell, Column
from pipeline.reporting.pace import RECENT
from pipeline.reporting.state import TrialProgress
from pipeline.reporting.watched import WatchedRun
from pipeline.reporting.words import about, counted

_COLOURS = {"done": "green", "running": "cyan", "silent": "yellow", "stopped": "red"}
RUN_COLUMNS = (
    Column("run", free=True),
    Column("state"),
    Column("stage"),
    Column("step", right=True),
    Column("tokens/s", right=True),
    Column("done in", right=True),
    Column("finished", right=True),
    Column("failed", right=True, optional=True),
    Column("last event"),
)
TRIAL_COLUMNS = (
    Column("trial", free=True),
    Column("status"),
    Column("step", right=True),
    Column("of", right=True),
    Column("loss", right=True),
    Column("metric"),
    Column("dev", right=True),
    Column("reason"),
)


def run_row(run: WatchedRun, now: float) -> list[Cell]:
    state, condition, trials = run.state, run.condition(now), run.state.trials.values()
    steps = run.steps_to_go
    return [
        run.name,
        (condition, _COLOURS[condition]),
        state.stage_name or None,
        str(state.step) if steps is None else f"{state.step}/{state.step + steps}",
        f"{state.tokens_per_second:.0f}" if condition == "running" and state.live else None,
        None if run.done_at is None or condition == "silent" else about(max(0.0, run.done_at - now)),
        f"{sum(trial.finished for trial in trials)}/{len(trials)}",
        sum(trial.status == "failed" for trial in trials) or None,
        None if run.pace.last is None else f"{about(run.pace.quiet(now))} ago",
    ]


def run_fields(run: WatchedRun, now: float) -> list[tuple[str, Cell]]:
    state, trials = run.state, run.state.trials.values()
    counts = {
        "live": len(state.live),
        "waiting": state.waiting,
        "finished": sum(trial.finished and trial.status != "failed" for trial in trials),
        "failed": sum(trial.status == "failed" for trial in trials),
    }
    under_way = not (state.ended or state.stopped)
    return [
        ("run", run.name),
        ("folder", str(run.folder)),
        ("begun", None if run.begun is None else _moment(run.begun)),
        ("state", _state(run, now)),
        ("stage", f"{state.stage_name}: {state.stage}" if under_way and state.stage else None),
        ("step", state.step),
        ("tokens/s", f"{state.tokens_per_second:.0f}" if run.condition(now) == "running" and state.live else None),
        ("done", _estimate(run, now)),
        ("trials", ", ".join(f"{count} {kind}" for kind, count in counts.items() if count) or None),
    ]


def _state(run: WatchedRun, now: float) -> str:
    state = run.state
    if state.ended:
        published = "nothing was published" if state.version is None else f"published version {state.version}"
        return f"done: {published}" + ("" if state.exit is None else f", exit code {state.exit}")
    if state.stopped is not None:
        return f"stopped: {state.stopped}"
    if run.pace.silent(now):
        return silence(run, now)
    return f"running: last event {about(run.pace.quiet(now))} ago"


def silence(run: WatchedRun, now: float) -> str:
    gap = run.pace.longest_gap
    usual = (
        "there were too few events to say what is usual" if gap is None else f"lately never for more than {about(gap)}"
    )
    return f"silent for {about(run.pace.quiet(now))}; {usual}"


def _estimate(run: WatchedRun, now: float) -> str | None:
    steps, at, pace = run.steps_to_go, run.done_at, run.pace.seconds_per_step
    if steps is None or at is None or pace is None or run.pace.silent(now):
        return None
    return (
        f"tuning in {about(max(0.0, at - now))} at the latest ({_moment(at)}): {counted(steps, 'step')} to go at "
        f"{pace:.2g} s each, the pace of the last {RECENT} events"
    )


def run_document(run: WatchedRun, now: float) -> dict[str, Any]:
    state, pace, trials = run.state, run.pace, run.state.trials.values()
    return {
        "run": run.name,
        "folder": str(run.folder),
        "state": run.condition(now),
        "stopped": state.stopped,
        "version": state.version,
        "exit": state.exit,
        "begun": run.begun,
        "last_event": pace.last,
        "quiet_seconds": pace.quiet(now),
        "longest_gap_seconds": pace.longest_gap,
        "stage": state.stage_name,
        "stage_text": state.stage,
        "step": state.step,
        "steps_to_go": run.steps_to_go,
        "seconds_per_step": pace.seconds_per_step,
        "done_at": run.done_at,
        "tokens_per_second": state.tokens_per_second,
        "live": len(state.live),
        "waiting": state.waiting,
        "finished": sum(trial.finished for trial in trials),
        "failed": sum(trial.status == "failed" for trial in trials),
    }


def trial_row(name: str, trial: TrialProgress) -> list[Cell]:
    status = _status(trial)
    colour = {"failed": "red", "live": "cyan", "waiting": "", "no gain": "yellow", "not learned": "yellow"}.get(
        status, "green"
    )
    loss = trial.loss if trial.live else None
    return [name, (status, colour), trial.step, trial.max_steps, loss, trial.metric, trial.value, trial.reason]


def trial_document(name: str, trial: TrialProgress) -> dict[str, Any]:
    return {
        "trial": name,
        "task": trial.task,
        "status": _status(trial),
        "step": trial.step,
        "max_steps": trial.max_steps,
        "loss": trial.loss if trial.live else None,
        "metric": trial.metric,
        "value": trial.value,
        "reason": trial.reason,
    }


def _status(trial: TrialProgress) -> str:
    if trial.finished:
        return trial.status or "finished"
    return "live" if trial.live else "waiting"


def _moment(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):  # at a pace of centuries the year is out of range
        return "beyond the calendar"
