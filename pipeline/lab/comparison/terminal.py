"""What a comparison prints on the terminal: its plan beforehand, and a table at its end."""

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.lab.comparison.derived_settings import training_grid
from pipeline.lab.comparison.results import Results, by_method, with_spread
from pipeline.reporting.words import ABSENT
from pipeline.run.checks import CheckedRun, print_plan


def print_compared(checked: CheckedRun, console: Console) -> None:
    """The prompts' trials as the main job would plan them, then the other methods."""
    print_plan(checked, console)
    compare, tasks = checked.settings.compare, checked.settings.tasks
    lines = []
    if compare.hard_prompts is not None:
        hard = compare.hard_prompts
        shots = [*([0] if hard.zero_shot else []), *hard.shots]
        lines.append(f"hard prompts: {', '.join(map(str, shots))} solved rows, {len(hard.text)} task(s) with a text")
    for method, training in (("LoRA", compare.lora), ("fine-tuning", compare.fine_tuning)):
        if training is not None:
            count = len(list(training_grid(training, list(tasks), compare.seeds)))
            lines.append(f"{method}: lr {' or '.join(f'{rate:g}' for rate in training.lr)}, {count} training(s) in all")
    if compare.transfer is not None:
        starts = sum(map(len, compare.transfer.starts.values()))
        matrix = f", every prompt on all {len(tasks)} tasks" if compare.transfer.matrix else ""
        lines.append(f"transfer: {starts} start(s) from other tasks{matrix}")
    for task, others in compare.domain_shift.items():
        lines.append(f"domain shift: trained on {task}, tested on {', '.join(others)}")
    lines.append(f"seeds: {compare.seeds} of every method; test rows: {compare.test_rows or 'all'}")
    for line in lines:
        console.print(line, markup=False, highlight=False)


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
