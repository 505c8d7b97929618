"""The table at the end of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLOUR = {
    "tuned": "green",
    "stopped early": "green",
    "halved": "green",
    "no gain": "yellow",
    "not learned": "yellow",
    "failed": "red",
}


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
    """tuned | stopped early | halved | no gain | not learned | failed"""
    reason: str | None = None
    """Why the trial failed, or has not learned, in one sentence."""
    among: str | None = None
    """Which trials of its sweep it was chosen from: `best of 12 (8 halved)`."""
    dev_constant: float | None = None
    """Dev metric of always giving train's most frequent target."""
    test_constant: float | None = None
    withheld: bool = False
    """Whether it has not learned, and so was not published."""


def results_table(results: Sequence[TrialResult]) -> Table:
    """One row per result, in the order given; a column of `test` or of a constant answer only if any result has one."""
    columns: list[tuple[str, Callable[[TrialResult], float | None]]] = [
        ("dev before", lambda result: result.dev_before),
        ("constant", lambda result: result.dev_constant),
        ("dev after", lambda result: result.dev_after),
        ("constant (test)", lambda result: result.test_constant),
        ("test", lambda result: result.test),
    ]
    kept = [(name, of) for name, of in columns if name.startswith("dev") or any(of(one) is not None for one in results)]
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("trial", "task"):
        table.add_column(name, overflow="fold")
    table.add_column("steps", justify="right")
    table.add_column("metric")
    for name, _ in kept:
        table.add_column(name, justify="right")
    table.add_column("status")
    for result in results:
        values = [of(result) for _, of in kept]
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
    """The table, then one sentence per trial that failed or has not learned."""
    console.print(results_table(results))
    for result in results:
        if result.status == "failed":
            reason = result.reason or "no reason was recorded"
            console.print(f"{result.trial} failed: {reason}", markup=False, highlight=False, soft_wrap=True)
        elif result.status == "not learned":
            told = "has not learned and is withheld" if result.withheld else "has not learned"
            console.print(f"{result.trial} {told}: {result.reason}", markup=False, highlight=False, soft_wrap=True)
