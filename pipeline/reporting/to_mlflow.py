"""Sends a run's figures to MLflow."""

import os

from pipeline.errors import SettingsError
from pipeline.reporting.events import Event
from pipeline.reporting.trackers import scalars

# For a server that does not answer: by default the client tries for minutes, and the run's end would wait for it.
_TIMEOUTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


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
