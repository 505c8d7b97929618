"""Random prompts for tiny models."""

import numpy as np

from pipeline.bank import Metrics, NewPrompt, Template

LABELS = {"film": ("negative", "positive"), "colour": ("red", "green", "blue"), "open": None}


def new_prompt(name: str, length: int, seed: int = 0, like: str | None = None, template: str = "{text}") -> NewPrompt:
    """A random prompt [length, 32] of the kind that `like` (or `name`) is in LABELS."""
    labels = LABELS[like or name]
    return NewPrompt(
        name=name,
        array=np.random.default_rng([length, seed]).normal(size=(length, 32)).astype(np.float32),
        task=name,
        template=Template(input=template, target="{label}", separator=" "),
        labels=labels,
        metric="accuracy" if labels else "rouge_l",
        metrics=Metrics(),
        initialisation="random",
        length=length,
        steps=0,
        seed=seed,
        corpus_digest="0" * 64,
        settings_digest="0" * 64,
    )
