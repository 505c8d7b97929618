"""Train all weights from the newest checkpoint to the last step. Every rank runs this loop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DivergedError
from pipeline.lab.full_weights.checkpoint import TrainingProgress, load_progress, save_progress
from pipeline.lab.full_weights.pieces import TrainedModel
from pipeline.lab.full_weights.step import Examples, loss_and_gradient
from pipeline.lab.full_weights.training_log import TrainingLog
from pipeline.settings import OptimizerSettings
from pipeline.tuning.interruption.stop_signal import StopSignal
from pipeline.tuning.optimise import schedule_factor


@dataclass(frozen=True)
class TrainingPlan:
    """What a training runs on, and how."""

    digest: str
    """Digest of all that decides the weights; a training resumes only from checkpoints with the same one."""
    checkpoints: Path
    """A folder that every rank sees."""
    examples: Callable[[int], Examples]
    """The examples of a step (from 0). A pure function, so that all ranks and a resumed training take the same."""
    steps: int
    optimizer: OptimizerSettings
    checkpoint_every: int
    token_budget: int
    """Tokens that one rank runs in one forward pass at most, padding included."""


def train(
    model: TrainedModel,
    plan: TrainingPlan,
    log: TrainingLog,
    between_steps: Callable[[TrainingProgress], bool],
    stop_signal: StopSignal | None = None,
) -> TrainingProgress | None:
    """Train from the newest checkpoint to the last step; None where it was told to stop earlier, with a checkpoint.

    `between_steps` is called before each step and after the last one, and returns whether to go on. It may be called
    twice at a step, since a training that was killed repeats the steps after its last checkpoint.
    Raises: DivergedError when the loss becomes infinite or NaN; StorageError when a checkpoint cannot be written.
    """
    progress = load_progress(plan.checkpoints, plan.digest, model) or TrainingProgress()
    log.begins(progress.step)
    while True:
        since = time.monotonic()
        if not between_steps(progress) or progress.step >= plan.steps:
            progress.seconds += time.monotonic() - since
            return progress
        notice = stop_signal.next(model.backbone.device) if stop_signal else "go on"
        if notice != "go on":
            save_progress(plan.checkpoints, plan.digest, model, progress)
        if notice == "stop":
            log.event("stage", name="tuning", text=f"stopping at step {progress.step}, with a checkpoint")
            return None
        _step(model, plan, progress, log)
        progress.seconds += time.monotonic() - since
        if progress.step % plan.checkpoint_every == 0 and progress.step < plan.steps:
            save_progress(plan.checkpoints, plan.digest, model, progress)


def _step(model: TrainedModel, plan: TrainingPlan, progress: TrainingProgress, log: TrainingLog) -> None:
    examples = plan.examples(progress.step)
    loss = loss_and_gradient(model, examples, plan.token_budget)
    if not math.isfinite(loss):
        raise DivergedError(f"the loss was {loss} at step {progress.step}")
    model.update(plan.optimizer.rate * schedule_factor(plan.optimizer, progress.step, plan.steps))
    progress.step += 1
    log.stepped(progress.step, loss, examples.tokens, model.backbone.traffic.gathered)
