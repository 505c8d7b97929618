"""Find a model folder's weight files: those that transformers reads, whatever else lies in the folder."""

import json
import re
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.errors import BackboneError

_WHOLE = "model.safetensors"
_DISTRIBUTED = re.compile(r"shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors$")
_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path, model: str) -> list[Path]:
    """The safetensors files that hold a folder's weights, in the order in which transformers reads them.

    That is the file that config.json names as `transformers_weights`, else model.safetensors, else what
    model.safetensors.index.json names. `model` is for messages.
    Raises: BackboneError when there is none, an index is damaged or names a file that is missing or elsewhere.
    """
    if any(_DISTRIBUTED.match(path.name) for path in folder.glob("shard-*.safetensors")):  # transformers prefers them
        raise BackboneError(
            f"model.path {model}: the folder holds a distributed checkpoint (shard-….safetensors); load it with "
            "transformers and save it again with save_pretrained, into a new folder"
        )
    named = _read_json(folder / "config.json", model).get("transformers_weights")
    first = named or next((name for name in (_WHOLE, _INDEX) if (folder / name).is_file()), None)
    if first is None:
        raise BackboneError(f"model.path {model}: {_why_there_are_none(folder)}")
    if not str(first).endswith((".safetensors", ".safetensors.index.json")):
        raise BackboneError(f"model.path {model}: config.json names {first} as its weights; only safetensors are read")
    names = [str(first)]
    if names[0].endswith(".json"):
        _check_inside(names, "config.json", model)
        names = _shards_of(folder / names[0], model)
    _check_inside(names, str(first), model)
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise BackboneError(
            f"model.path {model}: {len(missing)} of the {len(names)} weight files are missing, such as {missing[0]}; "
            "fetch the model again"
        )
    return [folder / name for name in names]


def weights_to_fetch(folder: Path, model: str) -> list[str]:
    """Files that a hub's model needs beside its JSON files and model.safetensors. Raises: BackboneError."""
    if not (folder / "config.json").is_file():
        return []
    named = _read_json(folder / "config.json", model).get("transformers_weights")
    first = str(named or _INDEX)
    if not named and (folder / _WHOLE).is_file():
        return []
    if not first.endswith(".json"):
        return [first]
    return _shards_of(folder / first, model) if (folder / first).is_file() else []


def _shards_of(index: Path, model: str) -> list[str]:
    """The files that an index names, sorted. Raises: BackboneError when it is damaged."""
    place_of = _read_json(index, model).get("weight_map")
    if not isinstance(place_of, dict) or not place_of or not all(isinstance(name, str) for name in place_of.values()):
        raise BackboneError(
            f"model.path {model}: {index.name} has no weight_map from tensors to files; fetch the model again"
        )
    return sorted(set(place_of.values()))


def _read_json(path: Path, model: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BackboneError(
            f"model.path {model}: {path.name} cannot be read ({error}); fetch the model again"
        ) from error
    if not isinstance(content, dict):
        raise BackboneError(f"model.path {model}: {path.name} holds no JSON object; fetch the model again")
    return content


def _check_inside(names: list[str], where: str, model: str) -> None:
    """Raises: BackboneError for a path that leaves the folder. A link in the folder may, as in the hub's cache."""
    for name in names:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BackboneError(
                f"model.path {model}: {where} names the file {name}, outside of the model's folder; put it inside"
            )


def _why_there_are_none(folder: Path) -> str:
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if others:
        return (
            f"the folder has {', '.join(others[:3])}{' …' * (len(others) > 3)}, but neither {_WHOLE} nor {_INDEX}, so "
            "nothing tells which files are the model's; save it again with save_pretrained, or rename its one file"
        )
    if any(folder.glob("*.bin")):
        return "only pickled weights (.bin); convert them to safetensors first"
    return f"the folder has no weights ({_WHOLE}, or {_INDEX} and its files)"
