#!/usr/bin/env python
"""Compare tuned prompts with other methods on your own model and tasks, and leave one report.

    python jobs/compare_methods.py --config jobs/configs/compare_methods.yaml
    python jobs/compare_methods.py --config FILE --plan      # check everything, train nothing
    python jobs/compare_methods.py --join FILE --out FOLDER  # panels over finished comparisons: sizes, checkpoints
    ray job submit --working-dir . -- python jobs/compare_methods.py --config FILE

The settings file is that of jobs/tune_prompts.py, sweeps included, with a block `compare` for this job. The job leaves
`report.html`, `report.md` and `results.json` in `<run.storage>/<run.name>`, and beside them a bank of every trial's
prompt. The bank that the settings name is only read. Started again with the same run name, the job resumes.

Exit codes: 0 everything was compared, 2 bad input, 3 some tasks, trials or adapters failed (the report says which),
5 interrupted by lost workers, a full disk, SIGTERM or Ctrl-C (start again to resume), 7 another start
of the same comparison is under way, 1 a defect of ours.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # Ray puts the script's own folder first, not the project's
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer  # noqa: E402
from rich.console import Console  # noqa: E402

from pipeline.errors import SettingsError  # noqa: E402
from pipeline.run.terminal import console_for, ending_in_a_sentence, warn_of_rays_copy  # noqa: E402
from pipeline.settings import Settings, load_joined, load_settings  # noqa: E402
from pipeline.tuning.interruption.signals import sigterm_is_ctrl_c  # noqa: E402
from pipeline.tuning.interruption.supervision import supervised  # noqa: E402


def main(
    config: Annotated[Path | None, typer.Option(help="Settings file (YAML).")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: compare.seeds=5. May be repeated.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Check everything and show what would be compared.")] = False,
    join: Annotated[Path | None, typer.Option(help="Panels over finished comparisons (YAML); nothing is run.")] = None,
    out: Annotated[Path, typer.Option(help="Where --join leaves its page.")] = Path("joined"),
) -> None:
    """Compare tuned prompts with hard prompts, LoRA and fine-tuning, and leave one report."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    sigterm_is_ctrl_c()
    with ending_in_a_sentence("comparison"):
        if join is not None:
            raise typer.Exit(_join(join, out, console))
        if config is None:
            raise SettingsError("give --config FILE (a comparison to run) or --join FILE (finished comparisons)")
        settings = load_settings(config, overrides or [])
        warn_of_rays_copy(settings, console_for(settings, console))
        raise typer.Exit(_run(settings, console, plan))


def _run(settings: Settings, console: Console, plan_only: bool) -> int:
    # Imported late: torch, transformers and Ray take seconds, and a mistyped setting should not wait.
    from pipeline.lab.comparison.checks import check_model
    from pipeline.lab.comparison.derived_settings import comparison_settings
    from pipeline.lab.comparison.job import run_comparison
    from pipeline.lab.comparison.terminal import print_compared, print_summary
    from pipeline.run.checks import check_run

    checked = check_run(comparison_settings(settings), publishes=False)
    check_model(checked)
    if plan_only:
        print_compared(checked, console)
        return 0
    console = console_for(settings, console)
    outcome = run_comparison(checked, console)
    print_summary(console, outcome.results)
    for name in ("report.html", "report.md", "results.json"):
        console.print(f"{outcome.folder / name}", markup=False, highlight=False)
    return 3 if outcome.failed else 0


def _join(path: Path, out: Path, console: Console) -> int:
    from pipeline.lab.comparison.joined import join_panels
    from pipeline.lab.comparison.page.joined import joined_markdown, render_joined
    from pipeline.whole_files import write_atomically

    settings = load_joined(path)
    plots = join_panels(settings)
    write_atomically(out / "report.html", render_joined(settings.title, plots).encode())
    write_atomically(out / "report.md", joined_markdown(settings.title, plots).encode())
    console.print(f"{out / 'report.html'}", markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    supervised(lambda: typer.run(main))
