"""One model and some tasks, ready to be run by either side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.backbone.files import architecture_of, find_model, read_config, read_tokenizer
from pipeline.backbone.host import compute_dtype, host_backbone
from pipeline.backbone.nearest import read_input_embeddings
from pipeline.benchmark.comparison import Side
from pipeline.benchmark.ours import tune_together
from pipeline.benchmark.peft_trainer import PeerOptions, load_peer_model, tune_one_by_one
from pipeline.benchmark.ranks import run_ranks
from pipeline.benchmark.work import TaskWork, load_work

_TOKEN_BUDGET = 4096
_ROWS = 1_000
_COMMON_TOKENS = 5_000


@dataclass(frozen=True)
class Bench:
    model: str
    tasks: Sequence[TaskWork]
    prompts: Sequence[np.ndarray]
    """`[P, H]` each, sampled from the vocabulary: where both sides start from."""
    steps: int
    ranks: int
    threads: int
    """Of all ranks together."""
    folder: Path
    """For what the other side writes."""

    def ours(self, products: str) -> Callable[[], Side]:
        """All tasks together on `ranks` processes; ZeRO-3 where there are several."""
        return lambda: run_ranks(self.ranks, _tune_on_rank, self, products)[0]

    def peer(self, options: PeerOptions) -> Callable[[], Side]:
        """One task after another, in this process."""
        loaded: list[Any] = []

        def run() -> Side:
            torch.set_num_threads(self.threads)
            if not loaded:
                loaded.append(load_peer_model(_as_safetensors(self.model, self.folder), options))
            return tune_one_by_one(loaded[0], self.tasks, self.prompts, self.steps, options, self.folder)

        return run


def open_bench(
    model: str,
    data: Path,
    names: Sequence[str],
    length: int,
    batch: int,
    steps: int,
    ranks: int,
    threads: int,
    folder: Path,
) -> Bench:
    """Raises: BackboneError, CorpusError."""
    files = find_model(model)
    config, tokenizer = read_config(files), read_tokenizer(files)
    tasks = load_work(data, names, tokenizer, architecture_of(config), length, batch, _ROWS)
    table = read_input_embeddings(files)
    draws = [task.trial.generator("init").choice(_COMMON_TOKENS, length, replace=False) for task in tasks]
    prompts = [table[draw].float().numpy() for draw in draws]
    return Bench(model, tasks, prompts, steps, ranks, threads, folder)


def _tune_on_rank(bench: Bench, products: str) -> Side:
    torch.set_num_threads(max(1, bench.threads // bench.ranks))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    files = find_model(bench.model)
    backbone = host_backbone(
        files,
        read_config(files),
        int8=True,
        dtype=compute_dtype("auto", device),
        device=device,
        sharded=dist.get_world_size() > 1,
        products=products,
    )
    return tune_together(backbone, bench.tasks, bench.prompts, bench.steps, _TOKEN_BUDGET)


def _as_safetensors(model: str, folder: Path) -> Path:
    """The model as a folder that `from_pretrained` takes, whatever it came as."""
    from transformers import AutoModelForCausalLM

    files = find_model(model)
    saved = folder / "model"
    if not saved.exists():
        named = {"gguf_file": files.gguf} if files.gguf else {}
        loaded = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32, **named)
        loaded.config.quantization_config = None
        loaded.hf_quantizer = None
        loaded.save_pretrained(saved)
    return saved
