"""Trackers that a run's events go to: TensorBoard, MLflow, a metrics endpoint. None can stop or slow the run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from pipeline.errors import SettingsError
from pipeline.reporting.events import Event

# For a server that does not answer: by default the client tries for minutes, and the run's end would wait for it.
_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class Tracker(Protocol):
    """Gets every event (see `events`), in order, in the driver's process; it may raise anything."""

    def hear(self, event: Event) -> None: ...
    def close(self) -> None: ...


class TrackerGroup:
    """Passes events on to trackers. One that fails is left out from then on, with one line on the console."""

    def __init__(self, trackers: Sequence[Tracker], console: Console) -> None:
        self._trackers = list(trackers)
        self._console = console

    def tell(self, events: Sequence[Event]) -> None:
        for tracker in list(self._trackers):
            try:
                for event in events:
                    tracker.hear(event)
            except Exception as error:  # a tracker's library may raise anything
                self._leave_out(tracker, error)

    def close(self) -> None:
        for tracker in list(self._trackers):
            try:
                tracker.close()
            except Exception as error:
                self._leave_out(tracker, error)
        self._trackers.clear()

    def _leave_out(self, tracker: Tracker, error: Exception) -> None:
        self._trackers.remove(tracker)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        self._console.print(
            f"warning: {type(tracker).__name__} hears no more of this run: {reason}", markup=False, highlight=False
        )


class TensorBoard:
    """Scalars as TensorBoard's event files in `folder`; tensorboardX, which Ray needs anyway, writes them."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError as error:
            raise SettingsError("tracking.tensorboard: install tensorboardX (promptbank[tracking])") from error
        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def hear(self, event: Event) -> None:
        for name, (value, step) in scalars(event).items():
            self._writer.add_scalar(name, value, step, walltime=event["time"])

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """Scalars, and how the run ended, as one run of an experiment on a tracking server."""

    def __init__(self, uri: str, experiment: str, run: str) -> None:
        for name, value in _TIMEOUTS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise SettingsError("tracking.mlflow: install mlflow-skinny (promptbank[tracking])") from error
        self._client = MlflowClient(uri)
        self._experiment, self._name = experiment, run
        self._run: str | None = None
        self._status = "KILLED"

    def hear(self, event: Event) -> None:
        from mlflow.entities import Metric

        if self._run is None:  # not in __init__, because a server that does not answer must not stop the run
            self._run = self._begin()
        at = int(event["time"] * 1000)
        metrics = [Metric(name, value, at, step) for name, (value, step) in scalars(event).items()]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)
        if event["event"] == "end":
            self._client.set_tag(self._run, "bank_version", str(event.get("version")))
            self._status = "FINISHED"
        if event["event"] == "stopped":
            self._client.set_tag(self._run, "stopped", str(event.get("reason")))
            self._status = "FAILED"

    def close(self) -> None:
        if self._run is not None:
            self._client.set_terminated(self._run, self._status)

    def _begin(self) -> str:
        """Id of an unfinished run of this name, in which a resumed night goes on, else of a new run."""
        found = self._client.get_experiment_by_name(self._experiment)
        experiment = found.experiment_id if found else self._client.create_experiment(self._experiment)
        quoted = self._name.replace("'", "")
        runs = self._client.search_runs(
            [experiment], f"attributes.run_name = '{quoted}' and attributes.status != 'FINISHED'", max_results=1
        )
        if runs:
            self._client.update_run(runs[0].info.run_id, status="RUNNING")
            return str(runs[0].info.run_id)
        return str(self._client.create_run(experiment, run_name=self._name).info.run_id)


def scalars(event: Event) -> dict[str, tuple[float, int]]:
    """Name -> (value, step) of an event's measurements: a run's figures at its step, a trial's at the trial's step."""
    match event:
        case {"event": "step", "step": step, "trials": trials}:
            own = {name: event.get(name) for name in ("tokens_per_second", "padding", "gathered_bytes", "live")}
            found = {f"run/{name}": (value, step) for name, value in own.items()}
            return _measured(found | {f"loss/{name}": (now.get("loss"), now["step"]) for name, now in trials.items()})
        case {"event": "eval", "trial": trial, "step": step, "metric": metric}:
            return _measured(
                {f"dev_{metric}/{trial}": (event.get("value"), step), f"dev_loss/{trial}": (event.get("loss"), step)}
            )
        case _:
            return {}


def _measured(found: dict[str, tuple[Any, int]]) -> dict[str, tuple[float, int]]:
    return {name: (float(value), int(step)) for name, (value, step) in found.items() if value is not None}
