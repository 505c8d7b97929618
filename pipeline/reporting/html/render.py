"""From a night to its page."""

import base64
import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, get_args

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipeline.reporting import words
from pipeline.reporting.html import plots
from pipeline.reporting.html.night import Decision, NightReport, TaskNight

MOST_OPEN = 12
"""With more tasks than this, a task's plots and rows are folded away until they are asked for."""
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
_TEMPLATES = PackageLoader("pipeline.reporting.html", "templates")


def render(report: NightReport) -> str:
    """The page, as HTML that needs nothing else: it may be mailed, or opened years later.

    All texts of the report are escaped; besides, the page forbids the browser every script but its own few lines.
    """
    order = {decision: place for place, decision in enumerate(get_args(Decision))}
    tasks = sorted(report.tasks, key=lambda task: (order[task.decision], task.name))
    changed = [task for task in tasks if task.decision != "carried"]
    carried = [task for task in tasks if task.decision == "carried"]
    return _environment().get_template("night.html.jinja").render(
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
        **_own_files(),
    )  # fmt: skip


def _environment() -> Environment:
    environment = Environment(
        loader=_TEMPLATES, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {word.__name__: word for word in _FILTERS}
    environment.globals |= {plot.__name__: plot for plot in _PLOTS}
    return environment


def _own_files() -> dict[str, Any]:
    """Style and script, and the policy that allows these very texts and nothing else."""
    found = {name: _source(name) for name in ("night.css", "night.js")}
    style, script = (f"'sha256-{_digest(text)}'" for text in found.values())
    policy = f"default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'"
    return {"style": Markup(found["night.css"]), "script": Markup(found["night.js"]), "policy": policy}


def _source(name: str) -> str:
    text, _, _ = _TEMPLATES.get_source(Environment(), name)
    assert "</" not in text, f"{name} would end its own element"
    return text


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _splits(tasks: Sequence[TaskNight]) -> dict[str, Counter[str]]:
    """Rows of all tasks, by split and status."""
    found: dict[str, Counter[str]] = {}
    for task in tasks:
        for split, counts in task.rows.items():
            found.setdefault(split, Counter()).update(counts)
    return found


def _statuses(tasks: Sequence[TaskNight]) -> list[str]:
    """Statuses that any row has, `ok` first; the others as they are first met."""
    met = {status: None for task in tasks for counts in task.rows.values() for status, rows in counts.items() if rows}
    return ["ok", *(status for status in met if status != "ok")]
