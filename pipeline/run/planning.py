"""`--plan`: what a run would do, for people."""

import os

from rich.console import Console

from pipeline.reporting.plan import PlanRow, memory_table, plan_table
from pipeline.reporting.words import millions
from pipeline.run.checks import CheckedRun


def print_plan(checked: CheckedRun, console: Console) -> None:
    """The tasks with their rows, trials and steps; the model; memory per rank."""
    settings = checked.settings
    console.print(plan_table([_planned(checked, name) for name in checked.plans]))
    for plan in checked.plans.values():
        for remark in plan.left_out:
            console.print(remark, markup=False)
    for name, error in checked.refused.items():
        console.print(f"left out: {name}: {error}", markup=False)
    memory = checked.memory
    console.print(
        f"model {settings.model.path}: {checked.config.model_type}, {millions(memory.parameters)} parameters, "
        f"{settings.model.weights}, backbone {checked.identity.fingerprint[:12]}",
        markup=False,
    )
    console.print(memory_table(memory.parts, settings.cluster.num_workers))
    if settings.cluster.partition == "auto" and settings.cluster.num_workers > 1:
        console.print("(partitioned; where every rank has room for four times the whole model, each holds it whole)")
    storage, bank = (os.path.expanduser(place) for place in (settings.run.storage, settings.bank.uri))
    console.print(f"run {storage}/{settings.run.name} -> bank {bank} ({settings.bank.alias})", markup=False)


def _planned(checked: CheckedRun, name: str) -> PlanRow:
    task, plan = checked.settings.tasks[name], checked.plans[name]
    trials = task.trials(name).values()
    return PlanRow(
        task=name,
        train_rows=plan.rows["train"],
        dev_rows=None if task.dev_fraction else plan.rows["dev"],
        test_rows=plan.rows.get("test"),
        trials=len(trials),
        max_steps=task.max_steps,
        prompt_length=max(trial.prompt.length for trial in trials),
        metric=task.metric,
        dev_fraction=task.dev_fraction,
    )
