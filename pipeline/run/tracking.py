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

    With `tracking.log=json` they are lines on stdout, and nothing else is there (`told_on`).

    Raises: SettingsError when a tracker is not installed.
    """
    trackers = _trackers(settings, folder)
    lines = Console(soft_wrap=True) if settings.tracking.log == "json" else None
    return follow(folder / "events.jsonl", console, trackers, lines)


def _trackers(settings: Settings, folder: Path) -> list[Tracker]:
    tracking, run = settings.tracking, settings.run.name
    trackers: list[Tracker] = [RayMetrics(run)]
    if tracking.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard"))
    if tracking.mlflow is not None:
        trackers.append(MLflow(tracking.mlflow, tracking.experiment, run))
    return trackers
