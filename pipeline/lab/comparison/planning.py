"""`--plan`: what a comparison would do, for people."""

from rich.console import Console

from pipeline.lab.comparison.training import jobs_of
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
            count = len(list(jobs_of(training, list(tasks), compare.seeds)))
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
