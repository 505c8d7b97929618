"""Builds the report of a night from its folder (`night.json`, events, curves) and the bank's manifests."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.bank import PromptBank
from pipeline.errors import BankError, StorageError
from pipeline.reporting.events import Event
from pipeline.reporting.html.night import (
    Condition,
    Curve,
    Decision,
    Fault,
    NightReport,
    PastVersion,
    Stage,
    TaskNight,
    Verdict,
)
from pipeline.reporting.html.run_files import faults_of, read_curve, stages_of
from pipeline.reporting.watched import read_events

_ALL_REFRESHED = 0
PAST_VERSIONS = 5
"""Number of versions before tonight's that the page shows."""


def night_of_record(
    folder: Path, bank: PromptBank | None, price_per_rank_hour: float | None = None, record: str = "night.json"
) -> NightReport:
    """The report of the night in a run's folder, also of one that failed. `pipeline/refresh/record.py` describes its
    record.

    Raises: StorageError when a file cannot be read.
    """
    try:
        night: dict[str, Any] = json.loads((folder / record).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"cannot read {folder / record}: {error}") from error
    log = folder / "events.jsonl"
    events = list(read_events(log)) if log.exists() else []
    ended = night["ended"] or (float(events[-1]["time"]) if events else night["started"])
    return NightReport(
        title=f"Night of {night['date']}",
        run=night["run"],
        verdict=_verdict(night),
        outcome=night["outcome"] or "It has not ended.",
        started=night["started"],
        ended=ended,
        tasks=_tasks(folder, night, bank),
        bank=night["bank"],
        alias=night["alias"],
        version=night["version"],
        parent=night["alias_before"],
        alias_before=night["alias_before"],
        # A night that did not come to its end has moved no alias.
        alias_after=night["alias_before"] if night["alias_after"] is None else night["alias_after"],
        exit_code=night["exit_code"],
        conditions=[Condition(**condition) for condition in night["conditions"]],
        faults=[*faults_of(events), *([Fault(ended, night["failure"], survived=False)] if night["failure"] else [])],
        stages=_stages(night, events),
        ranks=night["ranks"],
        rank_seconds=night["ranks"] * night["stages"].get("tuning", 0.0),
        price_per_rank_hour=price_per_rank_hour,
        facts=_facts(folder, night),
    )


def past_versions(
    bank: PromptBank, metrics: Mapping[str, str], tonight: int | None, most: int = PAST_VERSIONS
) -> dict[str, list[PastVersion]]:
    """The last versions of each prompt in `metrics` (its name -> its dev metric), oldest first.

    `tonight` is the version that was published, which is added to `most`; later ones do not count. A version in which
    the prompt was measured by another metric has no value; a damaged version is skipped.
    Raises: StorageError.
    """
    numbers = [number for number in bank.versions() if tonight is None or number <= tonight]
    found: dict[str, list[PastVersion]] = {name: [] for name in metrics}
    for number in numbers[-most - (tonight is not None) :]:
        try:
            records = [record for record in bank.at(str(number)).records() if record.name in metrics]
        except BankError:
            continue
        for record in records:
            value = record.metrics.dev_after if record.metric == metrics[record.name] else None
            found[record.name].append(PastVersion(number, value, record.status))
    return found


def _verdict(night: Mapping[str, Any]) -> Verdict:
    if night["exit_code"] == _ALL_REFRESHED:
        return "good"
    return "bad" if night["version"] is None else "partial"


def _tasks(folder: Path, night: Mapping[str, Any], bank: PromptBank | None) -> list[TaskNight]:
    metrics = {task["task"]: task["metric"] for task in night["tasks"] if task["metric"] is not None}
    past = past_versions(bank, metrics, night["version"]) if bank is not None else {}
    ends = _ends(folder)
    return [_task(folder, task, past.get(task["task"], []), ends) for task in night["tasks"]]


def _task(
    folder: Path, task: Mapping[str, Any], history: Sequence[PastVersion], ends: Mapping[str, Mapping[str, Any]]
) -> TaskNight:
    return TaskNight(
        name=task["task"],
        decision=_decision(task),
        why="; ".join(filter(None, (task["why"], task["reason"]))),
        metric=task["metric"] or "metric",
        incumbent=task["incumbent"],
        tuned=task["new"],
        p_value=task["p_value"],
        start=task["start"],
        constant=task.get("constant"),  # records of old versions have none
        learned=task.get("learned"),
        warm=task["warm"],
        cold=task["cold"],
        steps=task["steps"],
        canary=task["canary"],
        history=history,
        curves=[_curve(folder, trial, trial == task["trial"], ends.get(trial, {})) for trial in task["trials"]],
        rows=task["rows"],
        tables=task.get("tables", {}),
    )


def _decision(task: Mapping[str, Any]) -> Decision:
    """The task's decision; promoted prompts are told apart by the start of their best trial."""
    result: Decision | str = task["result"]
    if result == "promoted":
        started_warm = task["warm"] is not None and task["warm_beat_cold"] is not False
        return "warm" if started_warm else "cold"
    known: dict[str, Decision] = {"carried": "carried", "kept": "kept", "failed": "failed", "removed": "removed"}
    return known.get(result, "pending")


def _curve(folder: Path, trial: str, best: bool, end: Mapping[str, Any]) -> Curve:
    return replace(read_curve(folder, trial), best=best, status=end.get("status", ""), reason=end.get("reason"))


def _ends(folder: Path) -> dict[str, Mapping[str, Any]]:
    """How each trial ended; empty without `trials.json`."""
    try:
        rows = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {row["trial"]: row for row in rows}


def _stages(night: Mapping[str, Any], events: Sequence[Event]) -> list[Stage]:
    """Seconds come from the record. Memory comes from the events: ranks load, tune and evaluate in one stage."""
    peaks = [stage.peak_bytes for stage in stages_of(events) if stage.peak_bytes is not None]
    most = max(peaks, default=None)
    return [Stage(name, seconds, most if name == "tuning" else None) for name, seconds in night["stages"].items()]


def _facts(folder: Path, night: Mapping[str, Any]) -> dict[str, str]:
    gate = [f"{name} {night[name]:g}" for name in ("alpha", "margin") if night[name] is not None]
    facts = {
        "model": night["model"],
        "backbone": night["backbone"][:12] + (" (not the alias' version's)" if night["new_backbone"] else ""),
        "gate": ", ".join(gate),
        "attempts": str(night["attempts"]),
        "folder": str(folder),
    }
    return {name: fact for name, fact in facts.items() if fact}
