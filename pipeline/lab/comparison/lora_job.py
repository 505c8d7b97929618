"""LoRA on one rank: its share of the jobs, one after the other, each trained and kept, or asked.

A job that was cut short begins anew.
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
from pipeline.lab.comparison.adapter import add_adapter, no_prompt, put_weights, train_adapter
from pipeline.lab.comparison.adapter_files import load_adapter, save_adapter
from pipeline.lab.comparison.questions import Question, answer_paths, as_answered, load_answers, save_answers
from pipeline.lab.comparison.training import trained_task
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
    """An adapter to be trained, and the questions to it once it is."""

    name: str
    task: str
    rate: float
    seed: int
    file: str
    """Name of the adapter's file: the digest of all that decides it."""
    questions: tuple[Question, ...] = ()
    digests: tuple[str, ...] = ()
    """By question, the name of its answers' file."""


@dataclass(frozen=True)
class LoraRankJob:
    """Jobs as sent to the ranks: plain values only."""

    settings: dict[str, Any]
    corpora: dict[str, dict[str, Any]]
    fingerprint: str
    run_folder: str
    model_folder: str
    jobs: tuple[LoraJob, ...]

    def adapter(self, job: LoraJob) -> Path:
        return Path(self.run_folder) / "adapters" / f"{job.file}.safetensors"

    def answers(self, job: LoraJob) -> dict[Question, Path]:
        """Where the answers to each of a job's questions are kept."""
        return answer_paths(self.run_folder, job.questions, job.digests)

    def carry_out(self, device: torch.device, node_leaves: Callable[[], bool]) -> None:
        """Raises: StorageError, BackboneError, SettingsError."""
        settings = Settings.model_validate(self.settings)
        timeout, threads = settings.run.hang_timeout, settings.cluster.cpus_per_worker
        with rank_process(self.run_folder, timeout, threads, device) as alive:
            _work(self, settings, device, alive)


def lora_trial(
    settings: Settings, lora: LoraSettings, task: str, rate: float, seed: int, corpus: str, fingerprint: str
) -> Trial:
    # Of the task's name, so that it takes the rows that the task's prompts take.
    return make_trial(task, trained_task(settings.tasks[task], lora, rate), seed, corpus, fingerprint)


def _work(order: LoraRankJob, settings: Settings, device: torch.device, alive: Callable[[], None]) -> None:
    lora = settings.compare.lora
    assert lora is not None
    folder = Path(order.run_folder)
    journal, mine = RunLog(folder, silent=rank() != 0), order.jobs[rank() :: world_size()]
    config = AutoConfig.from_pretrained(order.model_folder, trust_remote_code=False)
    dtype = compute_dtype(settings.model.dtype, device)
    files = find_model(settings.model.path)
    backbone = host_backbone(files, config, int8=False, dtype=dtype, device=device, sharded=False)
    call_at_every_layer(backbone.hosted, alive)
    tokenizer = AutoTokenizer.from_pretrained(order.model_folder, trust_remote_code=False)
    parameters = add_adapter(backbone.hosted.model, lora)  # type: ignore[arg-type]
    corpora = {task: TaskCorpus.from_dict(corpus) for task, corpus in order.corpora.items()}
    for place, job in enumerate(mine):
        journal.event("stage", name=PHASE, text=f"{job.name} ({place + 1} of this rank's {len(mine)})")
        kept = load_adapter(order.adapter(job))
        if kept is None:
            corpus = corpora[job.task]
            trial = lora_trial(settings, lora, job.task, job.rate, job.seed, corpus.digest, order.fingerprint)
            budget = settings.cluster.tokens_per_microbatch
            stop = lambda: told_to_stop(folder)  # noqa: E731
            trained = train_adapter(backbone, tokenizer, trial, corpus, parameters, budget, stop)
            if trained is None:
                return
            save_adapter(order.adapter(job), trained)
        elif job.questions:
            put_weights(backbone.hosted.model, kept.weights)  # type: ignore[arg-type]
            _answer(order, settings, job, backbone, tokenizer, corpora)
        if told_to_stop(folder):
            return
    journal.memory(PHASE)


def _answer(
    order: LoraRankJob,
    settings: Settings,
    job: LoraJob,
    backbone: Backbone,
    tokenizer: Any,
    corpora: dict[str, TaskCorpus],
) -> None:
    paths = order.answers(job)
    asked = [question for question, path in paths.items() if load_answers(path) is None]
    exams = []
    for question in asked:
        corpus = corpora[question.task]
        split = open_split(corpus.splits[question.split], question.rows)
        exams.append(eval_request(settings.tasks[question.task], no_prompt(backbone), split, corpus))
    with alone():
        answers = answer(backbone, tokenizer, exams, settings.cluster.tokens_per_microbatch) if exams else []
    for question, exam, given in zip(asked, exams, answers, strict=True):
        save_answers(paths[question], as_answered(exam, given))
