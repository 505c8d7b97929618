"""A sweep's choices: every combination of its lists, as changes to a task's settings, and the trials' names."""

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, get_args

SweptKey = Literal[
    "prompt.length",
    "prompt.init",
    "prompt.text",
    "prompt.starts",
    "prompt.source",
    "prompt.parameters",
    "prompt.width",
    "optimizer.name",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "optimizer.clip_norm",
    "teacher.weight",
    "seed",
]
Sweep = Mapping[SweptKey, Sequence[Any]]
WrittenSweep = dict[SweptKey | Literal["seeds"], list[Any] | int]
"""As in a settings file, where `seeds: 3` is short for `seed: [0, 1, 2]`."""
Choice = Mapping[str, Any]
"""A value for each swept key."""

MOST_TRIALS = 1_000
_SHORT = re.compile(r"[A-Za-z0-9._-]{1,24}")
_LONGEST_NAME = 128
"""The longest name of a prompt in a bank."""


def expand_seeds(sweep: Any) -> Any:
    """A sweep as written, with its `seeds: n` as the seeds 0 to n - 1; anything else is returned as it is.

    Raises: ValueError when `seeds` is no valid number of seeds, or `seed` is there too.
    """
    if not isinstance(sweep, dict) or "seeds" not in sweep:
        return sweep
    seeds = sweep["seeds"]
    if "seed" in sweep:
        raise ValueError("give 'seed' (a list) or 'seeds' (how many), and not both")
    if not isinstance(seeds, int) or isinstance(seeds, bool) or not 1 <= seeds <= MOST_TRIALS:
        raise ValueError(f"seeds is how many seeds to take, from 1 to {MOST_TRIALS:,}; it is {seeds!r}")
    return {**{key: values for key, values in sweep.items() if key != "seeds"}, "seed": list(range(seeds))}


def count_choices(sweep: Sweep) -> int:
    return math.prod(map(len, sweep.values()))


def choices(sweep: Sweep) -> Iterator[Choice]:
    """All combinations, in the order of the keys' declaration; the last key changes fastest."""
    # Not the file's order: the trials' order breaks ties, and must not change when a settings file is sorted.
    keys = [key for key in get_args(SweptKey) if key in sweep]
    for values in product(*(sweep[key] for key in keys)):
        yield dict(zip(keys, values, strict=True))


def apply_choice(settings: Mapping[str, Any], choice: Choice) -> dict[str, Any]:
    """A task's settings with the choice in place of what stood there."""
    changed = dict(settings)
    for key, value in choice.items():
        part, _, leaf = key.rpartition(".")
        if part:
            changed[part] = {**changed[part], leaf: value}
        else:
            changed[leaf] = value
    return changed


def trial_name(task: str, choice: Choice) -> str:
    """`sst2.length-20.lr-0.1.seed-1`: different for different choices, and valid as a file's name."""
    parts = []
    for key, value in choice.items():
        word = "optimizer" if key == "optimizer.name" else key.rpartition(".")[2]
        text = "none" if value is None else str(value)
        parts.append(f"{word}-{text if _SHORT.fullmatch(text) else _digest(text)}")
    name = ".".join([task, *parts])
    return name if len(name) <= _LONGEST_NAME else f"{task}.{_digest(name)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
