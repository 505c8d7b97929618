"""Full fine-tuning of a model on one task: the baseline for prompts, called "model tuning" in Lester et al. (2021).

It takes the same rows in the same order as a prompt of that task and seed, uses the same evaluator, and keeps the
weights that are best on dev.

    job = FineTuningJob(place, task="sst2", settings=task.model_dump(mode="json"), corpus=corpus.to_dict(), seed=0)
    launch(job.carry_out, Path(job.run_folder), cluster, run, log)
    # or, in this process: job.carry_out(device, lambda: False)
    result = read_result(job.run_folder)
"""

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from pipeline.corpus.reader import open_split
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.corpus.token_set import TokenSet
from pipeline.errors import DivergedError
from pipeline.lab.full_weights.checkpoint import TrainingProgress, remove_checkpoints
from pipeline.lab.full_weights.model_folder import save_model_folder, stored_bytes
from pipeline.lab.full_weights.pieces import trained_parameters
from pipeline.lab.full_weights.rank_setup import TrainingPlace, TrainingRank, max_peak_memory, training_rank
from pipeline.lab.full_weights.step import Examples
from pipeline.lab.full_weights.training import TrainingPlan, train
from pipeline.sealed_files import DamagedError, file_digest, open_json, sealed_json
from pipeline.settings import TaskSettings
from pipeline.tuning.batches import rows_of_step
from pipeline.tuning.evaluate import Score, eval_request, evaluate
from pipeline.tuning.ranks import rank
from pipeline.tuning.state import Evaluation
from pipeline.tuning.trials import Trial, make_trial
from pipeline.whole_files import remove, write_atomically

RESULT = "result.json"


@dataclass(frozen=True)
class FineTuningResult:
    """The result of a fine-tuning. The metric is the task's own; losses are in nats a target token."""

    task: str
    seed: int
    metric: str
    status: str
    """`tuned`, `stopped early` (no progress), or `no gain` (nothing was better than the start)."""
    before: float
    """The dev metric before training."""
    dev: float
    dev_loss: float
    test: float | None
    """Measured once, with the weights that are best on dev; None without a test split."""
    test_loss: float | None
    best_step: int
    steps: int
    """Steps taken in all."""
    trained_parameters: int
    stored_bytes: int
    """Bytes of the fine-tuned weights for this one task; 0 where nothing was better than the start."""
    seconds: float
    """Time of steps and evaluations, over all starts; without loading."""
    peak_memory_bytes: int
    """Peak memory of the rank that had most."""
    model: str | None
    """The folder of the best weights; None where nothing was better than the start."""
    digest: str
    """Digest of the job that it is the result of."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of the model's folder; earlier versions wrote none."""

    @property
    def is_whole(self) -> bool:
        """Whether the best weights are where they were stored, and unchanged; True if none were stored."""
        folder = Path(self.model) if self.model is not None else None
        try:
            return folder is None or (
                folder.exists() and all(file_digest(folder / name) == digest for name, digest in self.files.items())
            )
        except OSError:
            return False


@dataclass(frozen=True)
class Diverged:
    """A fine-tuning whose loss became infinite or NaN, as it would again."""

    reason: str
    digest: str
    """Digest of the job that it is the result of."""


@dataclass(frozen=True)
class FineTuningJob:
    """A fine-tuning as sent to its ranks; plain values only. Its result is `result.json` in the run's folder."""

    place: TrainingPlace
    task: str
    settings: dict[str, Any]
    """`TaskSettings` as JSON: its optimizer, batch_size, max_steps, eval_every, patience, eval_rows, metric."""
    corpus: dict[str, Any]
    """`TaskCorpus.to_dict()`."""
    seed: int
    fingerprint: str = ""
    """Fingerprint of the model to start from."""

    @property
    def run_folder(self) -> str:
        return self.place.run_folder

    @property
    def digest(self) -> str:
        """Digest of all that decides the weights."""
        parts = [self.trial().digest, self.place.model, self.place.dtype]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def trial(self) -> Trial:
        """The prompt trial that has the same rows as this training."""
        settings = TaskSettings.model_validate(self.settings)
        return make_trial(self.task, settings, self.seed, self.corpus["digest"], self.fingerprint)

    def carry_out(self, device: torch.device, node_leaves: Callable[[], bool]) -> None:
        """Train on this rank; returns early if told to stop. Raises: StorageError, BackboneError, TuningError."""
        done = read_result(self.run_folder)
        if done is not None and done.digest == self.digest:
            return
        with training_rank(self.place, self.trial().settings.optimizer, device, node_leaves) as here:
            _fine_tune(self, here, device)


def read_result(run_folder: str | Path) -> FineTuningResult | Diverged | None:
    """The result of the fine-tuning in this folder; None while it has not ended, or where the file is damaged."""
    names = [known.name for kind in (FineTuningResult, Diverged) for known in fields(kind)]
    try:
        plain = open_json((Path(run_folder) / RESULT).read_bytes(), names)
        return Diverged(**plain) if "reason" in plain else FineTuningResult(**plain)
    except (FileNotFoundError, DamagedError, TypeError):
        return None


def _write_result(run_folder: str, result: FineTuningResult | Diverged) -> None:
    write_atomically(Path(run_folder) / RESULT, sealed_json(asdict(result)))


@dataclass
class _Run:
    job: FineTuningJob
    here: TrainingRank
    trial: Trial = field(init=False)
    corpus: TaskCorpus = field(init=False)
    train: TokenSet = field(init=False)

    def __post_init__(self) -> None:
        self.trial, self.corpus = self.job.trial(), TaskCorpus.from_dict(self.job.corpus)
        self.train = open_split(self.corpus.splits["train"])

    def examples(self, step: int) -> Examples:
        rows = [int(row) for row in rows_of_step(self.trial, self.train, step)]
        return Examples([self.train.input_ids(row) for row in rows], [self.train.target_ids(row) for row in rows])

    def measure(self, split: str) -> Score:
        settings, model = self.trial.settings, self.here.model
        rows = open_split(self.corpus.splits[split], settings.eval_rows)
        request = eval_request(settings, model.backbone.no_prompt(), rows, self.corpus)
        (score,) = evaluate(model.backbone, self.here.tokenizer, [request], self.job.place.tokens_per_microbatch)
        return score

    def evaluate_if_due(self, progress: TrainingProgress) -> bool:
        """Measure dev if it is due, keep the best weights, and return whether to go on."""
        settings, history = self.trial.settings, [Evaluation(*past) for past in progress.notes.get("history", [])]
        due = progress.step % settings.eval_every == 0 or progress.step >= settings.max_steps
        if not due or (history and history[-1].step == progress.step):
            return True
        score = self.measure("dev")
        history.append(Evaluation(progress.step, score.value, score.loss))
        best = progress.notes.get("best_at", 0)
        gain = history[-1].better(settings.metric, history[best]) and math.isfinite(score.loss)
        if gain or len(history) == 1:
            best, model = len(history) - 1, self.here.model
            dtype = model.backbone.dtype
            progress.best = [p.values.detach()[: len(p)].to(dtype, copy=True) for p in model.pieces]
        progress.notes = {"history": [[e.step, e.value, e.loss] for e in history], "best_at": best}
        self.here.log.evaluated(progress.step, settings.metric, score.value, score.loss)
        self.here.log.paused()
        stale = len(history) - 1 - best
        return settings.patience is None or stale < settings.patience


def _fine_tune(job: FineTuningJob, here: TrainingRank, device: torch.device) -> None:
    run = _Run(job, here)
    settings = run.trial.settings
    plan = TrainingPlan(
        digest=job.digest,
        checkpoints=job.place.checkpoints,
        examples=run.examples,
        steps=settings.max_steps,
        optimizer=settings.optimizer,
        checkpoint_every=job.place.checkpoint_every,
        token_budget=job.place.tokens_per_microbatch,
    )
    try:
        progress = train(here.model, plan, here.log, run.evaluate_if_due, here.stop_signal)
    except DivergedError as error:
        if rank() == 0:
            _write_result(job.run_folder, Diverged(str(error), job.digest))
        here.log.finished("failed", str(error))
        remove_checkpoints(job.place.checkpoints)
        return
    if progress is None:
        return
    peak = max_peak_memory(device)
    assert progress.best is not None
    for piece, best in zip(here.model.pieces, progress.best, strict=True):
        piece.values.data[: len(piece)] = best
    here.model.take_up()
    test = run.measure("test") if "test" in run.corpus.splits else None
    result = _result(run, progress, test, peak)
    if rank() == 0:
        _write_result(job.run_folder, result)
    here.log.finished(result.status)
    remove_checkpoints(job.place.checkpoints)


def _result(run: _Run, progress: TrainingProgress, test: Score | None, peak: int) -> FineTuningResult:
    job, settings, model = run.job, run.trial.settings, run.here.model
    history = [Evaluation(*past) for past in progress.notes["history"]]
    best = history[progress.notes["best_at"]]
    parameters = trained_parameters(model)
    files: dict[str, str] = {}
    folder, stored = None, 0
    if best.step:
        folder = Path(job.run_folder) / "tuned"
        if rank() == 0:
            remove(folder)  # from a start that was killed right here, or from other settings
        save_model_folder(model, run.here.tokenizer, folder)
        stored = stored_bytes(folder)
        if rank() == 0:  # which writes the result
            files = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.is_file()}
    early = "tuned" if progress.step >= settings.max_steps else "stopped early"
    return FineTuningResult(
        task=job.task,
        seed=job.seed,
        metric=settings.metric,
        status=early if best.step else "no gain",
        before=history[0].value,
        dev=best.value,
        dev_loss=best.loss,
        test=None if test is None else test.value,
        test_loss=None if test is None else test.loss,
        best_step=best.step,
        steps=progress.step,
        trained_parameters=parameters,
        stored_bytes=stored,
        seconds=progress.seconds,
        peak_memory_bytes=peak,
        model=None if folder is None else str(folder),
        digest=job.digest,
        files=files,
    )
