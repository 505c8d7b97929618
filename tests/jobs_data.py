"""A whole small project in a folder: model, Parquet corpora and settings, as a user would have them."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from tests.corpora import reviews
from tests.tiny import make_model


def write_parquet(path: Path, pairs: list[tuple[Any, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": [text for text, _ in pairs], "label": [label for _, label in pairs]}), path)
    return path


def make_project(folder: Path, family: str = "llama", **defaults: Any) -> dict[str, Any]:
    """Two tasks, one with a dev file and a test file, one with a dev fraction; settings as a mapping."""
    make_model(folder / "model", family, scale=1.0)
    for seed, task in enumerate(("film", "book")):
        for i, split in enumerate(("train", "dev", "test")):
            write_parquet(folder / "corpora" / task / f"{split}.parquet", reviews(60, 10 * seed + i))
    corpora = folder / "corpora"
    return {
        "run": {"name": "small", "storage": str(folder / "runs"), "checkpoint_every": 5},
        "model": {"path": str(folder / "model")},
        "cluster": {"num_workers": 2, "partition": "always"},
        "defaults": {
            "prompt": {"length": 4},
            "optimizer": {"lr": 0.1},
            "batch_size": 4,
            "max_steps": 20,
            "eval_every": 10,
            "eval_rows": 60,
            "max_input_tokens": 32,
            "max_target_tokens": 8,
            **defaults,
        },
        "tasks": {
            "film": {
                "train": f"{corpora}/film/train.parquet",
                "dev": f"{corpora}/film/dev.parquet",
                "test": f"{corpora}/film/test.parquet",
            },
            "book": {
                "train": f"{corpora}/book/train.parquet",
                "dev_fraction": 0.3,
                "metric": "rouge_l",
                "prompt": {"length": 7, "init": "class_labels"},
                "labels": ["positive", "negative"],
            },
        },
        "bank": {"uri": str(folder / "bank")},
    }


def write_settings(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path
