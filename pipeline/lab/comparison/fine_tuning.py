"""Full fine-tuning in a comparison: all ranks together train all weights, one (task, rate, seed) after the other.

A tuned model is kept until it has answered. It answers without a prompt, in place of the frozen model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.backbone.files import absolute_if_local
from pipeline.errors import TuningError
from pipeline.lab.comparison.candidates import Candidate, Cost, MeasuredCandidate
from pipeline.lab.comparison.derived_settings import training_grid, training_settings
from pipeline.lab.comparison.eval_job import OtherWeights, all_answered, answer_on_ranks
from pipeline.lab.comparison.questions import SplitAnswers, SplitQuestion
from pipeline.lab.comparison.study import Study, without_test_splits
from pipeline.lab.full_weights.fine_tuning import RESULT, Diverged, FineTuningJob, FineTuningResult, read_result
from pipeline.lab.full_weights.rank_setup import TrainingPlace
from pipeline.settings import FineTuningSettings
from pipeline.whole_files import remove

PHASE = "fine_tuning"


@dataclass(frozen=True)
class _Training:
    candidate: Candidate
    rate: float
    seed: int

    @property
    def phase(self) -> str:
        return f"{PHASE}/{self.candidate.name}"


def fine_tune(study: Study, settings: FineTuningSettings) -> list[MeasuredCandidate]:
    """Every task's tuned models with their dev metric. Raises: PromptBankError."""
    return [_measured(study, job, _trained(study, settings, job)) for job in _jobs(study, settings)]


def answers_of_models(
    study: Study, settings: FineTuningSettings, questions: Mapping[str, tuple[SplitQuestion, ...]]
) -> dict[tuple[str, SplitQuestion], SplitAnswers]:
    """Answers of tuned models, by candidate and question. Models are removed afterwards, unless they are to be kept.

    A model that was removed or damaged is trained again when a new question needs it. Raises: PromptBankError.
    """
    found: dict[tuple[str, SplitQuestion], SplitAnswers] = {}
    for job in _jobs(study, settings):
        name = job.candidate.name
        if questions.get(name):
            answered = _answers(study, settings, job, questions[name])
            found |= {(name, question): given for question, given in answered.items()}
    return found


def _answers(
    study: Study, settings: FineTuningSettings, job: _Training, questions: tuple[SplitQuestion, ...]
) -> dict[SplitQuestion, SplitAnswers]:
    phase = f"{job.phase}/answers"
    result = _trained(study, settings, job)
    weights = _weights(study, result)
    gone = isinstance(result, FineTuningResult) and not result.is_whole
    if gone and (settings.keep_models or not all_answered(study, questions, phase, weights)):
        remove(study.folder / job.phase / RESULT)
        weights = _weights(study, _trained(study, settings, job))
    answered = answer_on_ranks(study, questions, phase, weights)
    if not settings.keep_models:
        remove(study.folder / job.phase / "tuned")
    return answered


def _weights(study: Study, result: FineTuningResult | Diverged) -> OtherWeights:
    if isinstance(result, Diverged):
        raise TuningError(f"a training that succeeded before failed when it was repeated: {result.reason}")
    # Where no step was better than the start, the untrained model is the best one.
    return OtherWeights(result.model or absolute_if_local(study.settings.model.path), result.digest)


def _jobs(study: Study, settings: FineTuningSettings) -> list[_Training]:
    jobs = []
    for task, rate, seed in training_grid(settings, list(study.corpora), study.settings.compare.seeds):
        name = f"fine-tuned.{task}.lr-{rate:g}.seed-{seed}"
        jobs.append(_Training(Candidate(name, "fine-tuning", task, {"lr": rate}, seed), rate, seed))
    return jobs


def _rank_job(study: Study, settings: FineTuningSettings, job: _Training) -> FineTuningJob:
    run = study.settings
    task = job.candidate.task
    place = TrainingPlace(
        run_folder=str(study.folder / job.phase),
        name=job.candidate.name,
        model=absolute_if_local(run.model.path),
        description=str(study.model_folder),
        dtype=run.model.dtype,
        cpus_per_worker=run.cluster.cpus_per_worker,
        tokens_per_microbatch=run.cluster.tokens_per_microbatch,
        checkpoint_every=settings.checkpoint_every,
        hang_timeout=run.run.hang_timeout,
    )
    return FineTuningJob(
        place,
        task=task,
        settings=training_settings(run.tasks[task], settings, job.rate, settings.optimizer).model_dump(mode="json"),
        corpus=without_test_splits(study.corpora)[task].to_dict(),
        seed=job.seed,
        fingerprint=study.checked.identity.fingerprint,
    )


def _result(study: Study, settings: FineTuningSettings, job: _Training) -> FineTuningResult | Diverged | None:
    result = read_result(study.folder / job.phase)
    return result if result is not None and result.digest == _rank_job(study, settings, job).digest else None


def _trained(study: Study, settings: FineTuningSettings, job: _Training) -> FineTuningResult | Diverged:
    """The result of training, which is run unless it is there. Raises: PromptBankError."""
    result = _result(study, settings, job)
    if result is not None:
        return result
    with study.phase(job.phase) as (_, log):
        rank_job, name = _rank_job(study, settings, job), job.candidate.name
        log.write("begin", tasks=1)
        steps = rank_job.trial().settings.max_steps
        log.write("launch", trials=[{"trial": name, "task": rank_job.task, "max_steps": steps}])
        study.run_on_ranks(rank_job, log)
        result = _result(study, settings, job)
        log.write("end", version=None, exit=0)
    if result is None:
        raise study.told_to_stop(job.phase)
    return result


def _measured(study: Study, job: _Training, result: FineTuningResult | Diverged) -> MeasuredCandidate:
    if isinstance(result, Diverged):
        failed = f"{result.reason}; lower compare.fine_tuning.lr"
        return MeasuredCandidate(job.candidate, float("nan"), float("nan"), failed=failed)
    cost = Cost(
        trained_parameters=result.trained_parameters,
        stored_bytes=result.stored_bytes,
        rank_seconds=result.seconds * study.settings.cluster.num_workers,
        peak_bytes=result.peak_memory_bytes,
    )
    return MeasuredCandidate(job.candidate, result.dev, result.dev_loss, cost)
