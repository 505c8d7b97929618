"""How a method that changes weights is trained on a task, from what the comparison and the task say."""

from collections.abc import Iterator
from itertools import product
from typing import Literal

from pipeline.settings import OptimizerSettings, TaskSettings, TrainingSettings


def training_settings(
    task: TaskSettings, training: TrainingSettings, rate: float, name: Literal["adamw", "adafactor"] = "adamw"
) -> TaskSettings:
    """The task's settings with the method's own in place of the prompts'; its rows, metric and patience stay."""
    changes = {key: getattr(training, key) for key in ("batch_size", "max_steps", "eval_every")}
    optimizer = OptimizerSettings(
        name=name,
        lr=rate,
        weight_decay=training.weight_decay,
        schedule=training.schedule,
        warmup_steps=training.warmup_steps,
    )
    kept = {key: value for key, value in changes.items() if value is not None}
    return task.model_copy(update={**kept, "optimizer": optimizer, "sweep": None, "seed": None})


def training_grid(training: TrainingSettings, tasks: list[str], seeds: int) -> Iterator[tuple[str, float, int]]:
    """(task, rate, seed) of everything that is trained."""
    own = [task for task in tasks if training.tasks is None or task in training.tasks]
    yield from product(own, training.lr, range(seeds))
