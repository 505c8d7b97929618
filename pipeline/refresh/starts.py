"""Warm starts, written as a sweep over where a task's trials start from: every part of tuning understands sweeps.

A task without a sweep gets two trials, `sst2.init-bank` and, say, `sst2.init-sampled_vocab`: the same rows in the same
order, from the bank's prompt and from where the settings have it start. A task that is swept gets both sides of every
choice. Without `refresh.cold_side` the trials from the bank's prompt are all there are.
"""

from collections.abc import Sequence
from typing import Any

from pipeline.errors import SettingsError
from pipeline.refresh.plan import PlannedTask
from pipeline.settings import Settings, TaskSettings, changed_settings
from pipeline.tuning.trials import Trial


def reference(task: str, version: int) -> str:
    """The bank's prompt of a task, by number: an alias may have moved when a killed night goes on."""
    return f"{task}@{version}"


def with_warm_starts(settings: Settings, plan: Sequence[PlannedTask], version: int | None) -> Settings:
    """The settings under which tonight's tasks are tuned; `version` holds the prompts that warm ones start from.

    Raises: SettingsError when a task's trials become too many, or share a name with another's.
    """
    tasks: dict[str, Any] = {name: task.model_dump(mode="json") for name, task in settings.tasks.items()}
    for planned in plan:
        if planned.decision == "warm":
            assert version is not None
            own, source = settings.tasks[planned.task], reference(planned.task, version)
            changes = _beside_cold(own, source) if settings.refresh.cold_side else _warm_only(own, source)
            tasks[planned.task] |= changes
    try:
        return changed_settings(settings, tasks=tasks)
    except SettingsError as error:
        raise SettingsError(
            f"a warm start and a cold one for each trial cannot be set up: {error}; or set refresh.cold_side: false"
        ) from error


def is_warm(trial: Trial, version: int | None) -> bool:
    """Whether a trial starts from the bank's prompt of its own task."""
    prompt = trial.settings.prompt
    return version is not None and prompt.init == "bank" and prompt.source == reference(trial.task, version)


def _beside_cold(own: TaskSettings, source: str) -> dict[str, Any]:
    sweep = dict(own.sweep or {})
    prompt = own.prompt.model_dump(mode="json")
    if own.prompt.init == "bank" or "prompt.source" in sweep:  # its own start is a prompt of the bank, too
        sources = sweep.get("prompt.source", [own.prompt.source])
        sweep["prompt.source"] = [*sources, *([] if source in sources else [source])]
    else:
        prompt["source"] = source
        inits = sweep.get("prompt.init", [own.prompt.init])
        sweep["prompt.init"] = [*inits, *([] if "bank" in inits else ["bank"])]
    return {"sweep": sweep, "prompt": prompt}


def _warm_only(own: TaskSettings, source: str) -> dict[str, Any]:
    swept = {key: values for key, values in (own.sweep or {}).items() if key not in ("prompt.init", "prompt.source")}
    prompt = {**own.prompt.model_dump(mode="json"), "init": "bank", "source": source}
    return {"sweep": swept or None, "prompt": prompt, **({} if swept else {"halving": None})}
