"""`events.jsonl`: the events of a run for those who watch it, one JSON object a line, only ever appended to.

Every line has `time` (Unix seconds), `event` and, behind it, `run`:

    begin     tasks                                            the driver starts, or starts again
    launch    trials: [{trial, task, max_steps}]               all that are to be tuned
    stage     name: corpus | plan | backbone | tuning | gate | publish, text
    memory    stage, peak_bytes                                most that rank 0 held at once, until that stage's end
    resume    step, trials: {trial: {step, status, reason}}    from the checkpoint of that step; status: if it has ended
    step      step, live, trials: {trial: {step, loss}}, tokens_per_second (of text), padding (share of the tokens that
              were computed), gathered_bytes (of weights by rank 0, since it loaded them)
    eval      trial, step, metric, value, loss
    finished  trial, status, reason
    end       version, exit, not_learned: {trial: reason}      the run is done; version null: nothing was published
    stopped   reason                                           the run could not go on; started again, it resumes

A number that is not finite is written as null, because JSON has no NaN.
"""

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from pipeline.errors import LeaseError, StorageError

Event = dict[str, Any]


class EventLog:
    """Appends to an event log; a context manager. Each event is one write, so that a kill loses at most one line.

    Raises: StorageError when the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":  # the last writer was killed within a line
                self._append(b"\n")
        except OSError as error:
            raise self._refused(error) from error

    def write(self, event: str, **fields: Any) -> None:
        # The kind stands near the beginning, where `watched` looks for it, because a run's name may be long.
        record = {"time": time.time(), "event": event, "run": self._path.parent.name, **finite(fields)}
        line = json.dumps(record, ensure_ascii=False, allow_nan=False)
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


@contextmanager
def telling_why(log: EventLog) -> Iterator[None]:
    """Write to the log that the block was stopped, and why."""
    try:
        yield
    except LeaseError:  # the log belongs to another start by now, which goes on
        raise
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        with suppress(StorageError):  # a full disk may be the reason
            log.write("stopped", reason="interrupted" if interrupted else str(error) or type(error).__name__)
        raise


class EventTail:
    """Reads what is appended to an event log after this tail was made; the file need not exist yet.

    `whole`: also what was there before.
    """

    def __init__(self, path: Path, whole: bool = False) -> None:
        self._path = path
        self._begun = b""
        self._offset = path.stat().st_size if path.exists() and not whole else 0

    def read(self) -> list[Event]:
        """The events completed since the last call. A line still being written waits for the next call;
        one that holds no event, because its writer was killed, is skipped."""
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:  # it was replaced by another file
                    self._offset, self._begun = 0, b""
                file.seek(self._offset)
                new = file.read()
        except OSError:  # not there yet, or a network file system fails for a moment
            return []
        self._offset += len(new)
        *complete, self._begun = (self._begun + new).split(b"\n")
        return [event for event in map(parse_event, complete) if event is not None]


def parse_event(line: bytes) -> Event | None:
    """The event in a line; None for a damaged line."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) and _is_sound(event) else None


_COUNTS = ("time", "step", "max_steps", "version", "exit", "live")
_NUMBERS = (*_COUNTS, "tokens_per_second", "padding", "value", "loss", "gathered_bytes", "peak_bytes")
_TEXTS = ("trial", "task", "name", "text", "reason", "status", "metric", "run", "stage")
_LAST_MOMENT = 10**11
"""Unix seconds, in the year 5138. No step, version or exit code is as large either."""


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether the fields that are read later have their types; absent fields and null are allowed."""
    if not all(record.get(key) is None or isinstance(record[key], str) for key in _TEXTS):
        return False
    for key in _NUMBERS:
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        try:
            finite_value = math.isfinite(value)
        except OverflowError:  # an integer too large for a float
            finite_value = False
        if not finite_value:
            return False
        if key in _COUNTS and not -_LAST_MOMENT < value < _LAST_MOMENT:
            return False
    trials = record.get("trials") or []
    if record.get("event") == "end":
        judged = record.get("not_learned") or {}
        return isinstance(judged, dict) and all(why is None or isinstance(why, str) for why in judged.values())
    if record.get("event") == "launch":
        return isinstance(trials, list) and all(
            isinstance(trial, dict) and isinstance(trial.get("trial"), str) and _is_sound(trial) for trial in trials
        )
    if record.get("event") in ("step", "resume") and trials:
        return isinstance(trials, dict) and all(isinstance(t, dict) and _is_sound(t) for t in trials.values())
    return True


def finite(value: Any) -> Any:
    """The value with None in place of each number that is not finite, within lists and dicts too."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
