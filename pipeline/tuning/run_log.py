"""What rank 0 writes down while it tunes: the run's event log and each trial's series of metrics."""

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import StorageError
from pipeline.reporting.events import EventLog
from pipeline.reporting.series import read_series
from pipeline.tuning.machine import peak_bytes
from pipeline.tuning.state import TrialState
from pipeline.tuning.step import TokenCounts
from pipeline.whole_files import write_atomically

_SECONDS_BETWEEN_STEP_EVENTS = 2.0


class RunLog:
    """Written by rank 0 alone; the other ranks hold one that is silent."""

    def __init__(self, run_folder: Path, silent: bool) -> None:
        self._events = None if silent else EventLog(run_folder / "events.jsonl")
        self._metrics = run_folder / "metrics"
        self._since, self._tokens = time.monotonic(), TokenCounts()

    def event(self, event: str, **fields: object) -> None:
        if self._events:
            self._events.write(event, **fields)

    def resumed(self, step: int, states: Sequence[TrialState]) -> None:
        """Cut each trial's series back to where its checkpoint stands, so that no step appears twice."""
        if self._events is None:
            return
        for state in states:
            self._cut_back(state)
        trials = {s.trial.name: {"step": s.step, **(_end(s) if s.ended else {})} for s in states}
        self.event("resume", step=step, trials=trials)

    def restarted(self, state: TrialState) -> None:
        """Of a trial that starts again, only what was measured before its first step stays."""
        if self._events is None:
            return
        self._cut_back(state)
        self.event("stage", name="tuning", text=f"{state.trial.name}: {state.restarted}")

    def _cut_back(self, state: TrialState) -> None:
        path = self._path(state.trial.name)
        if path.exists():
            kept = [json.dumps(point) + "\n" for point in read_series(path) if point["step"] <= state.step]
            write_atomically(path, "".join(kept).encode())

    def started(self, state: TrialState) -> None:
        if self._events:
            write_atomically(self._path(state.trial.name), b"")
            if state.trial.settings.optimizer.lr == "auto":
                text = f"{state.trial.name}: rate {state.rate:.3g} (optimizer.lr auto)"
                self.event("stage", name="tuning", text=text)

    def stepped(
        self, step: int, tried: Sequence[TrialState], losses: np.ndarray, tokens: TokenCounts, gathered: int
    ) -> None:
        """Of the trials `tried`, those that took the step are written down.

        losses: `[S]`, by place in `tried`. gathered: bytes of weights that this rank gathered since it loaded them.
        """
        if self._events is None:
            return
        taken = [state.status == "live" and not state.exploded for state in tried]
        stepped = list(itertools.compress(zip(tried, map(float, losses), strict=True), taken))
        for state, loss in stepped:
            self._series(state, loss=loss)
        self._tokens += tokens
        elapsed = time.monotonic() - self._since
        if elapsed < _SECONDS_BETWEEN_STEP_EVENTS and step > 1:
            return
        trials = {state.trial.name: {"step": state.step, "loss": loss} for state, loss in stepped}
        figures = {
            "tokens_per_second": self._tokens.text / max(elapsed, 1e-9),
            "padding": self._tokens.padding / self._tokens.computed,
            "gathered_bytes": gathered,
        }
        self.event("step", step=step, live=len(stepped), **figures, trials=trials)
        self.paused()

    def evaluated(self, state: TrialState) -> None:
        last = state.history[-1]
        metric = state.trial.settings.metric
        self._series(state, dev_metric=last.value, dev_loss=last.loss)
        self.event("eval", trial=state.trial.name, step=state.step, metric=metric, value=last.value, loss=last.loss)
        if state.ended:
            self.finished(state)

    def finished(self, state: TrialState) -> None:
        self.event("finished", trial=state.trial.name, **_end(state))

    def memory(self, stage: str) -> None:
        """Write down the most memory that this rank held, at the end of a stage."""
        self.event("memory", stage=stage, peak_bytes=peak_bytes())

    def paused(self) -> None:
        """Start measuring the rate anew: the time since the last step went elsewhere, to an evaluation."""
        self._since, self._tokens = time.monotonic(), TokenCounts()

    def _path(self, trial: str) -> Path:
        return self._metrics / f"{trial}.jsonl"

    def _series(self, state: TrialState, **values: float) -> None:
        if self._events is None:
            return
        path = self._path(state.trial.name)
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.step, **values}) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write {path}: {error.strerror}; make room, and the run resumes from its last checkpoint"
            ) from error


def _end(state: TrialState) -> dict[str, object]:
    return {"status": state.status, "reason": state.reason}
