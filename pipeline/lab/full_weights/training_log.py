"""What rank 0 writes while all weights are trained: the run's event log and a series of losses, as for prompts."""

import json
import time
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.reporting.events import EventLog
from pipeline.reporting.series import read_series
from pipeline.tuning.machine import peak_bytes
from pipeline.whole_files import write_atomically

_SECONDS_BETWEEN_STEP_EVENTS = 2.0


class TrainingLog:
    """Only rank 0 writes; other ranks hold a silent log."""

    def __init__(self, run_folder: Path, name: str, silent: bool) -> None:
        self._events = None if silent else EventLog(run_folder / "events.jsonl")
        self._name = name
        self._series = run_folder / "metrics" / f"{name}.jsonl"
        self._since, self._tokens = time.monotonic(), 0
        self._evaluated: set[int] = set()

    def event(self, event: str, **fields: object) -> None:
        if self._events:
            self._events.write(event, **fields)

    def begins(self, step: int) -> None:
        """Cut the series back to the checkpoint's step, so that no step appears twice."""
        if self._events is None:
            return
        kept = [point for point in read_series(self._series) if point["step"] <= step] if step else []
        write_atomically(self._series, "".join(f"{json.dumps(point)}\n" for point in kept).encode())
        # A checkpoint is written before the evaluation of its step, so a resumed training evaluates that step again.
        self._evaluated = {point["step"] for point in kept if "dev_metric" in point}
        if step:
            self.event("resume", step=step, trials={self._name: {"step": step}})

    def stepped(self, step: int, loss: float, tokens: int, gathered: int) -> None:
        """Log a step. `tokens`: of its text; `gathered`: bytes of weights that this rank gathered since loading."""
        if self._events is None:
            return
        self._write(step, loss=loss)
        self._tokens += tokens
        elapsed = time.monotonic() - self._since
        if elapsed < _SECONDS_BETWEEN_STEP_EVENTS and step > 1:
            return
        rate = self._tokens / max(elapsed, 1e-9)
        trials = {self._name: {"step": step, "loss": loss}}
        self.event(
            "step", step=step, live=1, tokens_per_second=rate, padding=0.0, gathered_bytes=gathered, trials=trials
        )
        self.paused()

    def evaluated(self, step: int, metric: str, value: float, loss: float) -> None:
        if self._events and step not in self._evaluated:
            self._write(step, dev_metric=value, dev_loss=loss)
            self.event("eval", trial=self._name, step=step, metric=metric, value=value, loss=loss)

    def finished(self, status: str, reason: str | None = None) -> None:
        self.event("finished", trial=self._name, status=status, reason=reason)

    def memory(self, stage: str) -> None:
        """Log this rank's peak memory at the end of a stage."""
        self.event("memory", stage=stage, peak_bytes=peak_bytes())

    def paused(self) -> None:
        """Restart the clock of the rate: the time since the last step was not spent on steps."""
        self._since, self._tokens = time.monotonic(), 0

    def _write(self, step: int, **values: float) -> None:
        try:
            with open(self._series, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write {self._series}: {error.strerror}; make room, then start the same run again to resume"
            ) from error
