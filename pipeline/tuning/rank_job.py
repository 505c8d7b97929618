"""A run as sent to its ranks: plain values, and the files that the driver keeps for them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import StorageError
from pipeline.settings import Settings
from pipeline.tuning.incumbents import Incumbents, decode_incumbent, prompt_digest
from pipeline.tuning.progress import TuningRun
from pipeline.tuning.trials import Trial, make_trials


@dataclass(frozen=True)
class RankJob:
    """What every rank is to tune (`loop.tune_on_rank`)."""

    settings: dict[str, Any]
    corpora: dict[str, dict[str, Any]]
    """`TaskCorpus.to_dict()` by task, without the tasks that were left out."""
    fingerprint: str
    run_folder: str
    starts: dict[str, str]
    """Digest of the bank's prompt that a trial starts from, for `init: bank`."""
    incumbents: dict[str, str] = field(default_factory=dict)
    """By task, the digest of the bank's prompt that its best trial is measured against at the end."""

    @property
    def model_folder(self) -> Path:
        """Config and tokenizer, saved by the driver whatever the weights' format."""
        return Path(self.run_folder) / "model"

    def warm_start(self, trial: Trial) -> Path:
        """Where the driver keeps the bank's prompt that a trial with `init: bank` starts from."""
        source = str(trial.settings.prompt.source)
        return Path(self.run_folder) / "warm_starts" / f"{trial.task}.{source.replace('@', '.at.')}.safetensors"

    def incumbent(self, task: str) -> Path:
        """Where the driver keeps the bank's prompt of a task."""
        return Path(self.run_folder) / "incumbents" / f"{task}.safetensors"

    def task_corpora(self) -> dict[str, TaskCorpus]:
        return {task: TaskCorpus.from_dict(corpus) for task, corpus in self.corpora.items()}

    def trials(self, settings: Settings) -> list[Trial]:
        digests = {task: corpus.digest for task, corpus in self.task_corpora().items()}
        return make_trials(settings, digests, self.fingerprint, self.starts)

    def tuning_run(self, settings: Settings) -> TuningRun:
        """The run, with the prompts that trials start from. Raises: StorageError when one is damaged."""
        trials = self.trials(settings)
        kept = {trial.name: self.warm_start(trial) for trial in trials if trial.name in self.starts}
        digests = {path: self.starts[name] for name, path in kept.items()}
        prompts = {path: _kept_prompt(path, digest) for path, digest in digests.items()}
        return TuningRun(
            trials=trials,
            corpora=self.task_corpora(),
            folder=Path(self.run_folder),
            max_live_trials=settings.run.max_live_trials,
            checkpoint_every=settings.run.checkpoint_every,
            token_budget=settings.cluster.tokens_per_microbatch,
            warm_starts={name: prompts[path] for name, path in kept.items()},
        )

    def kept_incumbents(self) -> Incumbents:
        """The bank's prompts that the new ones are measured against. Raises: StorageError when one is damaged."""
        prompts, scorings = {}, {}
        for task, digest in self.incumbents.items():
            data = self.incumbent(task).read_bytes()
            if prompt_digest(data) != digest:
                raise _damaged(self.incumbent(task))
            prompts[task], scorings[task] = decode_incumbent(data)
        return Incumbents(self.incumbents, prompts, scorings)


def _kept_prompt(path: Path, digest: str) -> np.ndarray:
    """A prompt `[Q, H]` that the driver has kept. Raises: StorageError."""
    try:
        prompt: np.ndarray = load(path.read_bytes())["prompt"]
    except (SafetensorError, KeyError):
        prompt = np.empty(0)
    if prompt_digest(save({"prompt": prompt})) != digest:
        raise _damaged(path)
    return prompt


def _damaged(path: Path) -> StorageError:
    return StorageError(f"{path} is damaged: it is not what was kept there; start the same run again")
