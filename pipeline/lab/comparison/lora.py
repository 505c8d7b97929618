"""LoRA in a comparison: every (task, rate, seed) is a job for one rank, and jobs are dealt to the ranks in turn.

Test rows are answered in a second launch, when all adapters are there and every choice is made.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.lab.comparison.candidates import Candidate, Cost, MeasuredCandidate
from pipeline.lab.comparison.derived_settings import training_grid
from pipeline.lab.comparison.lora_job import PHASE, LoraJob, LoraRankJob, lora_trial
from pipeline.lab.comparison.questions import SplitAnswers, SplitQuestion, all_answers, load_answers
from pipeline.lab.comparison.study import Study, without_test_splits
from pipeline.lab.comparison.tensor_files import KeptAdapter, load_adapter
from pipeline.run.stages import settings_for_ranks
from pipeline.settings import LoraSettings


def train_adapters(study: Study, lora: LoraSettings) -> list[MeasuredCandidate]:
    """Every task's adapters with their dev metric. Raises: PromptBankError."""
    corpora = without_test_splits(study.corpora)
    with study.phase(PHASE) as (folder, log):
        jobs = tuple(_jobs(study, lora, corpora))
        log.write("begin", tasks=len(corpora))
        rank_job = _rank_job(study, corpora, folder, jobs)
        missing = [job for job in jobs if load_adapter(rank_job.adapter(job)) is None]
        if missing:
            log.write("stage", name=PHASE, text=f"{len(missing)} adapters to be trained")
            study.run_on_ranks(_rank_job(study, corpora, folder, missing), log)
        found = [load_adapter(rank_job.adapter(job)) for job in jobs]
        log.write("end", version=None, exit=0)
    if any(kept is None for kept in found):
        raise study.told_to_stop(PHASE)
    return [_measured(job, kept, lora) for job, kept in zip(jobs, found, strict=True) if kept is not None]


def answers_of_adapters(
    study: Study, lora: LoraSettings, questions: dict[str, tuple[SplitQuestion, ...]]
) -> dict[tuple[str, SplitQuestion], SplitAnswers]:
    """Answers of trained adapters, by candidate and question. Raises: PromptBankError."""
    with study.phase(PHASE) as (folder, log):
        log.write("begin", tasks=len(study.corpora))
        trained = _jobs(study, lora, without_test_splits(study.corpora))
        jobs = []
        for job in trained:
            own = questions.get(job.name, ())
            if own:
                digests = tuple(question.digest(*study.deciding(question.task), job.file) for question in own)
                jobs.append(replace(job, questions=own, digests=digests))
        rank_job = _rank_job(study, dict(study.corpora), folder, jobs)
        if any(load_answers(path) is None for job in jobs for path in rank_job.answers(job).values()):
            study.run_on_ranks(rank_job, log)
        answered: dict[tuple[str, SplitQuestion], SplitAnswers] = {}
        for job in jobs:
            found = all_answers(rank_job.answers(job))
            if found is None:
                raise study.told_to_stop(PHASE)
            answered |= {(job.name, question): given for question, given in found.items()}
        log.write("end", version=None, exit=0)
    return answered


def _jobs(study: Study, lora: LoraSettings, corpora: dict[str, TaskCorpus]) -> list[LoraJob]:
    fingerprint = study.checked.identity.fingerprint
    jobs = []
    for task, rate, seed in training_grid(lora, list(corpora), study.settings.compare.seeds):
        own = lora_trial(study.settings, lora, task, rate, seed, corpora[task].digest, fingerprint)
        parts = json.dumps([own.digest, lora.rank, lora.alpha, lora.targets, study.settings.model.dtype])
        file = hashlib.sha256(parts.encode()).hexdigest()[:32]
        jobs.append(LoraJob(f"lora.{task}.lr-{rate:g}.seed-{seed}", task, rate, seed, file))
    return jobs


def _rank_job(study: Study, corpora: dict[str, TaskCorpus], folder: Path, jobs: Sequence[LoraJob]) -> LoraRankJob:
    return LoraRankJob(
        settings=settings_for_ranks(study.settings),
        corpora={task: corpus.to_dict() for task, corpus in corpora.items()},
        fingerprint=study.checked.identity.fingerprint,
        run_folder=str(folder),
        model_folder=str(study.model_folder),
        jobs=tuple(jobs),
    )


def _measured(job: LoraJob, kept: KeptAdapter, lora: LoraSettings) -> MeasuredCandidate:
    choice: dict[str, Any] = {"rank": lora.rank, "lr": job.rate}
    candidate = Candidate(job.name, "LoRA", job.task, choice, job.seed)
    cost = Cost(
        trained_parameters=sum(weight.numel() for weight in kept.weights.values()),
        stored_bytes=sum(weight.nbytes for weight in kept.weights.values()),
        rank_seconds=kept.seconds,
        peak_bytes=kept.peak_bytes,
    )
    best = kept.history[kept.best_at]
    return MeasuredCandidate(candidate, best.value, best.loss, cost, kept.failed)
