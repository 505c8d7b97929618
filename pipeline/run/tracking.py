"""The trackers that a run's settings ask for."""

from pathlib import Path

from pipeline.reporting.to_mlflow import MLflow
from pipeline.reporting.to_tensorboard import TensorBoard
from pipeline.reporting.trackers import Tracker
from pipeline.run.ray_metrics import RayMetrics
from pipeline.settings import Settings


def trackers_of(settings: Settings, folder: Path) -> list[Tracker]:
    """`folder` is the run's own. Needs a connection to Ray. Raises: SettingsError when one is not installed."""
    tracking, run = settings.tracking, settings.run.name
    trackers: list[Tracker] = [RayMetrics(run)]
    if tracking.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard"))
    if tracking.mlflow is not None:
        trackers.append(MLflow(tracking.mlflow, tracking.experiment, run))
    return trackers
