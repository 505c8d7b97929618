"""Tensors with plain values beside them, in one safetensors file."""

import json
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open


def told(values: dict[str, Any]) -> dict[str, str]:
    """Plain values as the metadata of a file."""
    return {"told": json.dumps(values)}


def load_told(path: Path, framework: Literal["np", "pt"]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The plain values and the tensors by name; None where the file is not there, or damaged."""
    try:
        with safe_open(path, framework=framework) as file:
            values = json.loads(file.metadata()["told"])
            return values, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
