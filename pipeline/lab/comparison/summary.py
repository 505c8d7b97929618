"""The table at the end of a comparison, on the terminal."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.lab.comparison.results import Results, by_method, with_spread
from pipeline.reporting.words import ABSENT


def print_summary(console: Console, results: Results) -> None:
    """Test metric of every method's best choice (by dev) on every task, mean ± standard deviation over seeds."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("test metric", overflow="fold")
    for facts in results.tasks:
        own = facts.name if "test" in facts.rows else f"{facts.name} (dev)"
        table.add_column(escape(own), justify="right")
    for method, rows in by_method(results.rows).items():
        of_task = {row.task: row for row in rows}
        cells = [of_task.get(facts.name) for facts in results.tasks]
        table.add_row(escape(method), *(ABSENT if row is None else with_spread(row.shown) for row in cells))
    console.print(table)
    for task, reason in results.left_out.items():
        console.print(f"left out: {task}: {reason}", markup=False, highlight=False)
    for number in results.numbers:
        if number.failed is not None:
            console.print(f"{number.name} failed: {number.failed}", markup=False, highlight=False)
