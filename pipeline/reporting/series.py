"""A trial's series of metrics, `metrics/<trial>.jsonl`: one JSON object a line, each with its step."""

import json
from pathlib import Path
from typing import Any


def read_series(path: Path) -> list[dict[str, Any]]:
    """The points of the series; damaged and incomplete lines are skipped. Raises: OSError."""
    points = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict) and isinstance(point.get("step"), int) and point.keys() & {"loss", "dev_metric"}:
            points.append(point)
    return points
