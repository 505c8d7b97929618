"""Turns a YAML file and overrides into validated settings, or into one sentence for each mistake."""

import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from pipeline.errors import SettingsError
from pipeline.settings.adaptation import AdaptationSettings
from pipeline.settings.corpora import MAPPING
from pipeline.settings.joining import JoinSettings
from pipeline.settings.models import Settings
from pipeline.settings.recipes import laid_over
from pipeline.settings.sweeps import expand_seeds
from pipeline.settings.tasks import TaskSettings
from pipeline.settings.yaml_text import Place, Spellings, quoted, read_yaml_text

Root = TypeVar("Root", bound=BaseModel)
_TASKS = Settings.model_fields["tasks"].annotation


def load_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Read and validate a settings file; `overrides` are `dotted.key=value` with YAML values.

    Raises: SettingsError naming the file, the key and the fix.
    """
    raw, spelt = read_yaml(path)
    return parse_settings(raw, overrides, str(path), spelt)


def load_adaptation(path: str | Path, overrides: Sequence[str] = ()) -> AdaptationSettings:
    """Read and validate the settings file of `jobs/adapt_backbone.py`. Raises: SettingsError."""
    return _load(AdaptationSettings, path, overrides)


def load_joined(path: str | Path) -> JoinSettings:
    """Read and validate the file of `jobs/compare_methods.py --join`. Raises: SettingsError."""
    return _load(JoinSettings, path)


def _load(model: type[Root], path: str | Path, overrides: Sequence[str] = ()) -> Root:
    """A file whose keys are those of `model`. Raises: SettingsError."""
    raw, spelt = read_yaml(path)
    if not isinstance(raw, dict):
        raise SettingsError(f"{path}: expected a mapping with the keys {', '.join(model.model_fields)}")
    for override in overrides:
        raw, spelt = _with_override(raw, override, spelt)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        sentences = dict.fromkeys(_sentence(detail, model, spelt) for detail in _of_meant_alternative(error.errors()))
        raise SettingsError("\n".join(f"{path}: {sentence}" for sentence in sentences)) from error


def read_yaml(path: str | Path) -> tuple[Any, Spellings]:
    """The values in a settings file, and how they are spelt. Raises: SettingsError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise SettingsError(f"{path} is not valid YAML: {error}") from error
        raise SettingsError(f"cannot read the settings file {path}: {getattr(error, 'strerror', error)}") from error
    return read_yaml_text(text, str(path))


def parse_settings(
    raw: Any, overrides: Sequence[str] = (), origin: str = "settings", spelt: Spellings | None = None
) -> Settings:
    """Validate a settings mapping as read from YAML. Raises: SettingsError."""
    spelt = spelt or {}
    if not isinstance(raw, dict):
        raise SettingsError(f"{origin}: expected a mapping with the keys {', '.join(Settings.model_fields)}")
    for override in overrides:
        raw, spelt = _with_override(raw, override, spelt)
    try:
        return Settings.model_validate(_with_defaults(raw))
    except ValidationError as error:
        details = _of_meant_alternative(error.errors())
        in_defaults = {detail["loc"][1:] for detail in details if detail["loc"][:1] == ("defaults",)}
        own = [d for d in details if d["loc"][:1] != ("tasks",) or d["loc"][2:] not in in_defaults]
        sentences = dict.fromkeys(map(partial(_sentence, spelt=spelt), own))
        raise SettingsError("\n".join(f"{origin}: {sentence}" for sentence in sentences)) from error


def changed_settings(settings: Settings, **changes: Any) -> Settings:
    """The settings with other plain values for some of their keys, validated. Raises: SettingsError."""
    try:
        return Settings.model_validate({**settings.model_dump(mode="json"), **changes})
    except ValidationError as error:
        raise SettingsError("; ".join(dict.fromkeys(map(_sentence, error.errors())))) from error


def settings_schema() -> str:
    """JSON Schema of the settings file, for editors (`# yaml-language-server: $schema=…`)."""
    return json.dumps(Settings.model_json_schema(), indent=2) + "\n"


def _with_override(raw: dict[str, Any], override: str, spelt: Spellings) -> tuple[dict[str, Any], Spellings]:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set {override}: write it as key=value, for example tasks.sst2.max_steps=50")
    result = dict(raw)
    node = result
    before, sweep, swept = key.partition(".sweep.")  # a sweep's own keys are dotted: prompt.length
    place: tuple[str, ...] = (*before.split("."), "sweep", swept) if sweep else tuple(key.split("."))
    *parents, leaf = place
    for parent in parents:
        child = node.get(parent)
        if child is not None and not isinstance(child, dict):
            raise SettingsError(f"--set {override}: '{parent}' is a value, not a mapping")
        node[parent] = dict(child or {})
        node = node[parent]
    node[leaf], new = read_yaml_text(value, f"--set {override}", place)
    return result, {at: text for at, text in spelt.items() if at[: len(place)] != place} | new


def _with_defaults(raw: dict[str, Any]) -> dict[str, Any]:
    defaults, tasks = raw.get("defaults"), raw.get("tasks")
    if not isinstance(defaults, dict) or not isinstance(tasks, dict):
        return raw
    defaults, tasks = _spelled_out(defaults), {name: _spelled_out(task) for name, task in tasks.items()}
    merged = {name: laid_over(defaults, task) if isinstance(task, dict) else task for name, task in tasks.items()}
    for name, task in tasks.items():
        if not isinstance(task, dict):
            continue
        if "dev" in task and "dev_fraction" not in task:  # a task's own dev split replaces the inherited one
            merged[name].pop("dev_fraction", None)
        if isinstance(own := task.get("teacher"), dict) and own.keys() & {"text", "text_file"}:  # so do its words
            dropped = {"text", "text_file"} - own.keys()
            merged[name]["teacher"] = {k: value for k, value in merged[name]["teacher"].items() if k not in dropped}
        _drop_what_is_set(merged[name], task)
        if merged[name].get("sweep") is None and "halving" not in task:  # inherited halving is for those with a sweep
            merged[name].pop("halving", None)
    return {**raw, "tasks": merged}


def _spelled_out(task: Any) -> Any:
    """The task with its `seeds: n` as a list of seeds, so that both spellings are merged alike."""
    if not isinstance(task, dict) or "sweep" not in task:
        return task
    with suppress(ValueError):  # an invalid sweep is reported when the settings are validated
        return {**task, "sweep": expand_seeds(task["sweep"])}
    return task


def _drop_what_is_set(merged: dict[str, Any], task: dict[str, Any]) -> None:
    """Remove inherited lists of the sweep for keys that the task sets itself."""
    own, sweep = task.get("sweep"), merged.get("sweep")
    if isinstance(sweep, dict):
        kept = {key: values for key, values in sweep.items() if key in (own or {}) or not _is_set(task, key)}
        if kept != sweep:
            merged["sweep"] = kept or None


def _is_set(task: Any, key: str) -> bool:
    part, _, rest = key.partition(".")
    return isinstance(task, dict) and part in task and (not rest or _is_set(task[part], rest))


def _of_meant_alternative(details: Sequence[Any]) -> list[Any]:
    """The mistakes without those of the alternative that was not meant, for fields of "a text, or a list"."""
    either = {
        detail["loc"][:place] for detail in details for place, part in enumerate(detail["loc"]) if _is_list_kind(part)
    }
    # A mistake inside the list shows that a list was meant.
    other_half = (("string_type", True), ("list_type", False))
    return [
        detail
        for detail in details
        if detail["loc"][:-1] not in either or (detail["type"], isinstance(detail["input"], list)) not in other_half
    ]


def _is_list_kind(part: int | str) -> bool:
    return isinstance(part, str) and part.startswith(("list[", MAPPING))


def _sentence(detail: Any, root: Any = Settings, spelt: Spellings | None = None) -> str:
    place = tuple(part for part in detail["loc"] if part not in ("str", "[key]") and not _is_list_kind(part))
    where = ".".join(map(str, place))
    message = detail["msg"].removeprefix("Value error, ")
    match detail["type"]:
        case "value_error" if not where:
            return str(message)
        case "extra_forbidden":
            return f"unknown key '{where}'{_suggestion(detail['loc'], root)}"
        case "missing":
            return f"'{where}' is missing"
        case "string_pattern_mismatch":
            return f"'{where}': {_short(detail['input'])!r} may hold only letters, digits, '.', '_' and '-'"
        case "string_type" if text := _text_meant(detail["input"], place, spelt or {}):
            return f"'{where}': {_short(text)} is not text in YAML; put it in quotes: {quoted(_short(text))}"
        case _:
            return f"'{where or 'the file'}': {message[:1].lower()}{message[1:]}"


def _models_in(annotation: Any) -> Iterator[Any]:
    """The settings models in a field's annotation, also those of a list's entries."""
    if hasattr(annotation, "model_fields"):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _text_meant(value: Any, place: Place, spelt: Spellings) -> str:
    """The spelling of a value that YAML does not read as text; empty for a missing value or one that is no scalar."""
    if isinstance(value, bool | int | float | date):
        return spelt.get(place, str(value))
    return spelt.get(place, "") if value is None else ""


def _short(text: Any) -> str:
    return str(text) if len(str(text)) <= 200 else f"{str(text)[:60]}…"


def _suggestion(loc: tuple[int | str, ...], root: Any) -> str:
    model: Any = root
    for part in loc[:-1]:
        # An index, or which alternative: the model of the list's entries was found with the list.
        if isinstance(part, int) or _is_list_kind(part):
            continue
        # Under `tasks` the key is a task's name; elsewhere it is a field of a model, which may be optional.
        model = TaskSettings if model is _TASKS else model.model_fields[str(part)].annotation
        if model is not _TASKS:
            model = next(_models_in(model), model)
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; known keys here: {', '.join(known)}"
