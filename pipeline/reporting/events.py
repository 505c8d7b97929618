"""`events.jsonl`: what a run tells the people who watch it, one JSON object per line, only ever appended.

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
    end       version, exit, not_learned: {trial: reason}      it is done; version null: nothing was published
    stopped   reason                                           it could not go on; started again, it resumes

A number that is not finite is written as null, for JSON has no other way to say it.
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
        # The kind near the beginning, where `watched` looks for it: a run's name may be long.
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
    """Whoever watches the log shall see that the block was stopped, and why."""
    try:
        yield
    except LeaseError:  # the log is another start's by now, and that one goes on
        raise
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit)
        with suppress(StorageError):  # a full disk is the reason, perhaps
            log.write("stopped", reason="interrupted" if interrupted else str(error) or type(error).__name__)
        raise


class EventTail:
    """Reads what is appended to an event log after this tail was made; the file need not exist yet.

    `whole`: what was there before is read, too.
    """

    def __init__(self, path: Path, whole: bool = False) -> None:
        self._path = path
        self._begun = b""
        self._offset = path.stat().st_size if path.exists() and not whole else 0

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
        return [event for event in map(parse_event, complete) if event is not None]


def parse_event(line: bytes) -> Event | None:
    """None for a line that holds no event, as after a damage to the file."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) and _is_sound(event) else None


_COUNTS = ("time", "step", "max_steps", "version", "exit", "live")
_NUMBERS = (*_COUNTS, "tokens_per_second", "padding", "value", "loss", "gathered_bytes", "peak_bytes")
_TEXTS = ("trial", "task", "name", "text", "reason", "status", "metric", "run", "stage")
_LAST_MOMENT = 10**11
"""Unix seconds, in the year 5138; no step, version or exit code is as large, either."""


def _is_sound(record: dict[str, Any]) -> bool:
    """Whether the fields that are read later are of their kinds; absent ones and null are."""
    if not all(record.get(key) is None or isinstance(record[key], str) for key in _TEXTS):
        return False
    for key in _NUMBERS:
        value = record.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
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
    if record.get("event") == "end":
        reasons = record.get("not_learned") or {}
        return isinstance(reasons, dict) and all(r is None or isinstance(r, str) for r in reasons.values())
    return True


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        return False


def finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
