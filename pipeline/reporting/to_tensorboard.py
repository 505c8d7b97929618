"""Writes a run's figures for TensorBoard."""

from pathlib import Path

from pipeline.errors import SettingsError
from pipeline.reporting.events import Event
from pipeline.reporting.trackers import scalars


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
