#!/usr/bin/env python
"""Refresh a prompt bank: tune again what changed since its alias' version, and publish what is not worse.

    python jobs/refresh_prompts.py --config FILE             # every night, by a scheduler
    python jobs/refresh_prompts.py --config FILE --plan      # what tonight would do; trains nothing
    ray job submit --working-dir . -- python jobs/refresh_prompts.py --config FILE

The settings file is that of jobs/tune_prompts.py; the block `refresh` is this job's. A night is a run of its own, named
`<run.name>-<date>`: started again with the same date, a night that was stopped goes on, and one that has published does
nothing. Give --date where a night may begin before midnight and be started again after it. Everything that a report
needs is in `<run.storage>/<run.name>-<date>/night.json`.

Exit codes: 0 refreshed, or nothing to do; 2 bad input, nothing published; 3 published, but some tasks failed or their
new prompt was worse; 4 nothing published, since every task that had to be tuned failed; 5 interrupted by lost workers,
a full disk, SIGTERM or Ctrl-C (start the same night again to resume); 6 published, but a condition did not hold and the
alias stays; 7 another night of this run is under way (start again later); 1 a defect of ours.
"""

import datetime
import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Ray puts the script's own folder first, not the project's
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from pipeline.run.terminal import console_for, ending_in_a_sentence, warn_of_rays_copy  # noqa: E402
from pipeline.settings import Settings, load_settings  # noqa: E402
from pipeline.tuning.interruption.signals import sigterm_is_ctrl_c  # noqa: E402
from pipeline.tuning.interruption.supervision import supervised  # noqa: E402


def main(
    config: Annotated[Path, typer.Option(help="Settings file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: refresh.alpha=0.01. May be repeated.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Show what would be done, and train nothing.")] = False,
    date: Annotated[str | None, typer.Option(help="The night's name after run.name; today's date without it.")] = None,
) -> None:
    """Tune again what changed since the bank's alias, publish what is not worse, and move the alias if all is well."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    sigterm_is_ctrl_c()
    with ending_in_a_sentence("night"):
        settings = load_settings(config, overrides or [])
        night = date or datetime.date.today().isoformat()
        raise typer.Exit(_plan(settings, night, console) if plan else _run(settings, night, console))


def _plan(settings: Settings, date: str, console: Console) -> int:
    # Imported late: torch, transformers and Ray take seconds, and a mistyped setting should not wait.
    from pipeline.refresh.night import plan_night_only
    from pipeline.refresh.tables import print_plan

    with tempfile.TemporaryDirectory() as folder:
        found = plan_night_only(settings, date, Path(folder), console)
    print_plan(console, found.plan, found.bank.version)
    return 0


def _run(settings: Settings, date: str, console: Console) -> int:
    from pipeline.refresh.night import run_night
    from pipeline.refresh.tables import print_night

    console = console_for(settings, console)
    warn_of_rays_copy(settings, console)
    record = run_night(settings, date, console)
    print_night(console, record)
    folder = Path(settings.run.storage).expanduser() / record.run
    console.print(f"Record: {folder / 'night.json'}", markup=False, highlight=False)
    assert record.exit_code is not None, "a night that came to its end has one"
    return record.exit_code


if __name__ == "__main__":
    supervised(lambda: typer.run(main))
