#!/usr/bin/env python
"""Train an encoder-decoder further on plain text before prompts are tuned on it, or pre-train a small one.

    python jobs/adapt_backbone.py --config FILE
    ray job submit --working-dir . -- python jobs/adapt_backbone.py --config FILE

The objective `prefix_lm` is LM adaptation (Lester et al. 2021, section 3.2), and `span_corruption` is T5's own
pre-training (Raffel et al. 2020). The job leaves ordinary model folders for the steps of `save_at` and the last one:
`<run.storage>/<run.name>/models/step-…`. Name one as `model.path` of jobs/tune_prompts.py. Started again with the same
run name, the job resumes. Settings: docs/adaptation.md.

Exit codes: 0 done, 2 bad input, 5 interrupted by lost workers, a full disk, SIGTERM or Ctrl-C (start again to resume),
7 another start of the same run is under way.
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

from pipeline.run.terminal import ending_in_a_sentence  # noqa: E402
from pipeline.settings import AdaptationSettings, load_adaptation  # noqa: E402
from pipeline.tuning.interruption.signals import sigterm_is_ctrl_c  # noqa: E402
from pipeline.tuning.interruption.supervision import supervised  # noqa: E402


def main(
    config: Annotated[Path, typer.Option(help="Settings file (YAML).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: optimizer.lr=0.002. May be repeated.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Check everything and show what would be done.")] = False,
) -> None:
    """Train an encoder-decoder further on plain text, or pre-train a small one."""
    console = Console(soft_wrap=True, width=None if sys.stdout.isatty() else 120)
    sigterm_is_ctrl_c()
    with ending_in_a_sentence("run"):
        _run(load_adaptation(config, overrides or []), console, plan)


def _run(settings: AdaptationSettings, console: Console, plan_only: bool) -> None:
    # Imported late: torch, transformers and Ray take seconds, and a mistyped setting should not wait.
    from pipeline.lab.adapt.job import check_adaptation, run_adaptation
    from pipeline.reporting.words import duration, millions

    checked = check_adaptation(settings)
    if plan_only:
        model, corpus = settings.model.path or "a fresh model", checked.plan.source
        console.print(f"{model}: {checked.start.config.model_type}, objective {settings.objective.name}", markup=False)
        console.print(f"{corpus.rows} rows in {len(corpus.files)} file(s)", markup=False)
        a_step = f"{settings.batch_size} stretches of {settings.tokens} tokens"
        seen = settings.steps * settings.batch_size * settings.tokens
        console.print(f"{settings.steps} steps of {a_step}: {seen:,} tokens")
        return
    adapted = run_adaptation(checked, console)
    console.print(f"Trained {millions(adapted.trained_parameters)} parameters in {duration(adapted.seconds)}.")
    for step, folder in adapted.models.items():
        console.print(f"  step {step}: {folder}", markup=False, highlight=False)


if __name__ == "__main__":
    supervised(lambda: typer.run(main))
