"""What a night does with each task: a pure function of tonight's digests and of what the alias' version has.

carried    nothing changed since it was tuned, or since a new prompt was last tuned and refused: no training
warm       its corpus, templates or settings changed: tuned from the bank's prompt
cold       a new task, one whose last record is a failure, or one whose old prompt is nothing to start from
retune     it has a prompt of another backbone: tuned from the start, with nothing to compare it with
removed    the settings name it no longer: it leaves
unusable   its corpus or settings cannot be used tonight: its prompt stays, and the reason is told
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from pipeline.bank import PromptRecord

Decision = Literal["carried", "warm", "cold", "retune", "removed", "unusable"]


@dataclass(frozen=True)
class TaskInputs:
    """What decides a task's prompt, as it is tonight."""

    inputs_digest: str
    """`tuning.trials.inputs_digest`: corpus, templates and settings."""
    corpus_digest: str
    lengths: frozenset[int]
    """Prompt lengths of its trials."""


@dataclass(frozen=True)
class PlannedTask:
    task: str
    decision: Decision
    why: str
    """In one sentence."""
    incumbent: PromptRecord | None = None
    """The alias' record, where its prompt belongs to tonight's backbone: carried, or what the new one must match."""

    @property
    def trains(self) -> bool:
        return self.decision in ("warm", "cold", "retune")


def plan_night(
    tasks: Mapping[str, TaskInputs | str],
    incumbents: Mapping[str, PromptRecord],
    same_backbone: bool,
    others: Collection[str] = (),
    foreign: Collection[str] = (),
) -> tuple[PlannedTask, ...]:
    """The tasks of the settings in their order, then those that leave.

    tasks: what each is tonight, or why it cannot be used.
    incumbents: the records of the alias' version, of failed tasks too.
    others: more names that the bank's newest version would pass on.
    foreign: incumbents that were tuned on another backbone than the version's, and are none of tonight's.
    """
    plan = [
        _planned(name, task, incumbents.get(name), same_backbone and name not in foreign)
        for name, task in tasks.items()
    ]
    leaving = sorted({*incumbents, *others} - set(tasks))
    return (*plan, *(PlannedTask(name, "removed", "the settings have no such task any more") for name in leaving))


def without_incumbent(planned: PlannedTask, reason: str) -> PlannedTask:
    """The plan of a task whose prompt cannot be read from the bank."""
    why = f"{planned.why}; tuned from the start, since its prompt cannot be read: {reason}"
    return replace(planned, decision="cold", why=why, incumbent=None)


def _planned(name: str, task: TaskInputs | str, record: PromptRecord | None, same_backbone: bool) -> PlannedTask:
    incumbent = record if record is not None and record.digest is not None and same_backbone else None
    if isinstance(task, str):
        return PlannedTask(name, "unusable", task, incumbent)
    if record is None:
        return PlannedTask(name, "cold", "a new task")
    if record.digest is None:
        return PlannedTask(name, "cold", "it failed when it was last tuned")
    if incumbent is None:
        return PlannedTask(name, "retune", "the bank's prompt belongs to another backbone")
    if record.inputs_digest == task.inputs_digest:
        refused = "unchanged since a new prompt was tuned and not taken"
        return PlannedTask(name, "carried", refused if record.status == "kept" else "nothing changed", incumbent)
    why = _what_changed(record, task)
    if record.length not in task.lengths:
        lengths = ", ".join(map(str, sorted(task.lengths)))
        why += f"; prompt.length is {lengths} and was {record.length}, so tuned from the start"
        return PlannedTask(name, "cold", why, incumbent)
    return PlannedTask(name, "warm", why, incumbent)


def _what_changed(record: PromptRecord, task: TaskInputs) -> str:
    if record.corpus_digest != task.corpus_digest:
        return "its corpus changed"
    if record.inputs_digest is None:
        return "the bank does not tell what it was tuned from"
    return "its settings or templates changed"
