"""Set up a rank that trains all weights: threads, device, watchdog, log and the loaded model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from pipeline.backbone.files import find_model
from pipeline.backbone.host import compute_dtype
from pipeline.lab.full_weights.loading import load_trained
from pipeline.lab.full_weights.pieces import TrainedModel, trained_parameters
from pipeline.lab.full_weights.training_log import TrainingLog
from pipeline.reporting.words import millions
from pipeline.settings import OptimizerSettings
from pipeline.tuning.interruption.stop_signal import StopSignal
from pipeline.tuning.interruption.watchdog import (
    call_at_every_layer,
    hang_reports,
    hang_sentence,
    hangs_of,
    rank_process,
)
from pipeline.tuning.machine import peak_bytes
from pipeline.tuning.ranks import rank, sum_over_ranks, world_size


@dataclass(frozen=True)
class TrainingPlace:
    """Where and how a training runs; plain values."""

    run_folder: str
    """A folder that every rank sees. It holds all state to resume from, and the result."""
    name: str
    """Name of what is trained, in the run's events."""
    model: str
    """The model to start from: a folder, a .gguf file or a packaged model's name."""
    description: str
    """A folder with the model's config and tokenizer (`save_config_and_tokenizer`)."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, or `auto`: float32 on a CPU, bfloat16 on a GPU."""
    cpus_per_worker: int = 1
    tokens_per_microbatch: int = 2048
    checkpoint_every: int = 500
    hang_timeout: float = 600.0

    @property
    def folder(self) -> Path:
        return Path(self.run_folder)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"


@dataclass(frozen=True)
class TrainingRank:
    model: TrainedModel
    tokenizer: Any
    log: TrainingLog
    stop_signal: StopSignal


@contextmanager
def training_rank(
    place: TrainingPlace, optimizer: OptimizerSettings, device: torch.device, node_leaves: Callable[[], bool]
) -> Iterator[TrainingRank]:
    """This rank with its part of the model loaded, watched until the block ends. `node_leaves`: see `StopSignal`.

    Raises: BackboneError when weights are damaged or missing.
    """
    log = TrainingLog(place.folder, place.name, silent=rank() != 0)
    if hung := hang_reports(hangs_of(place.folder)):
        log.event("stage", name="tuning", text=f"starting again: {hang_sentence(hung, place.hang_timeout)}")
    with rank_process(place.folder, place.hang_timeout, place.cpus_per_worker, device) as alive:
        log.event("stage", name="backbone", text=f"loading {place.model}, all weights, {world_size()} rank(s)")
        config = AutoConfig.from_pretrained(place.description, trust_remote_code=False)
        dtype = compute_dtype(place.dtype, device)
        model = load_trained(find_model(place.model), config, optimizer, dtype=dtype, device=device)
        call_at_every_layer(model.backbone.hosted, alive)
        count = trained_parameters(model)
        log.event("stage", name="tuning", text=f"{millions(count)} parameters are trained in {dtype}")
        log.memory("backbone")
        tokenizer = AutoTokenizer.from_pretrained(place.description, trust_remote_code=False)
        yield TrainingRank(model, tokenizer, log, StopSignal(place.folder, node_leaves))
        log.memory("tuning")


def max_peak_memory(device: torch.device) -> int:
    """Peak bytes of the rank with the most. Every rank must call this."""
    peaks = torch.zeros(world_size(), dtype=torch.float64, device=device)
    peaks[rank()] = peak_bytes()
    return int(sum_over_ranks(peaks).max())
