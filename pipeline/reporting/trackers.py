"""Who else hears of a run's events: TensorBoard, MLflow, a metrics endpoint. None of them can stop or slow the run."""

from collections.abc import Sequence
from typing import Any, Protocol

from rich.console import Console

from pipeline.reporting.events import Event


class Tracker(Protocol):
    """Told of every event (see `events`) in the driver, in their order; it may raise whatever it likes."""

    def hear(self, event: Event) -> None: ...
    def close(self) -> None: ...


class TrackerGroup:
    """Tells trackers; one that fails is left out from then on, with one line."""

    def __init__(self, trackers: Sequence[Tracker], console: Console) -> None:
        self._trackers = list(trackers)
        self._console = console

    def tell(self, events: Sequence[Event]) -> None:
        for tracker in list(self._trackers):
            try:
                for event in events:
                    tracker.hear(event)
            except Exception as error:  # whatever a tracker's library raises
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


def scalars(event: Event) -> dict[str, tuple[float, int]]:
    """Name -> (value, step) of what an event measures: a run's figures at its step, a trial's at its own."""
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
