#!/usr/bin/env python
"""Tune the soft prompts of every task in a settings file, and publish a version of the prompt bank.

    python jobs/tune_prompts.py --config jobs/configs/sentiment.yaml --set tasks.sst2.max_steps=50
    ray job submit --working-dir . -- python jobs/tune_prompts.py --config jobs/configs/sentiment.yaml

Without --config it runs the quickstart. Started again with the same run name, it goes on where it
was stopped. Exit codes: 0 every prompt published, 2 bad input, 3 some published, 4 none published,
5 interrupted by lost workers, a full disk, SIGTERM or Ctrl-C (start again to resume),
7 another start of the same run is under way (nothing was touched).
"""

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Ray puts the script's own folder first, not the project's
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from pipeline.run.terminal import console_for, ending_in_a_sentence, in_rays_copy, warn_of_rays_copy  # noqa: E402
from pipeline.settings import Settings, load_settings  # noqa: E402
from pipeline.tuning.interruption.signals import sigterm_is_ctrl_c  # noqa: E402
from pipeline.tuning.interruption.supervision import supervised  # noqa: E402

if TYPE_CHECKING:
    from pipeline.run.job import RunResult

QUICKSTART = ROOT / "jobs" / "configs" / "quickstart.yaml"


def main(
    config: Annotated[Path | None, typer.Option(help="Settings file (YAML); without it, the quickstart.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: tasks.sst2.max_steps=50. May be repeated.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Check everything and show what would be done.")] = False,
) -> None:
    """Tune the soft prompts of every task in a settings file, and publish a version of the prompt bank."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    sigterm_is_ctrl_c()
    with ending_in_a_sentence("run"):
        settings = load_settings(config or QUICKSTART, overrides or [])
        if config is None:
            if in_rays_copy():
                os.chdir(Path.home())  # what is written into the copy is deleted with it
            _make_quickstart_corpora(settings)
        else:
            warn_of_rays_copy(settings, console_for(settings, console))
        # Imported late: torch, transformers and Ray take seconds, and a mistyped setting should not wait.
        from pipeline.run.checks import check_run, print_plan
        from pipeline.run.job import run_job

        checked = check_run(settings)
        if plan:
            print_plan(checked, console)
            raise typer.Exit()
        console = console_for(settings, console)
        result = run_job(checked, console)
        _tell(result, settings, console)
        raise typer.Exit(int(result.exit))


def _tell(result: "RunResult", settings: Settings, console: Console) -> None:
    """The table of results, where the report and the bank are, and what to do next."""
    from pipeline.run.table import print_results

    print_results(console, result.results)
    if result.report is not None:
        console.print(f"Report: {result.report}", markup=False, highlight=False)
    bank = Path(settings.bank.uri).expanduser()
    if result.version is None:
        console.print(f"No prompt was published; the bank {bank} is as it was.")
        return
    console.print(f"Published version {result.version} of the bank {bank.resolve()} (alias {settings.bank.alias}).")
    published = [task.task for task in result.results if task.status != "failed" and not task.withheld]
    alias = [] if settings.bank.alias == "latest" else ["--alias", settings.bank.alias]
    here = Path(sys.executable)
    python = str(here.relative_to(Path.cwd())) if here.is_relative_to(Path.cwd()) else "python"
    words = [python, "jobs/ask.py", "--bank", str(bank), *alias, "--model", settings.model.path]
    ask = shlex.join([*words, "--task", published[0], "your text"])
    console.print(f"Next, ask a prompt something:\n  {ask}", markup=False, highlight=False)


def _make_quickstart_corpora(settings: Settings) -> None:
    from jobs.make_quickstart_corpora import make_corpora

    train = next(iter(settings.tasks.values())).train
    assert isinstance(train, str)
    make_corpora(Path(train).parents[1])


if __name__ == "__main__":
    supervised(lambda: typer.run(main))
