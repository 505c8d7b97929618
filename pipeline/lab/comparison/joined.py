"""Panels over several finished comparisons: for example one line for each model size, with its spread over seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import SettingsError
from pipeline.lab.comparison.results import Mean, read_results
from pipeline.settings import JoinedPanel, JoinSettings


@dataclass(frozen=True)
class JoinedPoint:
    value: Any
    choice: str
    dev: Mean
    test: Mean | None


@dataclass(frozen=True)
class JoinedPlot:
    title: str
    axis: str
    """What the values measure."""
    task: str
    metric: str
    lines: Mapping[str, Sequence[JoinedPoint]]
    runs: Mapping[str, Sequence[str]]

    @property
    def split(self) -> str:
        """`test`, or `dev` where a run's task has no test split."""
        return "test" if all(point.test for points in self.lines.values() for point in points) else "dev"

    def shown(self, point: JoinedPoint) -> Mean:
        return point.test if self.split == "test" and point.test is not None else point.dev


def join_panels(settings: JoinSettings) -> list[JoinedPlot]:
    """Read the figures of the panels. Raises: SettingsError when a run has no such task or panel, StorageError."""
    return [_joined(panel) for panel in settings.panels]


def _joined(panel: JoinedPanel) -> JoinedPlot:
    lines: dict[str, list[JoinedPoint]] = {}
    metric = ""
    for line, folders in panel.runs.items():
        found = [(folder, read_results(Path(folder).expanduser() / "results.json")) for folder in folders]
        for folder, results in found:
            own = _metric(panel, folder, results)
            if metric not in ("", own):
                raise SettingsError(
                    f"panel '{panel.title}': {folder} measured '{panel.task}' by {own} and another run by {metric}; "
                    "join runs of one metric"
                )
            metric = own
        if panel.key is not None:
            lines[line] = _of_key(panel, *found[0])
        else:
            values = zip(panel.values or (), found, strict=True)
            lines[line] = [_of_run(panel, value, *run) for value, run in values]
    return JoinedPlot(panel.title, panel.key or panel.title, panel.task, metric, lines, panel.runs)


def _metric(panel: JoinedPanel, folder: str, results: Mapping[str, Any]) -> str:
    for facts in results["tasks"]:
        if facts["name"] == panel.task:
            return str(facts["metric"])
    known = ", ".join(facts["name"] for facts in results["tasks"])
    raise SettingsError(f"panel '{panel.title}': {folder} has no task '{panel.task}'; it has {known}")


def _of_key(panel: JoinedPanel, folder: str, results: Mapping[str, Any]) -> list[JoinedPoint]:
    for one in results["panels"]:
        points = [_point(point["value"], point) for point in one["points"] if point["task"] == panel.task]
        if one["key"] == panel.key and points:
            return points
    raise SettingsError(
        f"panel '{panel.title}': {folder} has no panel of {panel.key} for '{panel.task}'; sweep it there, and "
        "add it to compare.panels"
    )


def _of_run(panel: JoinedPanel, value: Any, folder: str, results: Mapping[str, Any]) -> JoinedPoint:
    for row in results["rows"]:
        if (row["method"], row["task"], row["chosen"]) == ("prompt tuning", panel.task, True):
            return _point(value, row)
    raise SettingsError(f"panel '{panel.title}': in {folder} no prompt of '{panel.task}' was tuned to its end")


def _point(value: Any, found: Mapping[str, Any]) -> JoinedPoint:
    test = None if found["test"] is None else _mean(found["test"])
    return JoinedPoint(value, found["written_choice"], _mean(found["dev"]), test)


def _mean(found: Mapping[str, Any]) -> Mean:
    return Mean(found["mean"], found["deviation"], tuple(found["seeds"]), tuple(found.get("values", ())))
