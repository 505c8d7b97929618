"""An adaptation as sent to its ranks, and its result: a model folder for each step that is to be kept."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from pipeline.corpus.plain_text import TextCorpus, read_text
from pipeline.errors import DivergedError, SettingsError
from pipeline.lab.adapt.batches import TextBatches
from pipeline.lab.adapt.start import markers_of
from pipeline.lab.full_weights.checkpoint import TrainingProgress, save_progress
from pipeline.lab.full_weights.model_folder import save_model_folder
from pipeline.lab.full_weights.pieces import trained_parameters
from pipeline.lab.full_weights.rank_setup import TrainingPlace, TrainingRank, max_peak_memory, training_rank
from pipeline.lab.full_weights.training import TrainingPlan, train
from pipeline.sealed_files import DamagedError, open_json, sealed_json
from pipeline.settings import AdaptationSettings
from pipeline.tuning.ranks import rank
from pipeline.whole_files import write_atomically

RESULT = "adaptation.json"


@dataclass(frozen=True)
class AdaptationResult:
    """The result of an adaptation."""

    digest: str
    """Digest of all that decides the weights. The number of steps is part of it only if the schedule depends on it."""
    steps: int
    models: dict[str, str]
    """By step that was kept, its model folder."""
    trained_parameters: int
    seconds: float
    """Time of steps and of writing models, over all starts; without loading."""
    peak_memory_bytes: int
    """Peak memory of the rank that had most."""


@dataclass(frozen=True)
class AdaptationJob:
    """An adaptation as sent to its ranks; plain values only."""

    place: TrainingPlace
    settings: dict[str, Any]
    """`AdaptationSettings` as JSON."""
    corpus: dict[str, Any]
    """`TextCorpus` as a mapping."""
    fingerprint: str
    """Fingerprint of the model to start from."""

    @property
    def run_folder(self) -> str:
        return self.place.run_folder

    @property
    def digest(self) -> str:
        own = AdaptationSettings.model_validate(self.settings)
        length = None if own.optimizer.schedule == "constant" else own.steps
        parts = [
            own.model_dump(mode="json", include={"objective", "optimizer", "tokens", "batch_size"}),
            own.run.seed, own.model.dtype, length, self.corpus["digest"], self.fingerprint,
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def model_at(self, step: int) -> Path:
        """The model folder of a step that is kept."""
        return self.place.folder / "models" / f"step-{step:06d}"

    def carry_out(self, device: torch.device, node_leaves: Callable[[], bool]) -> None:
        """Train on this rank; returns early if told to stop. Raises: StorageError, BackboneError, TuningError."""
        settings = AdaptationSettings.model_validate(self.settings)
        with training_rank(self.place, settings.optimizer, device, node_leaves) as here:
            _adapt(self, settings, here, device)


def read_adaptation(job: AdaptationJob) -> AdaptationResult | None:
    """The result of this job; None while it has not ended, or where the file is damaged."""
    try:
        data = (job.place.folder / RESULT).read_bytes()
        adapted = AdaptationResult(**open_json(data, [known.name for known in fields(AdaptationResult)]))
    except (FileNotFoundError, DamagedError, TypeError):
        return None
    wanted = AdaptationSettings.model_validate(job.settings).kept_steps
    if adapted.digest != job.digest or not {str(step) for step in wanted} <= set(adapted.models):
        return None
    return adapted


def _adapt(job: AdaptationJob, settings: AdaptationSettings, here: TrainingRank, device: torch.device) -> None:
    markers = markers_of(here.tokenizer)
    batches = TextBatches(
        read_text(TextCorpus(**job.corpus), markers.eos),
        settings.tokens,
        settings.batch_size,
        settings.objective,
        markers,
        settings.run.seed,
    )
    plan = TrainingPlan(
        digest=job.digest,
        checkpoints=job.place.checkpoints,
        examples=batches.examples,
        steps=settings.steps,
        optimizer=settings.optimizer,
        checkpoint_every=job.place.checkpoint_every,
        token_budget=job.place.tokens_per_microbatch,
    )

    def keep_if_wanted(progress: TrainingProgress) -> bool:
        gone = [step for step in settings.kept_steps if step < progress.step and not job.model_at(step).exists()]
        if gone:
            raise SettingsError(
                f"save_at: the run is at step {progress.step}, beyond step {gone[0]}; start another run.name to keep it"
            )
        if progress.step in settings.kept_steps:
            save_model_folder(here.model, here.tokenizer, job.model_at(progress.step))
            here.log.event("stage", name="tuning", text=f"kept {job.model_at(progress.step)}")
            here.log.paused()
        return True

    try:
        progress = train(here.model, plan, here.log, keep_if_wanted, here.stop_signal)
    except DivergedError as error:
        raise DivergedError(
            f"{error}; lower optimizer.lr or set optimizer.clip_norm, and start again under another run.name"
        ) from error
    if progress is None:
        return
    # The last checkpoint is kept, so that a run with more steps can go on from here.
    save_progress(plan.checkpoints, plan.digest, here.model, progress)
    kept = sorted(int(path.name.removeprefix("step-")) for path in (job.place.folder / "models").glob("step-*"))
    adapted = AdaptationResult(
        digest=job.digest,
        steps=progress.step,
        models={str(step): str(job.model_at(step)) for step in kept},
        trained_parameters=trained_parameters(here.model),
        seconds=progress.seconds,
        peak_memory_bytes=max_peak_memory(device),
    )
    if rank() == 0:
        write_atomically(job.place.folder / RESULT, sealed_json(asdict(adapted)))
    here.log.finished("tuned")
