"""Runs as another process sees them: by the files in their storage."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.reporting.events import Event, parse_event
from pipeline.reporting.pace import RECENT, Pace, done_at, steps_to_go
from pipeline.reporting.state import RunState

_STEP = b'"event": "step"'
_HEAD = 80
"""An event's kind stands within so many first bytes of its line."""


@dataclass
class WatchedRun:
    """A run, seen through its event log."""

    name: str
    """Its folder below the storage."""
    folder: Path
    state: RunState = field(default_factory=RunState)
    pace: Pace = field(default_factory=Pace)
    begun: float | None = None
    """Unix seconds of its first event."""

    def apply(self, event: Event) -> None:
        if self.begun is None:
            self.begun = float(event.get("time") or 0.0)
        self.state.apply(event)
        self.pace.apply(event)

    def condition(self, now: float) -> str:
        """done | stopped | running | silent, by the last event and the usual pace."""
        if self.state.ended:
            return "done"
        if self.state.stopped is not None:
            return "stopped"
        return "silent" if self.pace.silent(now) else "running"

    @property
    def steps_to_go(self) -> int | None:
        return None if self.state.ended or self.state.stopped else steps_to_go(self.state)

    @property
    def done_at(self) -> float | None:
        """Unix seconds, see `pace.done_at`; None for a run that is not under way."""
        return None if self.state.ended or self.state.stopped else done_at(self.state, self.pace)


def find_runs(storage: Path) -> list[Path]:
    """Folders of the runs in a storage, by name; a run may lie one folder deeper. Raises: StorageError."""
    try:
        files = [*storage.glob("*/events.jsonl"), *storage.glob("*/*/events.jsonl")]
    except OSError as error:
        raise StorageError(f"cannot list the runs in {storage}: {error.strerror}") from error
    return sorted(file.parent for file in files if file.is_file())


def read_run(folder: Path, name: str) -> WatchedRun:
    """A run up to its newest event. Raises: StorageError when its event log cannot be read."""
    run = WatchedRun(name, folder)
    for event in read_events(folder / "events.jsonl"):
        run.apply(event)
    return run


def read_events(path: Path) -> Iterable[Event]:
    """The events of a log, but only the newest steps: steps are most of the file, and older ones hold only losses.

    Raises: StorageError.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]  # the last line is empty, or still being written
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    steps = [place for place, line in enumerate(lines) if _STEP in line[:_HEAD]]
    skipped = set(steps[:-RECENT])
    found = (parse_event(line) for place, line in enumerate(lines) if place not in skipped)
    return [event for event in found if event is not None]
