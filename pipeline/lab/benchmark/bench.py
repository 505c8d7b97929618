"""One model and some tasks, ready to be run by either side."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig

from pipeline.backbone import prompted
from pipeline.backbone.allocator import configure_allocator
from pipeline.backbone.files import architecture_of, find_model, read_config, read_tokenizer
from pipeline.backbone.gguf_metadata import quick_gguf_reader
from pipeline.backbone.host import Backbone, compute_dtype, held_bytes, host_backbone
from pipeline.backbone.nearest import read_input_embeddings
from pipeline.backbone.offload import offload_of_settings
from pipeline.lab.benchmark.ours import tune_together
from pipeline.lab.benchmark.peft_trainer import PeerOptions, load_peer_model, tune_one_by_one
from pipeline.lab.benchmark.ranks import run_ranks
from pipeline.lab.benchmark.side_by_side import Side
from pipeline.lab.benchmark.work import TaskWork, WorkOptions, load_work, needed_tokens
from pipeline.tuning.hosting import agreed_products, partitions

_COMMON_TOKENS = 5_000


@dataclass(frozen=True)
class OurOptions:
    """How our side runs; the defaults are what users get."""

    products: str = "auto"
    kernels: bool = True
    int8: bool = True
    partition: str = "auto"
    """Whether ZeRO-3 partitions the model over the ranks, see `placement.partitions`."""
    nll: Callable[..., Tensor] = prompted.target_nll
    token_budget: int = 4096
    share_memory: bool = True
    """Whether ranks of one machine read each other's weights directly, see `host_backbone`."""
    offload_folder: str | None = None
    """Where weights are kept in files, as by `model.offload: nvme`."""


@dataclass(frozen=True)
class Bench:
    model: str
    tasks: Sequence[TaskWork]
    prompts: Sequence[np.ndarray]
    """`[P, H]` each, sampled from the vocabulary; both sides start from them."""
    steps: int
    ranks: int
    threads: int
    """Threads of all ranks together."""

    def ours(self, options: OurOptions | None = None) -> Callable[[], Side]:
        """Our side: all tasks together on `ranks` fresh processes, with ZeRO-3 if there are several."""
        return lambda: _merged(run_ranks(self.ranks, tune_on_rank, self, options or OurOptions()))

    def peer(self, options: PeerOptions) -> Callable[[], Side]:
        """The other side: one task after another, in one fresh process."""
        return lambda: _merged(run_ranks(1, tune_as_peer, self, options))

    @property
    def config(self) -> PretrainedConfig:
        return read_config(find_model(self.model))

    @property
    def needed_tokens(self) -> float:
        """Tokens that a step must compute at least."""
        return needed_tokens(self.config, self.tasks, self.prompts, self.steps)


def open_bench(
    model: str, data: Path, names: Sequence[str], work: WorkOptions, steps: int, ranks: int, threads: int
) -> Bench:
    """Raises: BackboneError, CorpusError."""
    files = find_model(model)
    config, tokenizer = read_config(files), read_tokenizer(files)
    tasks = load_work(data, names, tokenizer, architecture_of(config), work)
    table = read_input_embeddings(files)
    draws = [task.trial.generator("init").choice(_COMMON_TOKENS, work.length, replace=False) for task in tasks]
    prompts = [table[draw].float().numpy() for draw in draws]
    return Bench(model, tasks, prompts, steps, ranks, threads)


def host_for(bench: Bench, options: OurOptions) -> Backbone:
    """The frozen model on this rank."""
    return host_model(bench.model, bench.threads // bench.ranks, options)


def host_model(model: str, threads: int, options: OurOptions) -> Backbone:
    """A model by name, frozen, on this rank of `threads` threads. Raises: BackboneError."""
    torch.set_num_threads(max(1, threads))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = find_model(model)
    config, dtype = read_config(files), compute_dtype("auto", device)
    backbone = host_backbone(
        files,
        config,
        int8=options.int8,
        dtype=dtype,
        device=device,
        sharded=partitions(options.partition, config, options.int8, dtype, device),
        products=agreed_products(options.products, device),
        keep=offload_of_settings("nvme" if options.offload_folder else "none", options.offload_folder),
        kernels=options.kernels,
        share_memory=options.share_memory,
    )
    configure_allocator(sum(held_bytes(backbone).values()))
    return backbone


def tune_on_rank(bench: Bench, options: OurOptions) -> Side:
    """Our side of a bench on this rank."""
    backbone = host_for(bench, options)
    return tune_together(backbone, bench.tasks, bench.prompts, bench.steps, options.token_budget, options.nll)


def tune_as_peer(bench: Bench, options: PeerOptions) -> Side:
    """The other side of a bench in this process."""
    torch.set_num_threads(bench.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = load_peer_model(as_safetensors(bench.model, Path(folder)), options)
        return tune_one_by_one(model, bench.tasks, bench.prompts, bench.steps, options, Path(folder))


def _merged(ranks: Sequence[Side]) -> Side:
    return replace(ranks[0], peak_bytes=sum(rank.peak_bytes for rank in ranks))


def as_safetensors(model: str, folder: Path) -> Path:
    """The model as a folder for `from_pretrained`, whatever its own format is."""
    from transformers import AutoModelForCausalLM

    files = find_model(model)
    if files.gguf is None:
        return files.folder
    saved = folder / "model"
    with quick_gguf_reader():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            files.folder, dtype=torch.float32, gguf_file=files.gguf, trust_remote_code=False
        )
    loaded.config.quantization_config = None
    loaded.hf_quantizer = None
    loaded.save_pretrained(saved)
    return saved
