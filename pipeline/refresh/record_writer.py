"""The night's record while the night lasts: changed, timed, and written down at every stage."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.refresh.record import NightRecord, read_record, write_record


class NightRecordWriter:
    """Holds the record of a night that began or goes on."""

    def __init__(self, folder: Path, record: NightRecord, guard: Callable[[], None] = lambda: None) -> None:
        """`guard` is called before every writing: it raises when the record is another night's to write."""
        self._folder = folder
        self._guard = guard
        before = read_record(folder)
        if before is not None:  # an attempt that was stopped
            record = replace(
                record, started=before.started, attempts=before.attempts + 1, stages=before.stages
            )  # fmt: skip
        self.record = record
        self._within = 0.0

    def write(self, **changes: Any) -> NightRecord:
        """Raises: StorageError, and what the guard raises."""
        self._guard()
        self.record = replace(self.record, **changes)
        write_record(self._folder, self.record)
        return self.record

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage, also of one that fails, less those of stages within it. Raises: as `write`."""
        outer, self._within = self._within, 0.0
        began = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - began
            seconds = self.record.stages.get(name, 0.0) + took - self._within
            self._within = outer + took
            self.record = replace(self.record, stages={**self.record.stages, name: round(seconds, 3)})
        self.write()
