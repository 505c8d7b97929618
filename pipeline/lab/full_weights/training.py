"""The training of all weights from its newest checkpoint to its end. Every rank runs this loop alike."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import DivergedError
from pipeline.lab.full_weights.checkpoint import Progress, load_progress, save_progress
from pipeline.lab.full_weights.pieces import TrainedModel
from pipeline.lab.full_weights.step import Examples, loss_and_gradient
from pipeline.lab.full_weights.training_log import TrainingLog
from pipeline.settings import OptimizerSettings
from pipeline.tuning.interruption.stop_signal import StopSignal
from pipeline.tuning.optimise import schedule_factor


@dataclass(frozen=True)
class Course:
    """What is trained on, and how."""

    digest: str
    """Of everything that decides the weights; a checkpoint is taken up under the same alone."""
    checkpoints: Path
    """A folder that every rank sees."""
    examples: Callable[[int], Examples]
    """Of a step (from 0): a pure function, so that ranks need not talk, and a resumed training takes the same."""
    steps: int
    optimizer: OptimizerSettings
    checkpoint_every: int
    token_budget: int
    """Tokens that one rank runs in one forward pass at most, padding included."""


def train(
    model: TrainedModel,
    course: Course,
    journal: TrainingLog,
    pause: Callable[[Progress], bool],
    notices: StopSignal | None = None,
) -> Progress | None:
    """Train from the newest checkpoint to the last step; None where it was told to stop, with a checkpoint, before.

    `pause` is called before each step and after the last one, and tells whether to go on. What it does at a step it
    may have done before: a training that was killed repeats the steps after its last checkpoint.
    Raises: DivergedError when the loss leaves the range of numbers; StorageError when a checkpoint cannot be written.
    """
    progress = load_progress(course.checkpoints, course.digest, model) or Progress()
    journal.begins(progress.step)
    while True:
        since = time.monotonic()
        if not pause(progress) or progress.step >= course.steps:
            progress.seconds += time.monotonic() - since
            return progress
        notice = notices.next(model.backbone.device) if notices else "go on"
        if notice != "go on":
            save_progress(course.checkpoints, course.digest, model, progress)
        if notice == "stop":
            journal.event("stage", name="tuning", text=f"stopping at step {progress.step}, with a checkpoint")
            return None
        _step(model, course, progress, journal)
        progress.seconds += time.monotonic() - since
        if progress.step % course.checkpoint_every == 0 and progress.step < course.steps:
            save_progress(course.checkpoints, course.digest, model, progress)


def _step(model: TrainedModel, course: Course, progress: Progress, journal: TrainingLog) -> None:
    examples = course.examples(progress.step)
    loss = loss_and_gradient(model, examples, course.token_budget)
    if not math.isfinite(loss):
        raise DivergedError(f"the loss was {loss} at step {progress.step}")
    model.update(course.optimizer.lr * schedule_factor(course.optimizer, progress.step, course.steps))
    progress.step += 1
    journal.stepped(progress.step, loss, examples.tokens, model.backbone.traffic.gathered)
