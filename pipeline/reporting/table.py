"""The table at the end of a run."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLOUR = {"tuned": "green", "stopped early": "green", "halved": "green", "no gain": "yellow", "failed": "red"}


@dataclass(frozen=True)
class TrialResult:
    trial: str
    task: str
    steps: int
    metric: str
    dev_before: float | None
    """Dev metric of the prompt as it was initialised."""
    dev_after: float | None
    """Dev metric of the best prompt, the one published."""
    test: float | None
    status: str
    """tuned | stopped early | halved | no gain | failed"""
    reason: str | None = None
    """Why the trial failed, in one sentence."""
    among: str | None = None
    """Which trials of its sweep it was chosen from: `best of 12 (8 halved)`."""


def results_table(results: Sequence[TrialResult]) -> Table:
    """One row per result, in the order given; the column `test` only if any trial has a test metric."""
    with_test = any(result.test is not None for result in results)
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("trial", "task"):
        table.add_column(name, overflow="fold")
    table.add_column("steps", justify="right")
    table.add_column("metric")
    for name in ("dev before", "dev after", *(["test"] if with_test else [])):
        table.add_column(name, justify="right")
    table.add_column("status")
    for result in results:
        values = [result.dev_before, result.dev_after, *([result.test] if with_test else [])]
        status = result.status if result.among is None else f"{result.status}, {result.among}"
        colour = _COLOUR.get(result.status, "default")
        table.add_row(
            escape(result.trial),
            escape(result.task),
            str(result.steps),
            result.metric,
            *("–" if value is None else f"{value:.3f}" for value in values),
            f"[{colour}]{escape(status)}[/]",
        )
    return table


def print_results(console: Console, results: Sequence[TrialResult]) -> None:
    """The table, then one sentence per failed trial."""
    console.print(results_table(results))
    for result in results:
        if result.status == "failed":
            reason = result.reason or "no reason was recorded"
            console.print(f"{result.trial} failed: {reason}", markup=False, highlight=False, soft_wrap=True)
