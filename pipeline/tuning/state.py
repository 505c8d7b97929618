"""Where a trial stands: everything needed to go on with it, or to publish it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from pipeline.tuning.evaluate import Score
from pipeline.tuning.halving import rungs
from pipeline.tuning.metrics import goodness
from pipeline.tuning.optimise import clip_gradients, make_optimizer, resume_optimizer, take_step
from pipeline.tuning.parameters import PromptParameters, recorded_parameters
from pipeline.tuning.trials import Trial

_FIRST_STEPS = 50
"""Within these a trial may start again."""
_RECENT = 5
"""Steps whose mean loss is taken: that of one batch may be high by chance."""

Status = Literal["live", "paused", "tuned", "stopped early", "halved", "no gain", "failed"]
"""`paused` at a rung until halving decides; `halved` is how it then ends. `stopped early` is for want of progress."""


@dataclass(frozen=True)
class Evaluation:
    step: int
    value: float
    loss: float

    def better(self, metric: str, than: "Evaluation") -> bool:
        return goodness(metric, self.value, self.loss) > goodness(metric, than.value, than.loss)


@dataclass
class TrialState:
    """A trial that has started; changed in place, alike on every rank."""

    trial: Trial
    prompt: Parameter = field(compare=False)
    """The prompt now, `[P, H]` float32."""
    optimizer: Optimizer = field(compare=False)
    best: Tensor = field(compare=False)
    """The prompt at its best evaluation, `[P, H]` float32."""
    rate: float
    """The learning rate: as set, or as found where `lr` is `auto`; a third of it after a restart."""
    parameters: PromptParameters | None = field(default=None, compare=False)
    """What is trained in the prompt's place and folds into it; None: the prompt itself."""
    step: int = 0
    history: list[Evaluation] = field(default_factory=list)
    best_at: int = 0
    """Place of the best evaluation in `history`."""
    label_offsets: tuple[float, ...] | None = None
    """[labels] nats that are taken off each label's score behind the best prompt, with `calibrate`."""
    losses: list[float] = field(default_factory=list)
    """Of its steps on train rows, while it may still start again."""
    restarted: str | None = None
    """Why it started again, if it did, in a sentence."""
    status: Status = "live"
    reason: str | None = None
    test: Score | None = None

    @property
    def exploded(self) -> bool:
        """Whether its first steps have taken it to where the loss is far above that of its first one."""
        # Back at its start it would come to a rung of its sweep twice; and one that is better has not exploded.
        judged = self.trial.settings.halving is not None and len(self.history) > 1
        if self.restarted or self.best_at or judged or not self.losses:
            return False
        # Of train rows, as its first: of dev rows it may be another loss, with `balance` or a teacher.
        recent = self.losses[-_RECENT:]
        far = len(self.losses) > _RECENT and float(np.mean(recent)) > _far_above(self.losses[0])
        return far or not np.isfinite(self.losses[-1])

    @property
    def ended(self) -> bool:
        return self.status not in ("live", "paused")

    @property
    def role(self) -> Literal["live", "paused", "ended"]:
        """Its status as halving sees it."""
        return "live" if self.status == "live" else "paused" if self.status == "paused" else "ended"

    @property
    def scores(self) -> list[tuple[float, float]]:
        """Goodness at every evaluation after the start. One that was not finite ended the trial and is left out."""
        metric = self.trial.settings.metric
        return [goodness(metric, e.value, e.loss) for e in self.history[1:] if np.isfinite(e.loss)]

    @property
    def due(self) -> bool:
        """Whether the dev metric is to be measured now."""
        settings = self.trial.settings
        measured = self.history[-1].step == self.step
        return not measured and (self.step % settings.eval_every == 0 or self.step >= settings.max_steps)

    def update(self, loss: float) -> None:
        """Take one step with the gradient that is in the prompt; end the trial where the loss is not finite.

        `losses_and_gradients` gives no finite loss where the gradient is not finite.
        """
        settings = self.trial.settings
        assert self.prompt.grad is not None
        self.losses = [*self.losses, loss] if self.step < _FIRST_STEPS else []
        if self.exploded:
            return  # see `start_again`
        if not np.isfinite(loss):
            self.fail_at("loss", loss)
            return
        clip_gradients([self.prompt], settings.optimizer)
        if self.parameters is not None:
            self.parameters.pull_back(self.prompt.grad)
        take_step(self.optimizer, settings.optimizer, self.rate, self.step, settings.max_steps)
        if self.parameters is not None:
            with torch.no_grad():
                self.prompt.copy_(self.parameters.fold())
        self.step += 1

    def judge(self, score: Score) -> None:
        """Take in an evaluation: keep the best prompt, and stop when done or without progress."""
        settings = self.trial.settings
        self.history.append(Evaluation(self.step, score.value, score.loss))
        if self.history[-1].better(settings.metric, self.history[self.best_at]):
            self.best, self.best_at = self.prompt.detach().clone(), len(self.history) - 1
        if self.best_at == len(self.history) - 1:
            self.label_offsets = score.label_offsets
        stale = len(self.history) - 1 - self.best_at
        if not np.isfinite(score.loss):
            self.fail_at("dev loss", score.loss)
        elif self.step >= settings.max_steps:
            self.status = "tuned" if self.best_at else "no gain"
        elif settings.patience is not None and (stale >= settings.patience or self._diverged):
            self.status = "stopped early" if self.best_at else "no gain"
            why = "its dev loss is far above that of its start" if self._diverged else f"no gain in {stale} evaluations"
            self.reason = f"{why}; {settings.max_steps - self.step:,} of {settings.max_steps:,} steps were saved"
        elif len(self.history) - 1 in rungs(settings):
            self.status = "paused"

    @property
    def _diverged(self) -> bool:
        """Whether its last two evaluations were no gain, and far above its start."""
        first, *later = (evaluation.loss for evaluation in self.history)
        return len(later) - self.best_at > 1 and min(later[-2:]) > _far_above(first)

    def halve(self, place: int, among: int) -> None:
        """End the trial at its rung, which it reached in this place among so many."""
        self.status = "halved"
        metric = self.trial.settings.metric
        self.reason = f"its dev {metric} at step {self.step} was in place {place} of {among} trials of its sweep"

    def lose(self, reason: str) -> None:
        """End the trial, whose corpus is gone."""
        if not self.history:  # it never started
            self.history.append(Evaluation(self.step, float("nan"), float("nan")))
        self.status, self.reason = "failed", reason

    def fail_at(self, what: str, value: float) -> None:
        """End the trial, one of whose numbers is not finite any more."""
        self.status = "failed"
        was = f" (auto: {self.rate:.3g})" if self.trial.settings.optimizer.lr == "auto" else ""
        self.reason = f"the {what} was {value} at step {self.step}; lower optimizer.lr{was} or set optimizer.clip_norm"


def start(
    trial: Trial, prompt: Tensor, parameters: PromptParameters | None = None, rate: float | None = None
) -> TrialState:
    """A trial at this prompt `[P, H]`, into which its `parameters` fold; `rate` is the one found for it."""
    leaf, settings = Parameter(prompt.clone()), trial.settings.optimizer
    rate = settings.rate if rate is None else rate
    optimizer = make_optimizer(leaf if parameters is None else parameters.groups(), settings, rate)
    return TrialState(trial, leaf, optimizer, prompt.clone(), rate, parameters)


def start_again(state: TrialState, parameters: PromptParameters | None) -> TrialState:
    """A trial that exploded, at its start and a third of its rate; `parameters` fold into its first prompt."""
    # Nothing was better since: the best prompt is the one that it started from.
    again = start(state.trial, state.best, parameters, state.rate / 3.0)
    again.history, again.label_offsets = state.history[:1], state.label_offsets
    again.restarted = (
        f"at a rate of {state.rate:.3g} its loss exploded: {state.losses[-1]:.3g} at step {state.step}; it started "
        f"again at {again.rate:.3g}"
    )
    return again


def _far_above(first: float) -> float:
    """A loss, in nats a target token, that a trial whose first one was `first` does not reach by chance."""
    return first + min(max(0.5 * first, 0.5), 2.0)


def winner(states: Iterable[TrialState | None]) -> TrialState | None:
    """Of a task's trials (None: not started), the one whose best prompt has the best dev metric, the first of equals.

    One that halving stopped may win: its best prompt was measured on the same rows. None when every trial failed.
    """
    first: TrialState | None = None
    for state in states:
        if state is None or state.status == "failed":
            continue
        metric, best = state.trial.settings.metric, state.history[state.best_at]
        if first is None or best.better(metric, first.history[first.best_at]):
            first = state
    return first


def by_task(states: Iterable[TrialState]) -> dict[str, list[TrialState]]:
    """Each task's trials, in their order."""
    of_task: dict[str, list[TrialState]] = {}
    for state in states:
        of_task.setdefault(state.trial.task, []).append(state)
    return of_task


RECORDED = {"digest", "step", "best_at", "status", "reason", "history", "test", "optimizer"}
"""The keys of every record; one of a calibrated prompt has `label_offsets`, too."""


def to_record(state: TrialState) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A state as plain JSON and named tensors."""
    numbers: dict[str, Any] = {}
    tensors = {"prompt": state.prompt.detach(), "best": state.best}
    # An ended trial takes no step any more: of a long sweep only what the live trials train with is written.
    if not state.ended:
        if state.parameters is not None:
            tensors |= {f"parameters/{name}": tensor.detach() for name, tensor in state.parameters.tensors().items()}
        for key, value in _optimizer_state(state).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{key}"] = value
            else:
                numbers[key] = value
    record = {
        "digest": state.trial.digest,
        "step": state.step,
        "best_at": state.best_at,
        "rate": state.rate,
        "losses": state.losses,
        "restarted": state.restarted,
        "status": state.status,
        "reason": state.reason,
        "history": [asdict(evaluation) for evaluation in state.history],
        "test": None if state.test is None else {"value": state.test.value, "loss": state.test.loss},
        "optimizer": numbers,
    }
    if state.label_offsets is not None:
        record["label_offsets"] = state.label_offsets
    return record, {key: value.cpu().contiguous() for key, value in tensors.items()}


def from_record(trial: Trial, record: dict[str, Any], tensors: dict[str, Tensor], device: torch.device) -> TrialState:
    """The inverse of `to_record`."""
    own = {name: tensor.to(device) for name, tensor in _below("parameters/", tensors).items()}
    parameters = recorded_parameters(trial.settings.prompt.parameters, own) if own else None
    state = start(trial, tensors["prompt"].to(device), parameters, record.get("rate"))  # absent before `lr: auto`
    state.best = tensors["best"].to(device)
    kept = record["optimizer"] | _below("optimizer/", tensors)
    resume_optimizer(state.optimizer, [_below(prefix, kept) for prefix in _prefixes(parameters)])
    state.losses, state.restarted = record.get("losses", []), record.get("restarted")
    state.step, state.best_at = record["step"], record["best_at"]
    state.status, state.reason = record["status"], record["reason"]
    state.history = [Evaluation(**evaluation) for evaluation in record["history"]]
    state.test = None if record["test"] is None else Score(**record["test"])
    state.label_offsets = tuple(record["label_offsets"]) if "label_offsets" in record else None
    return state


def _optimizer_state(state: TrialState) -> dict[str, Any]:
    """What the optimizer keeps: of a prompt by its own key, of each trained parameter behind the parameter's name."""
    kept = state.optimizer.state_dict()["state"]
    prefixes = enumerate(_prefixes(state.parameters))
    return {f"{prefix}{key}": value for place, prefix in prefixes for key, value in kept.get(place, {}).items()}


def _prefixes(parameters: PromptParameters | None) -> list[str]:
    return [""] if parameters is None else [f"{name}/" for name in parameters.rates()]


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
