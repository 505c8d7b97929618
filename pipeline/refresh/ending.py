"""How a night ends: whether the alias may move, the exit code for a scheduler, and one sentence for people."""

from collections.abc import Sequence
from enum import IntEnum

from pipeline.errors import PromptBankError
from pipeline.refresh.record import NightRecord, TaskRecord
from pipeline.reporting.html import Condition
from pipeline.run.terminal import exit_code_of
from pipeline.settings import RefreshSettings


class NightExit(IntEnum):
    """Exit codes of the job; 1 is Python's own, for a defect."""

    REFRESHED = 0
    BAD_INPUT = 2
    SOME_NOT_REFRESHED = 3
    NONE_PUBLISHED = 4
    INTERRUPTED = 5
    ALIAS_STAYED = 6
    LEASE_HELD = 7


DEFECT = 1
"""Python's own code."""


def exit_of(error: BaseException) -> int:
    """The exit code of a night that this error stopped."""
    if isinstance(error, PromptBankError):
        return exit_code_of(error)
    return NightExit.INTERRUPTED if isinstance(error, KeyboardInterrupt) else DEFECT


def check_conditions(tasks: Sequence[TaskRecord], settings: RefreshSettings) -> tuple[Condition, ...]:
    """The run's own conditions for moving the alias, each with what was found."""
    due = [task for task in tasks if task.decision not in ("carried", "removed")]
    # One whose new prompt was refused counts: the gate did its work, and a version in which the old one stays is good.
    refreshed = [task for task in due if task.result != "failed"]
    share = len(refreshed) / len(due) if due else 1.0
    enough = Condition(
        "share of tasks refreshed",
        share >= settings.min_refreshed,
        f"{len(refreshed)} of {len(due)} tasks that had to be tuned did not fail; "
        f"min_refreshed is {settings.min_refreshed:g}",
    )
    of_name = {task.task: task for task in tasks}
    bad = [f"'{name}' {_harm(of_name.get(name))}" for name in settings.canaries if _harm(of_name.get(name))]
    canaries = Condition(
        "no canary worse",
        not bad,
        "; ".join(bad) or f"none of {len(settings.canaries)} canary task(s) failed or came out worse",
    )
    return (enough, canaries) if settings.canaries else (enough,)


def _harm(task: TaskRecord | None) -> str:
    if task is None or task.result == "failed":
        return "failed"
    return "came out worse" if task.worse else ""


def verdict(record: NightRecord, version: int | None) -> tuple[NightExit, str]:
    """Exit code and sentence of a night that came to its end; `version` is the one that it published, if any."""
    failed = sum(task.result == "failed" for task in record.tasks)
    worse = sum(task.worse for task in record.tasks)
    promoted = sum(task.result == "promoted" for task in record.tasks)
    if version is None:
        if failed:
            return (
                NightExit.NONE_PUBLISHED,
                f"Nothing was published: {failed} task(s) failed, and no other had changed.",
            )
        return NightExit.REFRESHED, "Nothing had changed: the bank is as it was."
    told = f"Version {version} is published: {promoted} new prompt(s), {failed} task(s) failed, {worse} came out worse"
    unlearned = sum(task.result == "promoted" and task.learned is False for task in record.tasks)
    told += f", {unlearned} of the new have not learned" if unlearned else ""
    if not record.alias_may_move:
        broken = "; ".join(condition.found for condition in record.conditions if not condition.held)
        return NightExit.ALIAS_STAYED, f"{told}. The alias '{record.alias}' stays where it was: {broken}."
    code = NightExit.SOME_NOT_REFRESHED if failed or worse else NightExit.REFRESHED
    return code, f"{told}. The alias '{record.alias}' follows."
