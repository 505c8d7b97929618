"""`runs ls`, `runs show` and `runs tail`: what is running, how far it is, and when it will be done."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli import output
from pipeline.cli.options import JsonOption
from pipeline.cli.run_figures import (
    RUN_COLUMNS,
    TRIAL_COLUMNS,
    run_document,
    run_fields,
    run_row,
    silence,
    trial_document,
    trial_row,
)
from pipeline.errors import StorageError
from pipeline.reporting.events import EventTail
from pipeline.reporting.sentences import Narrator
from pipeline.reporting.watched import WatchedRun, find_runs, read_run
from pipeline.reporting.words import counted

_POLL_SECONDS = 0.5


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
def list_runs(storage: Storage = Path("./runs"), as_json: JsonOption = False) -> None:
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
    found = []
    for folder in _known_runs(storage):
        try:
            found.append(read_run(folder, str(folder.relative_to(storage))))
        except StorageError as error:  # of one run; the others are shown
            output.write_error(str(error))
    found.sort(key=lambda run: run.pace.last or 0.0, reverse=True)
    if as_json:
        output.write_json({"storage": str(storage), "runs": [run_document(run, now) for run in found]})
        return
    output.write_table(RUN_COLUMNS, [run_row(run, now) for run in found])
    output.note(f"{counted(len(found), 'run')} in {storage}; more of one: promptbank runs show RUN")


@runs.command("show")
def show_run(run: Run, storage: Storage = Path("./runs"), as_json: JsonOption = False) -> None:
    """Show how far a run is, and each of its trials.

    Examples:

    \b
    promptbank runs show sentiment
    promptbank runs show /shared/runs/sentiment --json
    """
    now = time.time()
    watched = _read(run, storage)
    if as_json:
        trials = [trial_document(name, trial) for name, trial in watched.state.trials.items()]
        output.write_json({**run_document(watched, now), "trials": trials})
        return
    output.write_fields(run_fields(watched, now))
    if watched.state.trials:
        output.write("\n")
        rows = [trial_row(name, trial) for name, trial in watched.state.trials.items()]
        reason = len(TRIAL_COLUMNS) - 1
        if not output.on_terminal():
            output.write_table(TRIAL_COLUMNS, rows)
            return
        output.write_table(TRIAL_COLUMNS[:reason], [row[:reason] for row in rows])
        for name, trial in watched.state.trials.items():
            if trial.reason:
                output.note(f"{name} {trial.status}: {trial.reason}")


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
            output.write_error(silence(watched, time.time()))
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
