"""Where a trial stands: everything needed to go on with it, or to publish it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeline.tuning.evaluate import Score
from pipeline.tuning.metrics import is_better
from pipeline.tuning.optimise import make_optimizer
from pipeline.tuning.trials import Trial

Status = Literal["live", "tuned", "stopped early", "no gain", "failed"]


@dataclass(frozen=True)
class Evaluation:
    step: int
    value: float
    loss: float


@dataclass
class TrialState:
    """A trial that has started; changed in place, alike on every rank."""

    trial: Trial
    prompt: Parameter
    """The prompt now, `[P, H]` float32."""
    optimizer: Optimizer
    best: Tensor
    """The prompt at its best evaluation."""
    step: int = 0
    history: list[Evaluation] = field(default_factory=list)
    best_at: int = 0
    """Place of the best evaluation in `history`."""
    status: Status = "live"
    reason: str | None = None
    test: Score | None = None

    @property
    def due(self) -> bool:
        """Whether the dev metric is to be measured now."""
        settings = self.trial.settings
        return self.step % settings.eval_every == 0 or self.step >= settings.max_steps

    def judge(self, score: Score) -> None:
        """Take in an evaluation: keep the best prompt, and stop when done or without progress."""
        settings = self.trial.settings
        self.history.append(Evaluation(self.step, score.value, score.loss))
        best = self.history[self.best_at]
        if len(self.history) > 1 and is_better(settings.metric, score.value, score.loss, (best.value, best.loss)):
            self.best, self.best_at = self.prompt.detach().clone(), len(self.history) - 1
        stale = len(self.history) - 1 - self.best_at
        if not np.isfinite(score.loss):
            self.fail_at("dev loss", score.loss)
        elif self.step >= settings.max_steps:
            self.status = "tuned" if self.best_at else "no gain"
        elif settings.patience is not None and stale >= settings.patience:
            self.status = "stopped early" if self.best_at else "no gain"

    def fail_at(self, what: str, value: float) -> None:
        """End the trial, which has left the range of numbers."""
        self.status = "failed"
        self.reason = f"the {what} was {value} at step {self.step}; lower optimizer.lr or set optimizer.clip_norm"


def start(trial: Trial, prompt: Tensor) -> TrialState:
    parameter = Parameter(prompt.clone())
    optimizer = make_optimizer(parameter, trial.settings.optimizer)
    return TrialState(trial, parameter, optimizer, best=prompt.clone())


def to_record(state: TrialState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state as plain JSON and named tensors."""
    numbers: dict[str, Any] = {}
    tensors = {"prompt": state.prompt.detach(), "best": state.best}
    for key, value in state.optimizer.state_dict()["state"].get(0, {}).items():
        if isinstance(value, Tensor):
            tensors[f"optimizer/{key}"] = value
        else:
            numbers[key] = value
    record = {
        "digest": state.trial.digest,
        "step": state.step,
        "best_at": state.best_at,
        "status": state.status,
        "reason": state.reason,
        "history": [asdict(evaluation) for evaluation in state.history],
        "test": None if state.test is None else asdict(state.test),
        "optimizer": numbers,
    }
    return record, {key: value.cpu().contiguous() for key, value in tensors.items()}


def from_record(trial: Trial, record: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> TrialState:
    """The inverse of `to_record`."""
    state = start(trial, tensors["prompt"].to(device))
    state.best = tensors["best"].to(device)
    kept = {k.removeprefix("optimizer/"): v for k, v in tensors.items() if k.startswith("optimizer/")}
    if kept or record["optimizer"]:
        whole = state.optimizer.state_dict()
        whole["state"] = {0: {**record["optimizer"], **kept}}
        state.optimizer.load_state_dict(whole)
    state.step, state.best_at = record["step"], record["best_at"]
    state.status, state.reason = record["status"], record["reason"]
    state.history = [Evaluation(**evaluation) for evaluation in record["history"]]
    state.test = None if record["test"] is None else Score(**record["test"])
    return state
