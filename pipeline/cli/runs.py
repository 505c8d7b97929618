"""`runs ls`, `runs show` and `runs tail`: what is running, how far it is, and when it will be done."""

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli import output
from pipeline.cli.options import AsJson
from pipeline.cli.output import Cell, Column, counted
from pipeline.errors import StorageError
from pipeline.reporting.events import EventTail
from pipeline.reporting.pace import RECENT
from pipeline.reporting.sentences import Narrator
from pipeline.reporting.state import TrialState
from pipeline.reporting.watched import WatchedRun, find_runs, read_run
from pipeline.reporting.words import duration as span

_COLOURS = {"done": "green", "running": "cyan", "silent": "yellow", "stopped": "red"}
_POLL_SECONDS = 0.5
_COLUMNS = (
    Column("run", free=True),
    Column("state"),
    Column("stage"),
    Column("step", right=True),
    Column("to go", right=True),
    Column("tokens/s", right=True),
    Column("done in", right=True),
    Column("finished", right=True),
    Column("failed", right=True),
    Column("last event"),
)
_TRIAL_COLUMNS = (
    Column("trial", free=True),
    Column("status"),
    Column("step", right=True),
    Column("of", right=True),
    Column("loss", right=True),
    Column("metric"),
    Column("dev", right=True),
    Column("reason"),
)


def _offered(context: typer.Context, incomplete: str) -> list[str]:
    storage = context.params.get("storage") or Path("./runs")
    return [str(folder.relative_to(storage)) for folder in find_runs(storage)]


Storage = Annotated[
    Path,
    typer.Option(
        "--storage", metavar="DIR", envvar="PROMPT_BANK_RUNS", help="The folder that run.storage names in the settings."
    ),
]
Run = Annotated[
    str, typer.Argument(metavar="RUN", autocompletion=_offered, help="A run by its run.name, or its folder.")
]

runs = typer.Typer(
    rich_markup_mode=None,
    invoke_without_command=True,
    epilog="""Examples:

\b
promptbank runs ls
promptbank runs show sentiment
promptbank runs tail sentiment""",
)


@runs.callback()
def look_at_runs(context: typer.Context) -> None:
    """Look at runs: what is running, at which step, and when it will be done."""
    if context.invoked_subcommand is None:
        output.write(context.get_help() + "\n")


@runs.command("ls")
def list_runs(storage: Storage = Path("./runs"), as_json: AsJson = False) -> None:
    """List the runs of a storage, the newest event first.

    A run is silent when its last event is older than a minute and than three times the longest time between its
    recent events: its processes may be gone, which cannot be seen from here. "done in" is the longest that tuning
    will take: the steps still to go (trials that wait take the slots that become free first) at the pace of the
    last 60 events. Trials that stop early end it sooner.

    Examples:

    \b
    promptbank runs ls
    promptbank runs ls --storage /shared/runs --json
    """
    now = time.time()
    found = [read_run(folder, str(folder.relative_to(storage))) for folder in _known_runs(storage)]
    found.sort(key=lambda run: run.pace.last or 0.0, reverse=True)
    if as_json:
        output.write_json({"storage": str(storage), "runs": [_summary(run, now) for run in found]})
        return
    output.write_table(_COLUMNS, [_row(run, now) for run in found])
    output.remark(f"{counted(len(found), 'run')} in {storage}; more of one: promptbank runs show RUN")


@runs.command("show")
def show_run(run: Run, storage: Storage = Path("./runs"), as_json: AsJson = False) -> None:
    """Show how far a run is, and each of its trials.

    Examples:

    \b
    promptbank runs show sentiment
    promptbank runs show /shared/runs/sentiment --json
    """
    now = time.time()
    watched = _read(run, storage)
    if as_json:
        trials = [_trial_document(name, trial) for name, trial in watched.state.trials.items()]
        output.write_json({**_summary(watched, now), "trials": trials})
        return
    output.write_fields(_fields(watched, now))
    if watched.state.trials:
        output.write("\n")
        rows = [_trial_row(name, trial) for name, trial in watched.state.trials.items()]
        reason = len(_TRIAL_COLUMNS) - 1
        if not output.on_terminal():
            output.write_table(_TRIAL_COLUMNS, rows)
            return
        output.write_table(_TRIAL_COLUMNS[:reason], [row[:reason] for row in rows])
        for name, trial in watched.state.trials.items():
            if trial.reason:
                output.remark(f"{name} {trial.status}: {trial.reason}")


@runs.command("tail")
def tail_run(
    run: Run,
    lines: Annotated[int, typer.Option("--lines", "-n", metavar="COUNT", min=0, help="Lines of what was before.")] = 10,
    follow: Annotated[bool, typer.Option(help="Go on until the run has ended or stopped, or Ctrl-C.")] = True,
    storage: Storage = Path("./runs"),
    as_json: Annotated[bool, typer.Option("--json", help="Every event as it is, one JSON object a line.")] = False,
) -> None:
    """Follow what a run tells, until it ends.

    Stages, evaluations, trials that finish, and a line of steps every ten seconds. When nothing comes for long, it
    says for how long, and goes on.

    Examples:

    \b
    promptbank runs tail sentiment
    promptbank runs tail sentiment -n 100 --no-follow
    promptbank runs tail sentiment --json | jq 'select(.event == "eval")'
    """
    folder = _folder(run, storage)
    tail, narrator, watched = EventTail(folder / "events.jsonl", whole=True), Narrator(), WatchedRun(run, folder)

    def told() -> list[str]:
        found = []
        for event in tail.read():
            watched.apply(event)
            sentence = narrator.tell(event)
            found.append(json.dumps(event, ensure_ascii=False) if as_json else sentence)
        return [line for line in found if line]

    for line in told()[-lines:] if lines else told()[:0]:
        output.write_line(line)
    reported = 0.0
    while follow and watched.condition(time.time()) not in ("done", "stopped"):
        time.sleep(_POLL_SECONDS)
        new = told()
        for line in new:
            output.write_line(line)
        quiet = watched.pace.quiet(time.time())
        if watched.pace.silent(time.time()) and quiet > 2 * reported:
            output.write_error(_silence(watched, time.time()))
            reported = quiet
        reported = 0.0 if new else reported


def _known_runs(storage: Path) -> list[Path]:
    if not storage.is_dir():
        raise StorageError(f"there is no folder {storage}: name the runs' folder with --storage DIR")
    return find_runs(storage)


def _folder(run: str, storage: Path) -> Path:
    """Raises: StorageError that tells which runs there are."""
    for folder in (storage / run, Path(run)):
        if (folder / "events.jsonl").is_file():
            return folder
    known = ", ".join(str(folder.relative_to(storage)) for folder in _known_runs(storage)) or "none"
    raise StorageError(f"there is no run '{run}' in {storage}; known: {known}")


def _read(run: str, storage: Path) -> WatchedRun:
    return read_run(_folder(run, storage), run)


def _row(run: WatchedRun, now: float) -> list[Cell]:
    state, condition = run.state, run.condition(now)
    under_way = condition in ("running", "silent")
    trials = state.trials.values()
    return [
        run.name,
        (condition, _COLOURS[condition]),
        state.stage_name or None,
        state.step,
        run.steps_to_go,
        f"{state.tokens_per_second:.0f}" if under_way and state.live else None,
        None if run.done_at is None or condition == "silent" else span(max(0.0, run.done_at - now)),
        f"{sum(trial.finished for trial in trials)}/{len(trials)}",
        sum(trial.status == "failed" for trial in trials),
        None if run.pace.last is None else f"{span(run.pace.quiet(now))} ago",
    ]


def _fields(run: WatchedRun, now: float) -> list[tuple[str, Cell]]:
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
        ("tokens/s", f"{state.tokens_per_second:.0f}" if under_way and state.live else None),
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
        return _silence(run, now)
    return f"running: last event {span(run.pace.quiet(now))} ago"


def _silence(run: WatchedRun, now: float) -> str:
    gap = run.pace.longest_gap
    usual = "it has told too little to say what is usual" if gap is None else f"lately never for more than {span(gap)}"
    return f"silent for {span(run.pace.quiet(now))}; {usual}"


def _estimate(run: WatchedRun, now: float) -> str | None:
    steps, at, pace = run.steps_to_go, run.done_at, run.pace.seconds_per_step
    if steps is None or at is None or pace is None or run.pace.silent(now):
        return None
    return (
        f"tuning in {span(max(0.0, at - now))} at the latest ({_moment(at)}): {counted(steps, 'step')} to go at "
        f"{pace:.2g} s each, the pace of the last {RECENT} events"
    )


def _summary(run: WatchedRun, now: float) -> dict[str, Any]:
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


def _trial_row(name: str, trial: TrialState) -> list[Cell]:
    status = _status(trial)
    colour = {"failed": "red", "live": "cyan", "waiting": "", "no gain": "yellow"}.get(status, "green")
    loss = trial.loss if trial.live else None
    return [name, (status, colour), trial.step, trial.max_steps, loss, trial.metric, trial.value, trial.reason]


def _trial_document(name: str, trial: TrialState) -> dict[str, Any]:
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


def _status(trial: TrialState) -> str:
    if trial.finished:
        return trial.status or "finished"
    return "live" if trial.live else "waiting"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
