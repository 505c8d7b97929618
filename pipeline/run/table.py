"""The table at the end of a run."""

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.run.results import RefusedTask, TaskResult

_COLOUR = {
    "tuned": "green",
    "stopped early": "green",
    "halved": "green",
    "no gain": "yellow",
    "not learned": "yellow",
    "failed": "red",
}


def results_table(results: Sequence[TaskResult | RefusedTask]) -> Table:
    """One row per result, in the order given; a column of `test` or of a constant answer only if any result has one."""
    columns: list[tuple[str, Callable[[TaskResult | RefusedTask], float | None]]] = [
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


def print_results(console: Console, results: Sequence[TaskResult | RefusedTask]) -> None:
    """The table, then one sentence per task that failed or has not learned."""
    console.print(results_table(results))
    for result in results:
        if result.status == "failed":
            reason = result.reason or "no reason was recorded"
            console.print(f"{result.trial} failed: {reason}", markup=False, highlight=False, soft_wrap=True)
        elif result.status == "not learned":
            told = "has not learned and is withheld" if result.withheld else "has not learned"
            console.print(f"{result.trial} {told}: {result.reason}", markup=False, highlight=False, soft_wrap=True)
