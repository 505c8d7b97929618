"""Who follows a run, as its settings ask for: people at the terminal, and trackers."""

from contextlib import AbstractContextManager
from pathlib import Path

from rich.console import Console

from pipeline.reporting.progress import follow
from pipeline.reporting.to_mlflow import MLflow
from pipeline.reporting.to_tensorboard import TensorBoard
from pipeline.reporting.trackers import Tracker
from pipeline.run.ray_metrics import RayMetrics
from pipeline.settings import Settings


def followed(settings: Settings, folder: Path, console: Console) -> AbstractContextManager[None]:
    """Within it, the events of the run in `folder` are shown on the console, and trackers hear them.

    Raises: SettingsError when a tracker is not installed.
    """
    trackers = _trackers(settings, folder)
    return follow(folder / "events.jsonl", console, trackers, settings.tracking.log == "json")


def _trackers(settings: Settings, folder: Path) -> list[Tracker]:
    tracking, run = settings.tracking, settings.run.name
    trackers: list[Tracker] = [RayMetrics(run)]
    if tracking.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard"))
    if tracking.mlflow is not None:
        trackers.append(MLflow(tracking.mlflow, tracking.experiment, run))
    return trackers
