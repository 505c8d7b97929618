"""`events.jsonl`: what a run tells the people who watch it, one JSON object per line, only ever appended.

Every line has `time` (Unix seconds) and `event`:

    launch    trials: [{trial, task, max_steps}]               the driver starts, or starts again
    stage     name: corpus | plan | backbone | tuning | gate | publish, text
    resume    step                                             from the checkpoint of that step
    step      step, live, tokens_per_second, trials: {trial: {step, loss}}
    eval      trial, step, metric, value, loss
    finished  trial, status, reason

A number that is not finite is written as null, for JSON has no other way to say it.
"""

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import StorageError

Event = dict[str, Any]


class EventLog:
    """Appends to an event log; a context manager. Each event is one write, so that a kill loses one line at most.

    Raises: StorageError when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":  # a writer was killed within its line
                self._append(b"\n")
        except OSError as error:
            raise self._refused(error) from error

    def write(self, event: str, **fields: Any) -> None:
        line = json.dumps({"time": time.time(), "event": event, **finite(fields)}, ensure_ascii=False, allow_nan=False)
        try:
            self._append(line.encode() + b"\n")
        except OSError as error:
            raise self._refused(error) from error

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        while line:
            line = line[os.write(self._file, line) :]

    def _refused(self, error: OSError) -> StorageError:
        return StorageError(f"cannot write the run's event log {self._path}: {error.strerror}")


class EventTail:
    """Reads what is appended to an event log after this tail was made; the file need not exist yet."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begun = b""
        self._offset = path.stat().st_size if path.exists() else 0

    def read(self) -> list[Event]:
        """The events completed since the last call. A line still being written waits for the next call;
        one that holds no event (its writer was killed) is passed over."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # another file by the same name
                    self._offset, self._begun = 0, b""
                file.seek(self._offset)
                new = file.read()
        except OSError:  # not there yet, or a network file system that stutters
            return []
        self._offset += len(new)
        *complete, self._begun = (self._begun + new).split(b"\n")
        return [event for event in map(_parse, complete) if event is not None]


def _parse(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and "event" in event else None


def finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
