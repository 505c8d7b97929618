"""Benchmark of models that one rank could not hold: each rank's memory in loading and training, and loading's speed.

The bound is int8 bytes / ranks + the largest layer gathered + 1 GiB. It holds for all resident memory of a rank's
process. Where weights are kept in files, their pages do not count, since the system drops them when it needs memory.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.host import held_bytes, start_deepspeed
from pipeline.backbone.loading import build_skeleton, untie_separate_weights
from pipeline.backbone.memory import gathered_together
from pipeline.backbone.weights import open_weights
from pipeline.lab.benchmark.bench import OurOptions, host_model
from pipeline.lab.benchmark.ours import tune_together
from pipeline.lab.benchmark.ranks import run_ranks
from pipeline.lab.benchmark.resident import MemoryWatch, Resident, resident
from pipeline.lab.benchmark.shapes import published_config
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.lab.benchmark.synthetic import write_checkpoint
from pipeline.lab.benchmark.work import WorkOptions, random_work
from pipeline.tuning.machine import device_name

_SLACK = 2**30
_READ_AT_ONCE = 2**23
_ROWS = 64
_TOKEN_BUDGET = 256


@dataclass(frozen=True)
class FitOptions:
    ranks: int = 2
    threads: int = 2
    """Threads of all ranks together."""
    prompts: int = 4
    length: int = 10
    """Length of every prompt."""
    batch_size: int = 1
    """Rows a step of every prompt, of up to 16 random tokens."""
    steps: int = 3
    offload_folder: str | None = None
    """Where weights are kept in files, as by `model.offload: nvme`."""


@dataclass(frozen=True)
class ModelSize:
    """Size of a model in int8."""

    parameters: int
    int8_bytes: int
    layer_bytes: int
    """The most that is gathered at once: the largest transformer layer, or the embedding table."""


@dataclass(frozen=True)
class RankFit:
    """Resident memory of one rank, and its times."""

    before: Resident
    """With libraries imported and nothing loaded."""
    loading: Resident
    held: dict[str, int]
    training: Resident
    plain_seconds: Sequence[float]
    """Seconds to read its share of the same files without keeping it, before and after loading."""
    load_seconds: float
    step_seconds: Sequence[float]
    losses: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Fit:
    shape: str
    device: str
    options: FitOptions
    size: ModelSize
    checkpoint_bytes: int
    cold: bool
    """Whether files were dropped from the page cache before each reading."""
    ranks: Sequence[RankFit]

    @property
    def bound(self) -> int:
        return self.size.int8_bytes // self.options.ranks + self.size.layer_bytes + _SLACK

    @property
    def peaks(self) -> tuple[int, int]:
        """Largest peaks of any rank, in loading and in training. Pages of weights in files do not count."""
        kind = "total" if self.options.offload_folder is None else "own"
        loading = max(getattr(rank.loading, kind) for rank in self.ranks)
        return loading, max(getattr(rank.training, kind) for rank in self.ranks)

    @property
    def holds(self) -> bool:
        return max(self.peaks) <= self.bound

    @property
    def load_rate(self) -> float:
        """Bytes of the checkpoint a second, by the slowest rank."""
        return self.checkpoint_bytes / max(rank.load_seconds for rank in self.ranks)

    @property
    def plain_rates(self) -> tuple[float, ...]:
        return tuple(
            self.checkpoint_bytes / max(seconds)
            for seconds in zip(*(rank.plain_seconds for rank in self.ranks), strict=True)
        )

    @property
    def ranks_agree(self) -> bool:
        return all(rank.losses == self.ranks[0].losses for rank in self.ranks)


def measure_fit(shape: str, layers: int | None, folder: Path, options: FitOptions, keep: bool) -> Fit:
    """Write the checkpoint if it is not there, load it in int8 over the ranks, and train random prompts some steps.

    The folder is deleted afterwards, unless it was there before or is to be kept.
    Raises: BackboneError, StorageError.
    """
    name = Path(shape).stem
    target = folder / (name if layers is None else f"{name}-{layers}-layers")
    made = not (target / "config.json").exists()
    try:
        if made:
            write_checkpoint(published_config(shape, layers), target)
        files = sorted(target.glob("*.safetensors"))
        cold = _drop_from_cache(files)
        ranks = run_ranks(options.ranks, _on_rank, target, options)
        size = sum(file.stat().st_size for file in files)
        return Fit(target.name, device_name(), options, size_of(target), size, cold, ranks)
    finally:
        if made and not keep:
            shutil.rmtree(target, ignore_errors=True)


def save_fits(path: Path, fits: Sequence[Fit]) -> None:
    """Write results as JSON; they replace earlier results of the same shapes."""
    kept = json.loads(path.read_text()) if path.exists() else []
    shapes = {fit.shape for fit in fits}
    derived = ("bound", "peaks", "holds", "load_rate", "plain_rates", "ranks_agree")
    new = [{**asdict(fit), **{key: getattr(fit, key) for key in derived}} for fit in fits]
    write_figures(path, [*(fit for fit in kept if fit["shape"] not in shapes), *new])


def size_of(folder: Path) -> ModelSize:
    """Count a model's int8 bytes as hosted; weights that its checkpoint stores separately are not tied."""
    files = find_model(str(folder))
    model = build_skeleton(read_config(files), int8=True)
    untie_separate_weights(model, open_weights(files, model))
    return ModelSize(
        parameters=sum(p.numel() for p in model.parameters()),
        int8_bytes=_int8_bytes(model.parameters()),
        layer_bytes=max(map(_int8_bytes, gathered_together(model))),
    )


def _int8_bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters if p.dtype == torch.int8)


def _on_rank(folder: Path, options: FitOptions) -> RankFit:
    if options.ranks > 1:
        start_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    weights = sorted(folder.glob("*.safetensors"))
    before = resident()
    plain = [_plain_read(weights)]
    _start_together(weights)
    start = time.perf_counter()
    with MemoryWatch() as loading:
        hosted = OurOptions(partition="always", offload_folder=options.offload_folder)
        backbone = host_model(str(folder), options.threads // options.ranks, hosted)
    seconds = time.perf_counter() - start
    plain.append(_plain_read(weights))
    of_each = WorkOptions(options.length, options.batch_size, rate=0.01, rows=_ROWS)
    tasks = random_work(options.prompts, backbone.embedding_rows, of_each)
    rng = np.random.default_rng(0)
    prompts = [rng.normal(size=(options.length, backbone.hidden_size)).astype(np.float32) for _ in tasks]
    with MemoryWatch() as training:
        side = tune_together(backbone, tasks, prompts, options.steps, _TOKEN_BUDGET)
    return RankFit(before, loading.peak, held_bytes(backbone), training.peak, plain, seconds, side.seconds, side.losses)


def _plain_read(files: Sequence[Path]) -> float:
    """Seconds to read this rank's share of the files, as large pieces into the same memory."""
    _start_together(files)
    buffer = memoryview(bytearray(_READ_AT_ONCE))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    start = time.perf_counter()
    with ExitStack() as stack:
        for path in files:
            file = stack.enter_context(open(path, "rb", buffering=0)).fileno()
            size = path.stat().st_size
            at, end = rank * size // ranks, (rank + 1) * size // ranks
            while at < end:
                at += os.preadv(file, [buffer[: end - at]], at)
    return time.perf_counter() - start


def _start_together(files: Sequence[Path]) -> None:
    dist.barrier()
    if dist.get_rank() == 0:
        _drop_from_cache(files)
    dist.barrier()


def _drop_from_cache(files: Sequence[Path]) -> bool:
    """Ask the system to drop the files from its page cache; returns whether it can be asked."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    return True
