"""Whether the alias may move to tonight's version: the run's own conditions, over what became of its tasks."""

from collections.abc import Sequence

from pipeline.refresh.record import Condition, TaskRecord
from pipeline.settings import RefreshSettings


def check_conditions(tasks: Sequence[TaskRecord], settings: RefreshSettings) -> tuple[Condition, ...]:
    """Each condition with what was found."""
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
