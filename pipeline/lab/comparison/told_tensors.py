"""Tensors with plain values beside them, in one safetensors file with a digest of its content."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from pipeline.sealed_files import open_tensors, sealed_tensors
from pipeline.whole_files import write_atomically

T = TypeVar("T")


def save_told(path: Path, tensors: T, values: dict[str, Any], save: Callable[[T, dict[str, str]], bytes]) -> None:
    """`save`: of safetensors, for the kind of tensors. Raises: StorageError."""
    write_atomically(path, sealed_tensors(save(tensors, {"told": json.dumps(values)})))


def load_told(path: Path, load: Callable[[bytes], T]) -> tuple[dict[str, Any], T] | None:
    """The plain values and the tensors by name; None where the file is not there, or damaged.

    `load`: of safetensors, for the kind of tensors.
    """
    try:
        data = path.read_bytes()
        return json.loads(open_tensors(data, ("told",))["told"]), load(data)
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
