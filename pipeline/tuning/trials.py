"""Trials: one soft prompt being tuned, with everything that decides what it will become."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipeline.settings import Settings, TaskSettings


@dataclass(frozen=True)
class Trial:
    """A task with one choice of length, initialisation, optimizer and seed."""

    name: str
    task: str
    settings: TaskSettings
    seed: int
    digest: str
    """Of everything that decides the tuned prompt: settings, seed, corpus, backbone, bank prompt started from.

    A checkpointed trial is taken up again only under the same digest.
    """

    def generator(self, purpose: str, index: int = 0) -> np.random.Generator:
        """Random numbers for one purpose of this trial, the same whichever trials run beside it."""
        return random_numbers(self.seed, self.name, purpose, index)


def random_numbers(*key: int | str) -> np.random.Generator:
    """A generator seeded by the key, on every machine alike."""
    seed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "big")))


def make_trials(
    settings: Settings, corpora: Mapping[str, str], fingerprint: str, starts: Mapping[str, str]
) -> list[Trial]:
    """One trial for each task of `corpora` (task -> corpus digest), in the settings' order.

    `starts` has the digest of the bank's prompt that a task starts from, for `init: bank`.
    """
    return [
        make_trial(name, task, _seed(settings, task), corpora[name], fingerprint, starts.get(name))
        for name, task in settings.tasks.items()
        if name in corpora
    ]


def _seed(settings: Settings, task: TaskSettings) -> int:
    return settings.run.seed if task.seed is None else task.seed


def make_trial(
    name: str, task: TaskSettings, seed: int, corpus: str, fingerprint: str, starts_from: str | None = None
) -> Trial:
    # Where the files lie does not matter; what they hold is in the corpus digest.
    deciding = task.model_dump(mode="json", exclude={"train", "dev", "test", "seed", "max_bad_rows"})
    parts = [name, seed, corpus, fingerprint, deciding, starts_from]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Trial(name, name, task, seed, digest)
