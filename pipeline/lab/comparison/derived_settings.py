"""Settings that a comparison derives from the user's: for the whole run, for its bank, and for each other method."""

import importlib.util
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Literal

from pipeline.errors import SettingsError
from pipeline.settings import (
    BankSettings,
    OptimizerSettings,
    Settings,
    TaskSettings,
    TrainingSettings,
    changed_settings,
)


def comparison_settings(settings: Settings) -> Settings:
    """The settings with the comparison's seeds in every sweep that names none, and without early halving of trials.

    Raises: SettingsError when a method is not installed, or there would be too many trials.
    """
    if settings.compare.lora is not None and importlib.util.find_spec("peft") is None:
        raise SettingsError("compare.lora: PEFT is not installed; pip install 'promptbank[compare]', or set it to null")
    hard = settings.compare.hard_prompts
    if hard is not None and hard.search is not None and importlib.util.find_spec("gepa") is None:
        raise SettingsError(
            "compare.hard_prompts.search: GEPA is not installed; pip install 'promptbank[compare]', or set it to null"
        )
    tasks = {name: _with_seeds(task, settings.compare.seeds) for name, task in settings.tasks.items()}
    plain = {name: task.model_dump(mode="json") for name, task in tasks.items()}
    try:
        return changed_settings(settings, tasks=plain)
    except SettingsError as error:
        raise SettingsError(f"with compare.seeds {settings.compare.seeds}: {error}") from error


def with_own_bank(settings: Settings, folder: Path) -> Settings:
    """Settings with a bank in the comparison's own folder, for every trial's prompt under the trial's name."""
    bank = {"uri": str(folder / "bank"), "publish": "all", "alias": "latest"}
    return settings.model_copy(update={"bank": BankSettings.model_validate(bank)})


def _with_seeds(task: TaskSettings, seeds: int) -> TaskSettings:
    # Halving would stop some seeds early, and a mean over them would mix trainings of different lengths.
    whole = task.model_copy(update={"halving": None})
    if task.seed is not None or "seed" in (task.sweep or {}):
        return whole
    return whole.model_copy(update={"sweep": {**(task.sweep or {}), "seed": list(range(seeds))}})


def training_settings(
    task: TaskSettings, training: TrainingSettings, rate: float, name: Literal["adamw", "adafactor"] = "adamw"
) -> TaskSettings:
    """The task's settings with the method's own in place of those for prompts. Rows, metric and patience stay."""
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
    """(task, rate, seed) of all that is trained."""
    own = [task for task in tasks if training.tasks is None or task in training.tasks]
    yield from product(own, training.lr, range(seeds))
