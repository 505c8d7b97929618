"""What one rank does: load its part of the backbone, tune, and check that the backbone stayed frozen."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from transformers import AutoTokenizer

from pipeline.backbone.host import held_bytes, held_digest
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import StorageError, TuningError
from pipeline.settings import Settings
from pipeline.tuning.hosting import host_on_rank
from pipeline.tuning.incumbents import Incumbents, measure, prompt_digest
from pipeline.tuning.loop import TuningRun, tune
from pipeline.tuning.rank_process import rank_process
from pipeline.tuning.ranks import rank, world_size
from pipeline.tuning.run_log import RunLog
from pipeline.tuning.stop_signal import StopSignal
from pipeline.tuning.trials import Trial, make_trials
from pipeline.tuning.watchdog import call_at_every_layer, hang_reports, hang_sentence, hangs_of


@dataclass(frozen=True)
class RankJob:
    """A run as sent to its workers: plain values only."""

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

    def carry_out(self, device: torch.device, node_leaves: Callable[[], bool]) -> None:
        """See `work`."""
        work(self, device, node_leaves)


def _kept_prompt(path: Path, digest: str) -> np.ndarray:
    """A prompt `[Q, H]` that the driver has kept. Raises: StorageError."""
    try:
        prompt: np.ndarray = load(path.read_bytes())["prompt"]
    except (SafetensorError, KeyError):
        prompt = np.empty(0)
    if prompt_digest(save({"prompt": prompt})) != digest:
        raise StorageError(f"{path} is damaged: it is not what was kept there; start the same run again")
    return prompt


def work(order: RankJob, device: torch.device, node_leaves: Callable[[], bool]) -> None:
    """Carry out a run's tuning on this rank; its results are the run's last checkpoint.

    `node_leaves` is that of `StopSignal`.
    Raises: StorageError, BackboneError; TuningError when the frozen weights changed.
    """
    settings = Settings.model_validate(order.settings)
    timeout, threads = settings.run.hang_timeout, settings.cluster.cpus_per_worker
    journal = RunLog(Path(order.run_folder), silent=rank() != 0)
    if hung := hang_reports(hangs_of(order.run_folder)):
        journal.event("stage", name="tuning", text=f"starting again: {hang_sentence(hung, timeout)}")
    with rank_process(order.run_folder, timeout, threads, device) as alive:
        _tune(order, settings, device, journal, StopSignal(Path(order.run_folder), node_leaves), alive)


def _tune(
    order: RankJob,
    settings: Settings,
    device: torch.device,
    journal: RunLog,
    notices: StopSignal,
    alive: Callable[[], None],
) -> None:
    backbone = host_on_rank(settings, order.model_folder, device, journal)
    call_at_every_layer(backbone.hosted, alive)
    sizes = held_bytes(backbone)
    held = ", ".join(f"{size / 2**20:.0f} MiB of {kind}" for kind, size in sorted(sizes.items()))
    before = held_digest(backbone)
    journal.event("stage", name="tuning", text=f"rank 0 of {world_size()} holds {held}")
    journal.memory("backbone")
    tokenizer = AutoTokenizer.from_pretrained(order.model_folder, trust_remote_code=False)
    run = order.tuning_run(settings)
    states = tune(run, backbone, tokenizer, notices)
    if order.incumbents and len(states) == len(run.trials) and all(state.ended for state in states):
        journal.event("stage", name="gate", text=f"{len(order.incumbents)} prompt(s) of the bank measured again")
        prompts = {task: _kept_prompt(order.incumbent(task), digest) for task, digest in order.incumbents.items()}
        measure(run, states, Incumbents(order.incumbents, prompts), backbone, tokenizer)
    journal.memory("tuning")
    if held_digest(backbone) != before:
        shutil.rmtree(Path(order.run_folder) / "checkpoints", ignore_errors=True)  # or a restart would publish them
        raise TuningError("the frozen weights changed during tuning; the run's prompts are not to be trusted")
