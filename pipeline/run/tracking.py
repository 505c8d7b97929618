"""Who follows a run: people at the terminal, trackers, and whatever scrapes the cluster's metrics."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path

import ray
from ray.util.metrics import Gauge
from rich.console import Console

from pipeline.reporting.events import Event
from pipeline.reporting.progress import follow
from pipeline.reporting.state import RunState
from pipeline.reporting.trackers import MLflow, TensorBoard, Tracker
from pipeline.settings import Settings

STAGES = ("corpus", "backbone", "tuning", "publish")
_FIGURES = {
    "step": "Steps that the run has taken.",
    "live_trials": "Trials that are tuned now.",
    "waiting_trials": "Trials that wait for a slot.",
    "tokens_per_second": "Text tokens trained a second, between the last two step events.",
    "padding_share": "Share of the tokens computed that are padding.",
    "gathered_bytes": "Bytes of weights that rank 0 gathered since it loaded the model.",
}


def followed(settings: Settings, folder: Path, console: Console) -> AbstractContextManager[None]:
    """Within it, the events of the run in `folder` are shown on the console, and trackers hear them.

    With `tracking.log=json` they are lines on stdout, and nothing else is there (`console_for`).

    Raises: SettingsError when a tracker is not installed.
    """
    tracking, run = settings.tracking, settings.run.name
    trackers: list[Tracker] = [RayMetrics(run)]
    if tracking.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard"))
    if tracking.mlflow is not None:
        trackers.append(MLflow(tracking.mlflow, tracking.experiment, run))
    lines = Console(soft_wrap=True) if tracking.log == "json" else None
    return follow(folder / "events.jsonl", console, trackers, lines)


class RayMetrics:
    """A run's figures as gauges `ray_promptbank_*` with the tag `run`, set while there is a connection to Ray.

    Whatever scrapes the cluster for Prometheus finds them there.
    """

    def __init__(self, run: str) -> None:
        self._state = RunState()
        self._tags = {"run": run}

    @cached_property
    def _gauges(self) -> Mapping[str, Gauge]:
        return {name: Gauge(f"promptbank_{name}", text, ("run",)) for name, text in _FIGURES.items()}

    @cached_property
    def _stage(self) -> Gauge:
        return Gauge("promptbank_stage", "1 for the stage that the run is in, else 0.", ("run", "stage"))

    def hear(self, event: Event) -> None:
        self._state.apply(event)
        if not ray.is_initialized():  # nothing has been computed yet
            return
        if event["event"] == "stage":
            for stage in STAGES:
                self._stage.set(float(stage == event.get("name")), {**self._tags, "stage": stage})
        if event["event"] in ("launch", "step", "finished"):
            figures = {
                "step": self._state.step,
                "live_trials": len(self._state.live),
                "waiting_trials": self._state.waiting,
            }
            self._set(figures)
        if event["event"] == "step":
            told = {
                "tokens_per_second": "tokens_per_second",
                "padding_share": "padding",
                "gathered_bytes": "gathered_bytes",
            }
            self._set({name: event[key] for name, key in told.items() if event.get(key) is not None})

    def close(self) -> None:
        """Nothing runs any more: a gauge would keep its last value for ever."""
        if not ray.is_initialized():
            return
        self._set({"live_trials": 0, "waiting_trials": 0, "tokens_per_second": 0})
        for stage in STAGES:
            self._stage.set(0.0, {**self._tags, "stage": stage})

    def _set(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._gauges[name].set(float(value), self._tags)
