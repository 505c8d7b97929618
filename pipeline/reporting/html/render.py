"""Renders a night as its page."""

from collections import Counter
from collections.abc import Sequence
from typing import get_args

from pipeline.reporting import words
from pipeline.reporting.html import plots
from pipeline.reporting.html.night import Decision, NightReport, TaskNight
from pipeline.reporting.html.pages import TEMPLATES, environment, own_texts

MOST_OPEN = 12
"""With more tasks than this, a task's plots and rows are folded until the reader opens them."""
_FILTERS = (
    words.figure,
    words.signed,
    words.chance,
    words.duration,
    words.size,
    words.moment,
    words.counted,
    words.share,
)
_PLOTS = (
    plots.loss_plot,
    plots.metric_plot,
    plots.history_plot,
    plots.history_spark,
    plots.loss_spark,
    plots.undrawn,
)


def render(report: NightReport) -> str:
    """The page, as HTML that needs nothing else: it may be mailed, or opened years later.

    All texts of the report are escaped, and the page's policy allows no script but its own few lines.
    """
    order = {decision: place for place, decision in enumerate(get_args(Decision))}
    tasks = sorted(report.tasks, key=lambda task: (order[task.decision], task.name))
    changed = [task for task in tasks if task.decision != "carried"]
    carried = [task for task in tasks if task.decision == "carried"]
    page = environment(TEMPLATES)
    page.filters |= {word.__name__: word for word in _FILTERS}
    page.globals |= {plot.__name__: plot for plot in _PLOTS}
    return page.get_template("night.html.jinja").render(
        night=report,
        tasks=tasks,
        changed=changed,
        carried=carried,
        decisions=Counter(task.decision for task in tasks),
        failed=[task for task in tasks if task.decision == "failed"],
        tuned=[task for task in tasks if task.trained],
        splits=_splits(tasks),
        statuses=_statuses(tasks),
        open=len(tasks) <= MOST_OPEN,
        **own_texts(TEMPLATES, ["night.css"], ["night.js"]),
    )  # fmt: skip


def _splits(tasks: Sequence[TaskNight]) -> dict[str, Counter[str]]:
    """Rows of all tasks, by split and status."""
    found: dict[str, Counter[str]] = {}
    for task in tasks:
        for split, counts in task.rows.items():
            found.setdefault(split, Counter()).update(counts)
    return found


def _statuses(tasks: Sequence[TaskNight]) -> list[str]:
    """Statuses of all rows: `ok` first, then the others in the order in which they occur."""
    met = {status: None for task in tasks for counts in task.rows.values() for status, rows in counts.items() if rows}
    return ["ok", *(status for status in met if status != "ok")]
