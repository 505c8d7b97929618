"""The page of a night from its folder: its record, its events, its curves, and the bank."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.bank import Metrics, PromptBank
from pipeline.errors import StorageError
from pipeline.reporting.html import NightReport, render
from pipeline.reporting.html.from_record import night_of_record
from tests.bank.conftest import make_prompt, publish

TASK = {
    "task": "film", "decision": "warm", "why": "its corpus changed", "result": "promoted", "reason": None,
    "stays": False, "worse": False, "canary": True, "metric": "accuracy", "incumbent": 0.8, "new": 0.85,
    "p_value": 0.9, "dev_rows": 60, "start": 0.8, "warm": 0.85, "cold": 0.82, "warm_beat_cold": True,
    "trial": "film.warm", "trials": ["film.warm", "film.cold"], "steps": 40,
    "rows": {"train": {"ok": 60, "null": 2}, "dev": {"ok": 60}},
}  # fmt: skip
NIGHT = {
    "run": "nightly-2026-11-25", "date": "2026-11-25", "started": 1000.0, "bank": "bank", "alias": "latest",
    "format": 1, "state": "finished", "outcome": "Version 2 is published.", "exit_code": 0, "failure": None,
    "ended": 1100.0, "attempts": 1, "model": "smollm2-135m", "backbone": "f" * 64, "new_backbone": False, "ranks": 2,
    "alpha": 0.05, "margin": None, "alias_before": 1, "alias_after": 2, "version": 2, "alias_may_move": True,
    "conditions": [{"name": "share", "held": True, "found": "100 % of 90 %"}], "tasks": [TASK],
    "stages": {"check": 1.5, "corpus": 3.0, "tuning": 90.0, "publish": 0.5},
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A night's folder; its bank lies beside it."""
    folder = tmp_path / "nightly-2026-11-25"
    (folder / "metrics").mkdir(parents=True)
    for trial, end in (("film.warm", 1.0), ("film.cold", 1.5)):
        lines = [{"step": 0, "dev_metric": 0.5, "dev_loss": 2}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": end}]
        (folder / "metrics" / f"{trial}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    memory = {"time": 1050, "event": "memory", "stage": "tuning", "peak_bytes": 3 * 2**30}
    events = [
        {"time": 1001, "event": "launch", "trials": []},
        {"time": 1010, "event": "stage", "name": "tuning"},
        memory,
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "trials.json").write_text(json.dumps([{"trial": "film.cold", "status": "stopped early", "reason": None}]))
    bank = PromptBank.open(tmp_path / "bank", create=True)
    for value in (0.8, 0.85):
        publish(bank, make_prompt("film", value, metrics=Metrics(dev_after=value)))
    return folder


def of(folder: Path, task: dict[str, Any] | None = None, **changes: Any) -> NightReport:
    record = {**NIGHT, **changes, "tasks": [{**TASK, **(task or {})}]}
    (folder / "night.json").write_text(json.dumps(record))
    return night_of_record(folder, PromptBank.open(folder.parent / "bank"), price_per_rank_hour=2.0)


def test_a_night_is_told_with_its_curves_its_versions_and_its_cost(folder: Path) -> None:
    night = of(folder)
    (film,) = night.tasks
    assert (film.decision, film.incumbent, film.tuned, film.gain) == ("warm", 0.8, 0.85, pytest.approx(0.05))
    assert [(curve.trial, curve.best, curve.status) for curve in film.curves] == [
        ("film.warm", True, ""), ("film.cold", False, "stopped early"),
    ]  # fmt: skip
    assert film.curves[0].losses == [(1, 2.0), (2, 1.0)]
    assert [(past.version, past.value) for past in film.history] == [(1, 0.8), (2, 0.85)]
    assert (night.verdict, night.alias_before, night.alias_after, night.version) == ("good", 1, 2, 2)
    assert night.rank_seconds == 180.0 and night.price == pytest.approx(0.1)
    assert [(stage.name, stage.peak_bytes) for stage in night.stages][2] == ("tuning", 3 * 2**30)
    page = render(night)
    assert "From the bank's prompt it reached 0.850, from a fresh one 0.820." in page.replace("&#39;", "'")


@pytest.mark.parametrize(
    ("task", "decision"),
    [
        ({"warm_beat_cold": False}, "cold"),
        ({"warm": None, "warm_beat_cold": None}, "cold"),
        ({"cold": None, "warm_beat_cold": None}, "warm"),
        ({"result": "kept", "reason": "it is worse"}, "kept"),
        ({"result": "failed", "reason": "the loss was nan", "new": None}, "failed"),
        ({"result": "removed", "metric": None, "trials": []}, "removed"),
        ({"result": "carried", "trials": []}, "carried"),
        ({"result": "pending"}, "pending"),
    ],
)
def test_a_task_is_told_by_what_became_of_it_and_why(folder: Path, task: dict[str, Any], decision: str) -> None:
    (film,) = of(folder, task).tasks
    assert film.decision == decision
    assert film.why == "; ".join(filter(None, ("its corpus changed", task.get("reason"))))
    render(of(folder, task))


def test_a_night_that_failed_has_a_page_too(folder: Path) -> None:
    failed: dict[str, Any] = {
        "state": "failed", "outcome": "The night did not end: the disk is full", "failure": "the disk is full",
        "exit_code": 5, "version": None, "alias_after": None,
    }  # fmt: skip
    night = of(folder, {"result": "pending"}, **failed)
    assert (night.verdict, night.alias_after, night.faults[-1].survived) == ("bad", 1, False)
    assert "as it was" in render(night)
    (folder / "events.jsonl").unlink()
    (folder / "trials.json").unlink()
    assert of(folder, {"result": "pending", "trials": []}, **{**failed, "ended": None}).ended == 1000.0


def test_without_a_record_there_is_no_page(folder: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*night\.json"):
        night_of_record(folder, None)
