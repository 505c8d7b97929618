"""Recipes: a paper's choices for tuning a prompt, which one word in a settings file stands for."""

from collections.abc import Mapping
from typing import Any, Literal

Recipe = Literal["lester2021"]

RECIPES: Mapping[Recipe, Mapping[str, Any]] = {
    # Lester et al. (2021), section 3 and appendix A. Every choice is spelt out, also where it is the default today.
    "lester2021": {
        "prompt": {"length": 100, "init": "class_labels", "parameters": "direct"},
        "optimizer": {
            "name": "adafactor",
            "lr": 0.3,
            "weight_decay": 1e-5,
            "schedule": "constant",
            "warmup_steps": 0,
            "clip_norm": None,
        },
        "batch_size": 32,
        "max_steps": 30_000,
        "eval_every": 500,
        "patience": 10,
    }
}


def laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of both, key by key, also of mappings inside them; where both have a value, that of `above`."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = laid_over(merged[key], value) if both else value
    return merged
