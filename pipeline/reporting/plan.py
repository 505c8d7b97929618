"""The plan of a run, printed before the run starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class PlanRow:
    task: str
    train_rows: int
    dev_rows: int | None
    """None when dev is a share of train: `dev_fraction` is then given."""
    test_rows: int | None
    trials: int
    max_steps: int
    """Of each trial."""
    prompt_length: int
    """In tokens; the longest of the task's trials."""
    metric: str
    dev_fraction: float | None = None
    unlabelled_rows: int | None = None
    """Of the task's teacher, if it has some; the column is there where a task has."""


def plan_table(tasks: Sequence[PlanRow]) -> Table:
    """One row per task and, below, the totals over all tasks; rows are counted before any is dropped."""
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    steps = sum(task.trials * task.max_steps for task in tasks)
    unlabelled = [task.unlabelled_rows for task in tasks]
    some = any(rows is not None for rows in unlabelled)
    table.add_column("task", footer="total", overflow="fold")
    for name, footer in (
        ("train", _count(sum(task.train_rows for task in tasks))),
        ("dev", _total([task.dev_rows for task in tasks])),
        ("test", _count(sum(task.test_rows or 0 for task in tasks))),
        *([("unlabelled", _count(sum(rows or 0 for rows in unlabelled)))] if some else []),
        ("trials", _count(sum(task.trials for task in tasks))),
        ("steps", _count(steps)),
        ("prompt", ""),
    ):
        table.add_column(name, footer=footer, justify="right")
    table.add_column("metric")
    for task in tasks:
        share = "–" if task.dev_fraction is None else f"{task.dev_fraction:.0%} of train"
        table.add_row(
            escape(task.task),
            _count(task.train_rows),
            share if task.dev_rows is None else _count(task.dev_rows),
            "–" if task.test_rows is None else _count(task.test_rows),
            *(["–" if task.unlabelled_rows is None else _count(task.unlabelled_rows)] if some else []),
            _count(task.trials),
            _count(task.max_steps),
            _count(task.prompt_length),
            task.metric,
        )
    return table


def memory_table(bytes_per_rank: Mapping[str, int], ranks: int) -> Table:
    """Bytes that each rank holds, by part and in total, and the same over all ranks."""
    total = sum(bytes_per_rank.values())
    table = Table(box=box.SIMPLE_HEAD, show_footer=True)
    table.add_column("memory (estimated)", footer="total")
    table.add_column("per rank", footer=_size(total), justify="right")
    table.add_column(f"{ranks} rank{'s' if ranks != 1 else ''}", footer=_size(total * ranks), justify="right")
    for part, held in bytes_per_rank.items():
        table.add_row(escape(part), _size(held), _size(held * ranks))
    return table


def _size(count: int) -> str:
    """Bytes in decimal units: `1.50 GB`."""
    for unit, bound in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= bound:
            return f"{count / bound:.2f} {unit}"
    return f"{count} B"


def _total(rows: Sequence[int | None]) -> str:
    known = [count for count in rows if count is not None]
    return _count(sum(known)) if len(known) == len(rows) else ""


def _count(value: int) -> str:
    return f"{value:,}"
