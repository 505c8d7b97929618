"""Who else hears of a run: the figures arrive whole, and a tracker that fails harms nothing."""

import json
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.reporting.events import Event, EventLog
from pipeline.reporting.progress import follow
from pipeline.reporting.trackers import MLflow, TensorBoard, Tracker, scalars


def step(number: int, loss: float | None) -> Event:
    figures = {"live": 1, "tokens_per_second": 300.0, "padding": 0.25, "gathered_bytes": 2**40}
    return {
        "time": 1000.0 + number,
        "event": "step",
        "step": number,
        **figures,
        "trials": {"sst2": {"step": number, "loss": loss}},
    }


def evaluation(number: int, value: float) -> Event:
    figures = {"trial": "sst2", "step": number, "metric": "accuracy", "value": value, "loss": 0.5}
    return {"time": 1000.0 + number, "event": "eval", **figures}


EVENTS = [
    {"time": 1000.0, "event": "begin", "tasks": 1},
    evaluation(0, 0.5),
    step(1, 0.75),
    step(2, None),
    step(3, 0.25),
    evaluation(3, 0.875),
    {"time": 1004.0, "event": "end", "version": 7, "exit": 0},
]
LOSSES, ACCURACIES = [(1, 0.75), (3, 0.25)], [(0, 0.5), (3, 0.875)]


def tell(tracker: Tracker, events: list[Event] = EVENTS) -> None:
    for event in events:
        tracker.hear(event)
    tracker.close()


def test_a_figure_that_was_not_finite_is_no_scalar() -> None:
    assert "loss/sst2" not in scalars(step(2, None)) and scalars(step(1, 0.75))["loss/sst2"] == (0.75, 1)
    assert scalars({"event": "finished", "trial": "sst2", "status": "tuned"}) == {}


def test_tensorboard_reads_every_figure_at_its_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tell(TensorBoard(tmp_path))
    read = EventAccumulator(str(tmp_path)).Reload()

    def series(name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in read.Scalars(name)]

    assert series("loss/sst2") == LOSSES and series("dev_accuracy/sst2") == ACCURACIES
    assert series("run/padding") == [(1, 0.25), (2, 0.25), (3, 0.25)]
    assert read.Scalars("loss/sst2")[0].wall_time == 1001.0


@pytest.fixture
def mlflow_store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def test_mlflow_gets_every_figure_and_how_the_run_ended(mlflow_store: str) -> None:
    from mlflow.tracking import MlflowClient

    tell(MLflow(mlflow_store, "nightly", "night"), EVENTS[:4])
    tell(MLflow(mlflow_store, "nightly", "night"), EVENTS[4:])  # started again: the same run goes on
    client = MlflowClient(mlflow_store)
    experiment = client.get_experiment_by_name("nightly")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "night" and run.info.status == "FINISHED" and run.data.tags["bank_version"] == "7"

    def series(name: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]

    assert series("loss/sst2") == LOSSES and series("dev_accuracy/sst2") == ACCURACIES


class Broken:
    heard = 0

    def hear(self, event: Event) -> None:
        self.heard += 1
        raise RuntimeError("the server\nis away")

    def close(self) -> None:
        raise RuntimeError("still away")


class Listening:
    def __init__(self) -> None:
        self.heard: list[str] = []

    def hear(self, event: Event) -> None:
        self.heard.append(event["event"])

    def close(self) -> None:
        self.heard.append("closed")


def test_a_tracker_that_fails_is_told_of_in_one_line_and_the_others_hear_everything(tmp_path: Path) -> None:
    path, console, broken, listening = (
        tmp_path / "events.jsonl",
        Console(file=StringIO(), width=80),
        Broken(),
        Listening(),
    )
    with follow(path, console, [broken, listening]), EventLog(path) as log:
        log.write("begin", tasks=1)
        log.write("end", version=1, exit=0)
    assert listening.heard == ["begin", "end", "closed"] and broken.heard == 1
    assert isinstance(console.file, StringIO)
    warnings = [line for line in console.file.getvalue().splitlines() if "warning" in line]
    assert warnings == ["warning: Broken hears no more of this run: the server"]


def test_a_json_log_holds_every_event_with_its_run_one_a_line(tmp_path: Path) -> None:
    path, console = tmp_path / "night" / "events.jsonl", Console(file=StringIO(), width=20)
    with follow(path, console, as_json=console), EventLog(path) as log:
        log.write("eval", trial="[sst2]", step=1, metric="accuracy", value=0.5, loss=float("nan"))
        log.write("stopped", reason="x" * 200)
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines == path.read_text().splitlines()
    assert [json.loads(line)["run"] for line in lines] == ["night", "night"]
    assert json.loads(lines[0])["trial"] == "[sst2]"
