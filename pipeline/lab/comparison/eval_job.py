"""Questions answered on the ranks, many prompts in the same batches, each kept as soon as it is there."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from pipeline.backbone.host import Backbone
from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.lab.comparison.hard_prompts import behind_text
from pipeline.lab.comparison.questions import (
    Answered,
    Question,
    all_answers,
    answer_paths,
    as_answered,
    kept_prompt,
    load_answers,
    save_answers,
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
"""Questions whose rows share batches, and are lost together where a rank is."""
PHASE = "answers"


@dataclass(frozen=True)
class EvalJob:
    """Questions as sent to the ranks: plain values only."""

    settings: dict[str, Any]
    corpora: dict[str, dict[str, Any]]
    run_folder: str
    model_folder: str
    questions: tuple[Question, ...]
    digests: tuple[str, ...]
    """By question, the name of its answers' file."""

    @property
    def paths(self) -> dict[Question, Path]:
        """Where the answers to each question are kept."""
        return answer_paths(self.run_folder, self.questions, self.digests)

    def carry_out(self, device: torch.device, node_leaves: Callable[[], bool]) -> None:
        """Raises: StorageError, BackboneError."""
        settings = Settings.model_validate(self.settings)
        journal = RunLog(Path(self.run_folder), silent=rank() != 0)
        timeout, threads = settings.run.hang_timeout, settings.cluster.cpus_per_worker
        with rank_process(self.run_folder, timeout, threads, device) as alive:
            backbone = host_on_rank(settings, Path(self.model_folder), device, journal)
            call_at_every_layer(backbone.hosted, alive)
            _answer_all(self, settings, backbone, journal, StopSignal(Path(self.run_folder), node_leaves))
            journal.memory(PHASE)


@dataclass(frozen=True)
class OtherWeights:
    """A model folder to be asked in place of the frozen model, of the same architecture and tokenizer."""

    path: str
    digest: str
    """Of all that decided the weights."""


def ask(
    study: Study, questions: Sequence[Question], phase: str = PHASE, weights: OtherWeights | None = None
) -> dict[Question, Answered]:
    """Have the ranks answer what was not answered before. Raises: PromptBankError."""
    order = _order(study, questions, phase, weights)
    with study.phase(phase) as (_, log):
        log.write("begin", tasks=len(order.questions))
        answered = all_answers(order.paths)
        if answered is None:
            study.on_ranks(order, log)
            answered = all_answers(order.paths)
        if answered is None:
            raise study.told_to_stop(phase)
        log.write("end", version=None, exit=0)
    return answered


def answered_before(
    study: Study, questions: Sequence[Question], phase: str = PHASE, weights: OtherWeights | None = None
) -> bool:
    """Whether `ask` need not ask."""
    return all_answers(_order(study, questions, phase, weights).paths) is not None


def _order(study: Study, questions: Sequence[Question], phase: str, weights: OtherWeights | None) -> EvalJob:
    asked = tuple(dict.fromkeys(questions))
    settings = settings_for_ranks(study.settings)
    if weights is not None:
        settings["model"] |= {"path": weights.path, "weights": "full"}
    return EvalJob(
        settings=settings,
        corpora={task: corpus.to_dict() for task, corpus in study.corpora.items()},
        run_folder=str(study.folder / phase),
        model_folder=str(study.model_folder),
        questions=asked,
        digests=tuple(question.digest(*_deciding(study, question.task, weights)) for question in asked),
    )


def _deciding(study: Study, task: str, weights: OtherWeights | None) -> tuple[str, ...]:
    """What answers depend on beside the question."""
    model = study.checked.identity.fingerprint if weights is None else weights.digest
    return *study.deciding(task), model, study.settings.model.products


def _answer_all(order: EvalJob, settings: Settings, backbone: Backbone, journal: RunLog, notices: StopSignal) -> None:
    tokenizer = AutoTokenizer.from_pretrained(order.model_folder, trust_remote_code=False)
    corpora = {task: TaskCorpus.from_dict(corpus) for task, corpus in order.corpora.items()}
    paths = order.paths
    missing = _missing(paths, backbone.device)
    journal.event("stage", name=PHASE, text=f"{len(missing)} question(s) to {world_size()} rank(s)")
    for start in range(0, len(missing), _AT_ONCE):
        if notices.next(backbone.device) == "stop":
            return
        part = missing[start : start + _AT_ONCE]
        exams = [_exam(order, settings, corpora, question, backbone, tokenizer) for question in part]
        answers = answer(backbone, tokenizer, exams, settings.cluster.tokens_per_microbatch)
        if rank() == 0:
            for question, exam, given in zip(part, exams, answers, strict=True):
                save_answers(paths[question], as_answered(exam, given))
        journal.event("stage", name=PHASE, text=f"{min(start + _AT_ONCE, len(missing))} of {len(missing)} answered")


def _missing(paths: Mapping[Question, Path], device: torch.device) -> list[Question]:
    """The questions that a rank sees no answers to: the same on all ranks, whenever each looks."""
    seen = [load_answers(path) is not None for path in paths.values()]
    counts = sum_over_ranks(torch.tensor(seen, dtype=torch.float32, device=device)).tolist()
    return [question for question, count in zip(paths, counts, strict=True) if count < world_size()]


def _exam(
    order: EvalJob,
    settings: Settings,
    corpora: dict[str, TaskCorpus],
    question: Question,
    backbone: Backbone,
    tokenizer: Any,
) -> EvalRequest:
    task, corpus = settings.tasks[question.task], corpora[question.task]
    split = open_split(corpus.splits[question.split], question.rows)
    if question.prompt is not None:
        array = kept_prompt(Path(order.run_folder), question.prompt)
        return eval_request(task, torch.as_tensor(array, device=backbone.device), split, corpus)
    ids, split = behind_text(question.text or "", split, tokenizer, backbone.architecture)
    prompt = backbone.embed(torch.as_tensor(ids, dtype=torch.long))  # [P, H]
    return eval_request(task, prompt, split, corpus)
