"""Answer questions on the ranks, with many prompts in the same batches. Each answer is kept as soon as it is there."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoTokenizer

from pipeline.backbone.host import Backbone
from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.lab.comparison.hard_prompts import instructed_request
from pipeline.lab.comparison.questions import (
    SplitAnswers,
    SplitQuestion,
    all_answers,
    answer_paths,
    load_answers,
    load_prompt,
    save_answers,
    to_split_answers,
)
from pipeline.lab.comparison.study import Study
from pipeline.run.stages import settings_for_ranks
from pipeline.settings import Settings
from pipeline.tuning.evaluate import EvalRequest, answer, eval_request
from pipeline.tuning.hosting import host_on_rank
from pipeline.tuning.interruption.stop_signal import StopSignal
from pipeline.tuning.interruption.watchdog import call_at_every_layer, rank_process
from pipeline.tuning.ranks import rank, sum_over_ranks, world_size
from pipeline.tuning.run_log import RunLog

_AT_ONCE = 8
"""Questions whose rows share batches; when a rank is lost, their answers are lost together."""
PHASE = "answers"


class FrozenModelJob(Protocol):
    """A job whose ranks host the frozen model and ask it."""

    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def run_folder(self) -> str: ...
    @property
    def model_folder(self) -> str: ...


@dataclass(frozen=True)
class FrozenRank:
    """What a rank needs that asks the frozen model."""

    settings: Settings
    backbone: Backbone
    tokenizer: Any
    run_log: RunLog
    stops: Callable[[], bool]
    """Whether all ranks are told to stop; every rank must call it at the same place."""


@contextmanager
def frozen_rank(
    job: FrozenModelJob, phase: str, device: torch.device, node_leaves: Callable[[], bool]
) -> Iterator[FrozenRank]:
    """Host the model of a phase that tunes nothing, and tell the phase's memory at its end. Raises: BackboneError."""
    settings, folder = Settings.model_validate(job.settings), Path(job.run_folder)
    run_log = RunLog(folder, silent=rank() != 0)
    timeout, threads = settings.run.hang_timeout, settings.cluster.cpus_per_worker
    with rank_process(job.run_folder, timeout, threads, device) as alive:
        backbone = host_on_rank(settings, Path(job.model_folder), device, run_log)
        call_at_every_layer(backbone.hosted, alive)
        tokenizer = AutoTokenizer.from_pretrained(job.model_folder, trust_remote_code=False)
        signal = StopSignal(folder, node_leaves)
        yield FrozenRank(settings, backbone, tokenizer, run_log, lambda: signal.next(backbone.device) == "stop")
        run_log.memory(phase)


@dataclass(frozen=True)
class EvalJob:
    """Questions as sent to the ranks; plain values only."""

    settings: dict[str, Any]
    corpora: dict[str, dict[str, Any]]
    run_folder: str
    model_folder: str
    questions: tuple[SplitQuestion, ...]
    digests: tuple[str, ...]
    """By question, the name of the file with its answers."""

    @property
    def paths(self) -> dict[SplitQuestion, Path]:
        """The file with the answers to each question."""
        return answer_paths(self.run_folder, self.questions, self.digests)

    def carry_out(self, device: torch.device, node_leaves: Callable[[], bool]) -> None:
        """Answer what is missing, on a rank. Raises: StorageError, BackboneError."""
        with frozen_rank(self, PHASE, device, node_leaves) as own:
            _answer_all(self, own)


@dataclass(frozen=True)
class OtherWeights:
    """A model folder to use in place of the frozen model, with the same architecture and tokenizer."""

    path: str
    digest: str
    """Digest of all that decided the weights."""


def answer_on_ranks(
    study: Study, questions: Sequence[SplitQuestion], phase: str = PHASE, weights: OtherWeights | None = None
) -> dict[SplitQuestion, SplitAnswers]:
    """Have the ranks answer the questions that have no answers yet. Raises: PromptBankError."""
    job = _eval_job(study, questions, phase, weights)
    with study.phase(phase) as (_, log):
        log.write("begin", tasks=len(job.questions))
        answered = all_answers(job.paths)
        if answered is None:
            study.run_on_ranks(job, log)
            answered = all_answers(job.paths)
        if answered is None:
            raise study.told_to_stop(phase)
        log.write("end", version=None, exit=0)
    return answered


def all_answered(
    study: Study, questions: Sequence[SplitQuestion], phase: str = PHASE, weights: OtherWeights | None = None
) -> bool:
    """Whether all questions have answers already, so that `answer_on_ranks` starts no rank."""
    return all_answers(_eval_job(study, questions, phase, weights).paths) is not None


def _eval_job(study: Study, questions: Sequence[SplitQuestion], phase: str, weights: OtherWeights | None) -> EvalJob:
    asked = tuple(dict.fromkeys(questions))
    settings = settings_for_ranks(study.settings)
    model = study.checked.identity.fingerprint if weights is None else weights.digest
    products = study.settings.model.products
    if weights is not None:
        settings["model"] |= {"path": weights.path, "weights": "full"}
    return EvalJob(
        settings=settings,
        corpora={task: corpus.to_dict() for task, corpus in study.corpora.items()},
        run_folder=str(study.folder / phase),
        model_folder=str(study.model_folder),
        questions=asked,
        digests=tuple(question.digest(*study.deciding(question.task), model, products) for question in asked),
    )


def _answer_all(job: EvalJob, own: FrozenRank) -> None:
    settings, backbone, tokenizer = own.settings, own.backbone, own.tokenizer
    corpora = {task: TaskCorpus.from_dict(corpus) for task, corpus in job.corpora.items()}
    paths = job.paths
    missing = _missing(paths, backbone.device)
    own.run_log.event("stage", name=PHASE, text=f"{len(missing)} question(s) to {world_size()} rank(s)")
    for start in range(0, len(missing), _AT_ONCE):
        if own.stops():
            return
        part = missing[start : start + _AT_ONCE]
        requests = [_eval_request(job, settings, corpora, question, backbone, tokenizer) for question in part]
        answers = answer(backbone, tokenizer, requests, settings.cluster.tokens_per_microbatch)
        if rank() == 0:
            for question, request, given in zip(part, requests, answers, strict=True):
                save_answers(paths[question], to_split_answers(request, given))
        own.run_log.event("stage", name=PHASE, text=f"{min(start + _AT_ONCE, len(missing))} of {len(missing)} answered")


def _missing(paths: Mapping[SplitQuestion, Path], device: torch.device) -> list[SplitQuestion]:
    """The questions to which some rank sees no answers; all ranks get the same list, whenever each looks."""
    seen = [load_answers(path) is not None for path in paths.values()]
    counts = sum_over_ranks(torch.tensor(seen, dtype=torch.float32, device=device)).tolist()
    return [question for question, count in zip(paths, counts, strict=True) if count < world_size()]


def _eval_request(
    job: EvalJob,
    settings: Settings,
    corpora: dict[str, TaskCorpus],
    question: SplitQuestion,
    backbone: Backbone,
    tokenizer: Any,
) -> EvalRequest:
    task, corpus = settings.tasks[question.task], corpora[question.task]
    split = open_split(corpus.splits[question.split], question.rows)
    if question.prompt is not None:
        array = load_prompt(Path(job.run_folder), question.prompt)
        return eval_request(task, torch.as_tensor(array, device=backbone.device), split, corpus)
    return instructed_request(task, question.text or "", split, corpus, backbone, tokenizer)
