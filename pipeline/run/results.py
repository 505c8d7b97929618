"""What became of every trial, and which trial of a task is published."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.reporting.events import finite
from pipeline.tuning.constant import constant_scores
from pipeline.tuning.metrics import goodness
from pipeline.tuning.state import TrialState, by_task, winner
from pipeline.whole_files import write_atomically

NO_GAIN = "no step was better than the prompt that it started from"
NOT_LEARNED = "not learned"


@dataclass(frozen=True)
class TaskResult:
    """A task with its trials, all of which have ended."""

    trials: Sequence[TrialState]
    chosen: TrialState
    """The trial to be published; where every one failed, the first."""
    constant: Mapping[str, float] = field(default_factory=dict)
    """What an answer that never looks at the row scores, by split (`constant_scores`); empty where there is none."""
    withholds: bool = False
    """Whether a prompt that has not learned is withheld: the setting `bank.not_learned`."""

    @property
    def task(self) -> str:
        return self.chosen.trial.task

    @property
    def trial(self) -> str:
        """The name of the trial that is published; where every one failed, the task's."""
        return self.task if self.failed else self.chosen.trial.name

    @property
    def metric(self) -> str:
        return self.chosen.trial.settings.metric

    @property
    def steps(self) -> int:
        """Steps that the chosen trial has taken."""
        return self.chosen.step

    @property
    def dev_before(self) -> float:
        """Dev metric of the prompt as it was initialised."""
        return self.chosen.history[0].value

    @property
    def dev_after(self) -> float:
        """Dev metric of the best prompt, the one that is published."""
        return self.chosen.history[self.chosen.best_at].value

    @property
    def test(self) -> float | None:
        return self.chosen.test.value if self.chosen.test else None

    @property
    def dev_constant(self) -> float | None:
        """Dev metric of always giving train's most frequent target; for `f1` of a guess, where that has more."""
        return self.constant.get("dev")

    @property
    def test_constant(self) -> float | None:
        return self.constant.get("test")

    @property
    def status(self) -> str:
        """tuned | stopped early | halved | no gain | not learned | failed"""
        return NOT_LEARNED if self.learned is False else self.chosen.status

    @property
    def among(self) -> str | None:
        """Which trials of its sweep it was chosen from: `best of 12 (8 halved)`."""
        if len(self.trials) == 1:
            return None
        counts = Counter(state.status for state in self.trials if state.status in ("halved", "failed"))
        told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items(), reverse=True))
        return f"best of {len(self.trials)}" + (f" ({told})" if told else "")

    @property
    def failed(self) -> bool:
        return self.chosen.status == "failed"

    @property
    def unlearned(self) -> str | None:
        """Why the prompt is not `learned`, in one sentence; None for one that is, or has failed.

        A prompt has learned when its dev metric is above the constant answer's and above that of the prompt that it
        started from; a start from the bank may have been good already, and a perfect score cannot be exceeded. Where
        the constant answer's is perfect, too, nobody can tell: `unjudged`.
        """
        state, metric = self.chosen, self.chosen.trial.settings.metric
        if self.failed:
            return None
        first, best = state.history[0].value, state.history[state.best_at].value
        if metric != "loss" and best >= 1.0:
            return None
        reasons = []
        if state.trial.settings.prompt.init != "bank" and goodness(metric, best, 0) <= goodness(metric, first, 0):
            told = f"its dev {metric} is {best:.3f} where the prompt that it started from has {first:.3f}"
            reasons.append(told if state.best_at else NO_GAIN)
        if (constant := below_constant(metric, best, self.dev_constant)) is not None:
            reasons.append(constant)
        return "; ".join(reasons) or None

    @property
    def unjudged(self) -> str | None:
        """Why a perfect prompt may have learned nothing, in one sentence; None for any other."""
        if self.failed or self.unlearned is not None or self.constant.get("dev", 0.0) < 1.0:
            return None
        return "nobody can tell whether it has learned: all its dev rows have the target that a constant answer gives"

    @property
    def learned(self) -> bool | None:
        """None where there is no prompt to judge, or nothing worse was found but nobody knows the constant answer, or
        that one is perfect, too."""
        if self.failed or self.unjudged is not None:
            return None
        if self.unlearned is not None:
            return False
        return True if self.constant or self.chosen.trial.settings.metric == "loss" else None

    @property
    def withheld(self) -> bool:
        """Whether there is a prompt, and it is not to be published."""
        return self.withholds and self.learned is False

    @property
    def reason(self) -> str | None:
        """In one sentence, why the task failed, or why its prompt has not learned or cannot be judged; else None."""
        if not self.failed:
            return self.unlearned or self.unjudged
        if len(self.trials) == 1:
            return self.chosen.reason
        return f"all of its {len(self.trials)} trials failed; of the first, {self.chosen.reason}"


@dataclass(frozen=True)
class RefusedTask:
    """A task that cannot be used and is left out (`run.on_bad_task: skip`), reported like a result."""

    task: str
    metric: str
    reason: str
    steps: ClassVar[int] = 0
    dev_before: ClassVar[float | None] = None
    dev_after: ClassVar[float | None] = None
    test: ClassVar[float | None] = None
    dev_constant: ClassVar[float | None] = None
    test_constant: ClassVar[float | None] = None
    status: ClassVar[str] = "failed"
    among: ClassVar[str | None] = None
    learned: ClassVar[bool | None] = None
    withheld: ClassVar[bool] = False

    @property
    def trial(self) -> str:
        return self.task


def below_constant(metric: str, value: float, constant: float | None) -> str | None:
    """Why a dev metric does not show that a prompt has learned, in one sentence; None where it does."""
    if constant is None or value >= 1.0 or value > constant:
        return None
    unread = "always giving train's most frequent target"
    if metric == "f1":
        unread = f"a guess, or {unread},"
    return f"its dev {metric} is {value:.3f} where {unread} has {constant:.3f}"


def choose(
    states: Sequence[TrialState], corpora: Mapping[str, TaskCorpus], tokenizer: Any, withholds: bool = False
) -> list[TaskResult]:
    """The tasks of these trials, in the trials' order, each with its `constant_scores`."""
    results = []
    for task, trials in by_task(states).items():
        chosen = winner(trials) or trials[0]
        settings = chosen.trial.settings
        constant = constant_scores(corpora[task], settings.metric, settings.eval_rows, tokenizer)
        results.append(TaskResult(trials, chosen, constant, withholds))
    return results


def write_trials(path: Path, results: Sequence[TaskResult]) -> None:
    """Every trial's choices, end and figures as a JSON list; the published ones are marked. Raises: StorageError."""
    rows = [_row(state, result) for result in results for state in result.trials]
    write_atomically(path, (json.dumps(rows, indent=1) + "\n").encode())


def _row(state: TrialState, result: TaskResult) -> dict[str, object]:
    own = replace(result, trials=[state], chosen=state)
    settings, best = state.trial.settings, state.history[state.best_at]
    figures = {"dev_before": state.history[0].value, "dev_after": best.value, "dev_loss_after": best.loss}
    return {
        "trial": state.trial.name,
        "task": state.trial.task,
        "published": state is result.chosen and not result.failed and not result.withheld,
        "prompt": settings.prompt.model_dump(mode="json"),
        "optimizer": settings.optimizer.model_dump(mode="json"),
        "rate": state.rate,
        "seed": state.trial.seed,
        "settings_digest": state.trial.digest,
        "status": state.status,
        "reason": "; ".join(filter(None, (own.unlearned or own.unjudged, state.restarted, state.reason))) or None,
        "steps": state.step,
        "best_step": best.step,
        "metric": settings.metric,
        **finite(figures),
        "test": state.test.value if state.test else None,
        "learned": own.learned,
        "dev_constant": result.dev_constant,
        "test_constant": result.test_constant,
    }
