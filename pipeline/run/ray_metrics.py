"""A run's figures as Ray metrics: whatever scrapes the cluster for Prometheus finds them there."""

from collections.abc import Mapping
from functools import cached_property

import ray
from ray.util.metrics import Gauge

from pipeline.reporting.events import Event
from pipeline.reporting.state import RunState

STAGES = ("corpus", "backbone", "tuning", "publish")
_FIGURES = {
    "step": "Steps that the run has taken.",
    "live_trials": "Trials that are tuned now.",
    "waiting_trials": "Trials that wait for a slot.",
    "tokens_per_second": "Text tokens trained a second, between the last two step events.",
    "padding_share": "Share of the tokens computed that are padding.",
    "gathered_bytes": "Bytes of weights that rank 0 gathered since it loaded the model.",
}


class RayMetrics:
    """Gauges `ray_promptbank_*` with the tag `run`, set while there is a connection to Ray."""

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
