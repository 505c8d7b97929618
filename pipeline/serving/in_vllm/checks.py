"""What of vLLM's command would make its model another one than the bank's record says, or hide a task. Imports no vLLM.

The plugin reads the model's folder as `--model` names it, and holds that against the record. Flags that only change how
the same values are held, loaded or computed (`--dtype`, `--quantization`, `--kv-cache-dtype`, tensor parallelism) pass.
"""

from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import SettingsError

_ALLOWED: dict[str, tuple[Any, ...]] = {
    "hf_overrides": ({},),
    "model_class_overrides": ({},),
    "config_format": ("auto", "hf"),
    "tokenizer_mode": ("auto", "hf", "slow"),
    # All others read other files than the model's safetensors, or none: dummy makes random weights.
    "load_format": ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor", "runai_streamer"),
}
_OF_THE_MODEL = ("tokenizer", "hf_config_path")
_OF_THE_HUB = ("revision", "tokenizer_revision", "code_revision")


def check_flags(args: Namespace, model: str) -> None:
    """Raises: SettingsError that names the flag."""
    for name, allowed in _ALLOWED.items():
        given = getattr(args, name, None)
        if given is not None and given not in allowed:
            _refuse(name, given, "leave it out" if allowed == ({},) else f"leave it out, or give {_one_of(allowed)}")
    for name in _OF_THE_MODEL:
        given = getattr(args, name, None)
        if given is not None and not _is_same_place(str(given), model):
            _refuse(name, given, "leave it out, so that it is the model's own")
    for name in _OF_THE_HUB:
        given = getattr(args, name, None)
        if given is not None and not Path(model).exists():  # of a folder there is one revision, whatever is asked for
            _refuse(name, given, "download that revision, and give its folder as --model")


def hidden_tasks(tasks: Iterable[str], served: Iterable[str]) -> tuple[str, ...]:
    """The tasks that cannot be asked, because a model of vLLM has the name and answers to it."""
    taken = {name.partition("@")[0] for name in served}
    return tuple(task for task in tasks if task in taken)


def check_names(tasks: Iterable[str], served: Iterable[str]) -> None:
    """Raises: SettingsError when a model that vLLM serves has the name of a task."""
    if hidden := hidden_tasks(tasks, served):
        raise SettingsError(
            f"the model that vLLM serves as '{hidden[0]}' would answer in place of the bank's task of that name: give "
            "the model another name (--served-model-name)"
        )


def _refuse(name: str, given: Any, remedy: str) -> None:
    flag = f"--{name.replace('_', '-')}"
    raise SettingsError(
        f"{flag} {given}: vLLM would run another model than the one that is held against the bank's record; {remedy}"
    )


def _one_of(values: Sequence[str]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"


def _is_same_place(given: str, model: str) -> bool:
    return given == model or (Path(given).exists() and Path(given).resolve() == Path(model).resolve())
