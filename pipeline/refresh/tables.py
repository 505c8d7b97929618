"""A night on the terminal: what it would do, and what became of every task."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.refresh.plan import PlannedTask
from pipeline.refresh.record import NightRecord, TaskRecord

_COLOUR = {"promoted": "green", "carried": "default", "kept": "yellow", "failed": "red", "removed": "yellow"}


def print_plan(console: Console, plan: Sequence[PlannedTask], version: int | None) -> None:
    """One row per task, with the reason."""
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("task", "tonight", "why"):
        table.add_column(name, overflow="fold")
    for planned in plan:
        table.add_row(escape(planned.task), planned.decision, escape(planned.why))
    console.print(table)
    against = "an empty bank" if version is None else f"version {version}"
    trained = sum(planned.trains for planned in plan)
    console.print(f"Compared with {against}: {trained} of {len(plan)} task(s) would be tuned.", highlight=False)


def print_night(console: Console, record: NightRecord) -> None:
    """The table, a sentence for each task that was kept or failed, and how the night ended."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("task", overflow="fold")
    for name in ("tonight", "metric"):
        table.add_column(name)
    for name in ("bank's", "constant", "new", "p", "warm", "cold"):
        table.add_column(name, justify="right")
    table.add_column("result")
    for task in record.tasks:
        figures = (
            _number(value) for value in (task.incumbent, task.constant, task.new, task.p_value, task.warm, task.cold)
        )
        result = f"[{_COLOUR.get(task.result, 'default')}]{task.result}[/]"
        if task.result == "promoted" and task.learned is False:
            result = "[yellow]promoted, not learned[/]"
        table.add_row(escape(task.task), task.decision, task.metric or "–", *figures, result)
    console.print(table)
    for task in record.tasks:
        if task.reason:
            console.print(f"{task.task} {_told(task)}: {task.reason}", markup=False, highlight=False, soft_wrap=True)
    console.print(record.outcome, markup=False, highlight=False, soft_wrap=True)


def _told(task: TaskRecord) -> str:
    if task.result == "promoted":
        return "promoted, though it has not learned" if task.learned is False else "promoted"
    return task.result if task.result == "kept" or not task.stays else f"{task.result}, and its prompt stays"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
