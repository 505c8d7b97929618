"""LoRA on one rank: it trains the adapters of its jobs one after the other, or has them answer.

A job that was interrupted starts from its beginning.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from pipeline.backbone.files import find_model
from pipeline.backbone.host import Backbone, compute_dtype, host_backbone
from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.lab.comparison.adapter import add_adapter, load_adapter_weights, train_adapter
from pipeline.lab.comparison.derived_settings import training_settings
from pipeline.lab.comparison.questions import SplitQuestion, answer_paths, load_answers, save_answers, to_split_answers
from pipeline.lab.comparison.tensor_files import load_adapter, save_adapter
from pipeline.settings import LoraSettings, Settings
from pipeline.tuning.evaluate import answer, eval_request
from pipeline.tuning.interruption.stop_signal import told_to_stop
from pipeline.tuning.interruption.watchdog import call_at_every_layer, rank_process
from pipeline.tuning.ranks import alone, rank, world_size
from pipeline.tuning.run_log import RunLog
from pipeline.tuning.trials import Trial, make_trial

PHASE = "lora"


@dataclass(frozen=True)
class LoraJob:
    """An adapter to be trained, and the questions for it afterwards."""

    name: str
    task: str
    rate: float
    seed: int
    file: str
    """Name of the adapter's file: the digest of all that decides its weights."""
    questions: tuple[SplitQuestion, ...] = ()
    digests: tuple[str, ...] = ()
    """By question, the name of the file with its answers."""


@dataclass(frozen=True)
class LoraRankJob:
    """Jobs as sent to the ranks; plain values only."""

    settings: dict[str, Any]
    corpora: dict[str, dict[str, Any]]
    fingerprint: str
    run_folder: str
    model_folder: str
    jobs: tuple[LoraJob, ...]

    def adapter(self, job: LoraJob) -> Path:
        return Path(self.run_folder) / "adapters" / f"{job.file}.safetensors"

    def answers(self, job: LoraJob) -> dict[SplitQuestion, Path]:
        """The file with the answers to each of a job's questions."""
        return answer_paths(self.run_folder, job.questions, job.digests)

    def carry_out(self, device: torch.device, node_leaves: Callable[[], bool]) -> None:
        """Train or ask this rank's adapters. Raises: StorageError, BackboneError, SettingsError."""
        settings = Settings.model_validate(self.settings)
        timeout, threads = settings.run.hang_timeout, settings.cluster.cpus_per_worker
        with rank_process(self.run_folder, timeout, threads, device) as alive:
            _run_jobs(self, settings, device, alive)


def lora_trial(
    settings: Settings, lora: LoraSettings, task: str, rate: float, seed: int, corpus: str, fingerprint: str
) -> Trial:
    # Named as the task, so that its batches have the rows that the task's prompts have.
    return make_trial(task, training_settings(settings.tasks[task], lora, rate), seed, corpus, fingerprint)


def _run_jobs(rank_job: LoraRankJob, settings: Settings, device: torch.device, alive: Callable[[], None]) -> None:
    lora = settings.compare.lora
    assert lora is not None
    folder = Path(rank_job.run_folder)
    run_log, mine = RunLog(folder, silent=rank() != 0), rank_job.jobs[rank() :: world_size()]
    config = AutoConfig.from_pretrained(rank_job.model_folder, trust_remote_code=False)
    dtype = compute_dtype(settings.model.dtype, device)
    files = find_model(settings.model.path)
    backbone = host_backbone(files, config, int8=False, dtype=dtype, device=device, sharded=False)
    call_at_every_layer(backbone.hosted, alive)
    tokenizer = AutoTokenizer.from_pretrained(rank_job.model_folder, trust_remote_code=False)
    parameters = add_adapter(backbone.hosted.model, lora)  # type: ignore[arg-type]
    corpora = {task: TaskCorpus.from_dict(corpus) for task, corpus in rank_job.corpora.items()}
    for place, job in enumerate(mine):
        run_log.event("stage", name=PHASE, text=f"{job.name} ({place + 1} of this rank's {len(mine)})")
        kept = load_adapter(rank_job.adapter(job))
        if kept is None:
            corpus = corpora[job.task]
            trial = lora_trial(settings, lora, job.task, job.rate, job.seed, corpus.digest, rank_job.fingerprint)
            budget = settings.cluster.tokens_per_microbatch
            stop = lambda: told_to_stop(folder)  # noqa: E731
            trained = train_adapter(backbone, tokenizer, trial, corpus, parameters, budget, stop)
            if trained is None:
                return
            save_adapter(rank_job.adapter(job), trained)
        elif job.questions:
            load_adapter_weights(backbone.hosted.model, kept.weights)  # type: ignore[arg-type]
            _answer(rank_job, settings, job, backbone, tokenizer, corpora)
        if told_to_stop(folder):
            return
    run_log.memory(PHASE)


def _answer(
    rank_job: LoraRankJob,
    settings: Settings,
    job: LoraJob,
    backbone: Backbone,
    tokenizer: Any,
    corpora: dict[str, TaskCorpus],
) -> None:
    paths = rank_job.answers(job)
    asked = [question for question, path in paths.items() if load_answers(path) is None]
    requests = []
    for question in asked:
        corpus = corpora[question.task]
        split = open_split(corpus.splits[question.split], question.rows)
        requests.append(eval_request(settings.tasks[question.task], backbone.no_prompt(), split, corpus))
    with alone():
        answers = answer(backbone, tokenizer, requests, settings.cluster.tokens_per_microbatch) if requests else []
    for question, request, given in zip(asked, requests, answers, strict=True):
        save_answers(paths[question], to_split_answers(request, given))
