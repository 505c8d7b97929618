"""Trials: one soft prompt being tuned, with everything that decides what it will become."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.settings import Settings, TaskSettings

LATER_KEYS: Mapping[str, Any] = {
    "halving": None,
    "teacher": None,
    "label_score": "sum",
    "calibrate": False,
    "balance": False,
    "prompt.starts": 1,
    "prompt.parameters": "direct",
    "prompt.width": None,
}
"""Keys that came later, and the value of each under which a trial is what it was before: its digest leaves the key out
there, so that runs and nights of then are taken up."""


@dataclass(frozen=True)
class Trial:
    """A task with one choice of length, initialisation, optimizer and seed."""

    name: str
    """The task's, or for a trial of a sweep such as `sst2.length-20.lr-0.1`."""
    task: str
    settings: TaskSettings
    seed: int
    digest: str
    """Digest of everything that decides the tuned prompt: settings, seed, corpus, backbone, prompt started from.

    A checkpointed trial is taken up again only under the same digest.
    """

    def generator(self, purpose: str, index: int = 0) -> np.random.Generator:
        """Random numbers for one purpose of this trial, the same whichever trials run beside it.

        Trials of one task and seed draw the same ones: a sweep's choices are compared on equal rows, and a choice
        tuned in a sweep ends with the prompt of a task that was given that choice alone.
        """
        return random_numbers(self.seed, self.task, purpose, index)


def random_numbers(*key: int | str) -> np.random.Generator:
    """A generator seeded by the key, on every machine alike."""
    seed = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(seed[:16], "big")))


def make_trials(
    settings: Settings, corpora: Mapping[str, str], fingerprint: str, starts: Mapping[str, str]
) -> list[Trial]:
    """Every trial of each task of `corpora` (task -> corpus digest), in the settings' order.

    `starts` has the digest of the bank's prompt that a trial starts from, for `init: bank`.
    """
    products = settings.model.products
    return [
        make_trial(task, own, _seed(settings, own), corpora[task], fingerprint, starts.get(name), name, products)
        for task, whole in settings.tasks.items()
        if task in corpora
        for name, own in whole.trials(task).items()
    ]


def _seed(settings: Settings, task: TaskSettings) -> int:
    return settings.run.seed if task.seed is None else task.seed


def inputs_digest(settings: Settings, task: str, corpus: str) -> str:
    """Digest of all that a task's prompt is tuned from, its whole sweep included, but for the backbone.

    It tells nights on which there is something to tune from those on which there is not.
    """
    own = settings.tasks[task]
    parts = [task, _seed(settings, own), corpus, {**_deciding(own), "sweep": own.sweep}, settings.model.products]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def make_trial(
    task: str,
    settings: TaskSettings,
    seed: int,
    corpus: str,
    fingerprint: str,
    starts_from: str | None = None,
    name: str | None = None,
    products: str = "auto",
) -> Trial:
    """A trial of a task, of the task's name unless it has one of its own."""
    deciding = _deciding(settings)
    parts = [task, seed, corpus, fingerprint, deciding, starts_from, *([] if products == "auto" else [products])]
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return Trial(name or task, task, settings, seed, digest)


def _deciding(settings: TaskSettings) -> dict[str, Any]:
    # Where the files lie does not matter; what they hold is in the corpus digest. Nor which other trials there are.
    # What a recipe chose stands in the other keys.
    beside = dict.fromkeys(("train", "dev", "test", "seed", "max_bad_rows", "sweep", "recipe"), True)
    deciding = settings.model_dump(mode="json", exclude={**beside, "teacher": {"unlabelled"}})
    for key, before in LATER_KEYS.items():
        part, _, leaf = key.rpartition(".")
        place = deciding[part] if part else deciding
        if place[leaf] == before:
            del place[leaf]
    if isinstance(settings.input, str):
        del deciding["chat_options"]  # they matter to chats alone
    if settings.prompt.parameters == "direct":
        deciding["prompt"].pop("width", None)  # nothing has it
    return deciding
