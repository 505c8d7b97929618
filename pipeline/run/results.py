"""What became of every trial, and which trial of a task is published."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.reporting.events import finite
from pipeline.reporting.table import TrialResult
from pipeline.tuning.state import TrialState, by_task, winner
from pipeline.whole_files import write_atomically


@dataclass(frozen=True)
class Entry:
    """A task with its trials, all of which have ended."""

    trials: Sequence[TrialState]
    chosen: TrialState
    """The trial to be published; where every one failed, the first."""

    @property
    def task(self) -> str:
        return self.chosen.trial.task

    @property
    def failed(self) -> bool:
        return self.chosen.status == "failed"

    @property
    def reason(self) -> str | None:
        """Why there is no prompt, in one sentence."""
        if not self.failed or len(self.trials) == 1:
            return self.chosen.reason if self.failed else None
        return f"all of its {len(self.trials)} trials failed; of the first, {self.chosen.reason}"


def choose(states: Sequence[TrialState]) -> list[Entry]:
    """The tasks of these trials, in the trials' order."""
    return [Entry(trials, winner(trials) or trials[0]) for trials in by_task(states).values()]


def result_of(entry: Entry) -> TrialResult:
    state = entry.chosen
    return TrialResult(
        trial=entry.task if entry.failed else state.trial.name,
        task=entry.task,
        steps=state.step,
        metric=state.trial.settings.metric,
        dev_before=state.history[0].value,
        dev_after=state.history[state.best_at].value,
        test=state.test.value if state.test else None,
        status=state.status,
        reason=entry.reason,
        among=_among(entry.trials) if len(entry.trials) > 1 else None,
    )


def write_trials(path: Path, entries: Sequence[Entry]) -> None:
    """Every trial's choices, end and figures as a JSON list; the published ones are marked. Raises: StorageError."""
    rows = [_row(state, state is entry.chosen and not entry.failed) for entry in entries for state in entry.trials]
    write_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())


def _row(state: TrialState, published: bool) -> dict[str, object]:
    settings, best = state.trial.settings, state.history[state.best_at]
    figures = {"dev_before": state.history[0].value, "dev_after": best.value, "dev_loss_after": best.loss}
    return {
        "trial": state.trial.name,
        "task": state.trial.task,
        "published": published,
        "prompt": settings.prompt.model_dump(mode="json"),
        "optimizer": settings.optimizer.model_dump(mode="json"),
        "seed": state.trial.seed,
        "settings_digest": state.trial.digest,
        "status": state.status,
        "reason": state.reason,
        "steps": state.step,
        "best_step": best.step,
        "metric": settings.metric,
        **finite(figures),
        "test": state.test.value if state.test else None,
    }


def _among(trials: Sequence[TrialState]) -> str:
    counts = Counter(state.status for state in trials if state.status in ("halved", "failed"))
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), reverse=True))
    return f"best of {len(trials)}" + (f" ({told})" if told else "")
