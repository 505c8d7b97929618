"""How fast a GPU tunes prompts, and in how much memory: each section reports figures as soon as it has them."""

import gc
import importlib.metadata
import importlib.util
import platform
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, PretrainedConfig, T5Config

from pipeline.backbone.files import architecture_of, find_model, read_config
from pipeline.backbone.host import Backbone, compute_dtype, held_bytes, host_backbone
from pipeline.backbone.memory import estimate_memory
from pipeline.lab.benchmark.gpu_checks import Entry, Report, finite, short
from pipeline.lab.benchmark.launches import layer_costs
from pipeline.lab.benchmark.ours import tune_together
from pipeline.lab.benchmark.peak import bfloat16_peak, copy_rate, int8_peak, useful_operations
from pipeline.lab.benchmark.random_weights import random_backbone
from pipeline.lab.benchmark.shapes import published_config
from pipeline.lab.benchmark.side_by_side import SETTLING, Side
from pipeline.lab.benchmark.synthetic import byte_tokenizer, write_checkpoint
from pipeline.lab.benchmark.work import TaskWork, WorkOptions, load_work, needed_tokens, random_work
from pipeline.tuning.hosting import agreed_products
from pipeline.tuning.machine import device_name, free_bytes

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "deepspeed",
    "bitsandbytes",
    "peft",
    "accelerate",
    "numpy",
)
_TASKS = ("sst2", "trec", "cr", "mpqa")
_BATCH = 16
"""Rows a step of every trial."""
_INPUT, _TARGET = (8, 40), (1, 3)
"""Tokens of random rows, at least and at most."""
_MOST_TOKENS = 16_384
"""Of a micro-batch."""


@dataclass(frozen=True)
class Scale:
    """How much a section measures."""

    small: bool
    """Tiny shapes in place of published ones, and few steps: for trying the command itself."""
    data: Path | None
    """Rows of `<data>/<task>/train.parquet`, a token for each byte; random tokens where there is none."""

    @property
    def steps(self) -> int:
        return SETTLING + (1 if self.small else 4)

    def config(self, shape: str, layers: int | None = None) -> PretrainedConfig:
        if not self.small:
            return published_config(shape, layers)
        sides: dict[str, Any] = {"vocab_size": 320, "tie_word_embeddings": False}
        if shape.startswith("t5"):
            return T5Config(
                **sides, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
                decoder_start_token_id=0,
            )  # fmt: skip
        return LlamaConfig(
            **sides, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=512,
        )  # fmt: skip

    def tasks(self, config: PretrainedConfig, count: int, length: int) -> list[TaskWork]:
        """So many trials. Raises: CorpusError."""
        options = WorkOptions(length, 4 if self.small else _BATCH)
        text: Any = config.get_text_config(decoder=True)
        if self.data is None:
            return random_work(count, int(text.vocab_size), options, _INPUT, _TARGET)
        tokenizer = byte_tokenizer(eos_template=bool(config.is_encoder_decoder))
        names = [_TASKS[place % len(_TASKS)] for place in range(count)]
        return load_work(self.data, names, tokenizer, architecture_of(config), options)


def measure_machine(device: torch.device, report: Report) -> None:
    """What the machine is, and the fastest products and copies on it."""
    facts: Entry = {
        "device": device_name() if device.type == "cuda" else platform.machine(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        facts["compute_capability"] = list(torch.cuda.get_device_capability(device))
        facts["memory_mib"] = found.total_memory // 2**20
        facts["multiprocessors"] = found.multi_processor_count
    report({"facts": facts})
    peaks: dict[str, Callable[[], float]] = {
        "int8_operations_a_second": lambda: int8_peak(device, torch.get_num_threads()),
        "bfloat16_operations_a_second": lambda: bfloat16_peak(device, torch.get_num_threads()),
        "copied_bytes_a_second": lambda: copy_rate(device),
    }
    for name, measure in peaks.items():
        try:
            report({"peak": name, "value": measure()})
        except Exception as error:  # a device without such products
            report({"peak": name, "error": short(error)})


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def count_launches(report: Report) -> None:
    """Launches and bytes of a layer against the least, for two shapes; no device is asked."""
    lengths, parents = [100] * 4 + [25] * 64, [None] * 4 + [row % 4 for row in range(64)]
    ways = {"operators": False, "triton": True}
    if importlib.util.find_spec("triton") is None:
        del ways["triton"]
        report({"way": "triton", "skipped": "Triton is not installed"})
    for shape in ("llama-3b", "llama-7b"):
        for way, kernels in ways.items():

            def config(layers: int, shape: str = shape) -> PretrainedConfig:
                return published_config(shape, layers)

            costs = layer_costs(config, lengths, parents, kernels)
            for direction, cost in zip(("forward", "backward"), costs, strict=True):
                report(
                    {
                        "shape": shape,
                        "way": way,
                        "direction": direction,
                        "tokens": sum(lengths),
                        "launches": cost.launches,
                        "bytes": cost.moved,
                        "least_bytes": cost.least,
                        "least_bytes_of_products": cost.least_of_products,
                        "times_least": round(cost.times_least, 2),
                        "by_name": {name: list(of) for name, of in cost.by_name.items()},
                    }
                )


def measure_trials(device: torch.device, report: Report, scale: Scale) -> None:
    """1, 8 and 64 trials in one run, with prompts of 20 and of 100 tokens, on a shape of 3 billion parameters."""
    config = scale.config("llama-3b")
    subject = _made(config, device, report, "llama-3b")
    for length in (20, 100):
        for count in (1, 8, 64):
            named = {"shape": "llama-3b", "trials": count, "length": length}
            _measured(named, subject, scale.tasks(config, count, length), scale.steps, report)


def measure_shape(device: torch.device, report: Report, scale: Scale, shape: str) -> None:
    """Eight trials on a published shape of random weights."""
    config = scale.config(shape)
    subject = _made(config, device, report, shape)
    for length in (20, 100):
        named = {"shape": shape, "trials": 8, "length": length}
        _measured(named, subject, scale.tasks(config, 8, length), scale.steps, report)


@dataclass(frozen=True)
class _Subject:
    """A model to measure, and what its skeleton tells, which takes seconds to build."""

    backbone: Backbone
    operations: float
    """Useful operations of a token."""
    token_budget: int


def _subject(backbone: Backbone) -> _Subject:
    return _Subject(backbone, useful_operations(backbone.config, 1.0), _token_budget(backbone))


def _made(config: PretrainedConfig, device: torch.device, report: Report, shape: str) -> _Subject:
    start = time.perf_counter()
    products = agreed_products("auto", device)
    backbone = random_backbone(config, device, compute_dtype("auto", device), products=products)
    held = {name: size // 2**20 for name, size in held_bytes(backbone).items()}
    seconds = round(time.perf_counter() - start, 2)
    report({"shape": shape, "products": products, "way": backbone.way, "held_mib": held, "made_in_seconds": seconds})
    return _subject(backbone)


def _measured(named: Entry, subject: _Subject, tasks: Sequence[TaskWork], steps: int, report: Report) -> Side | None:
    """Tune, and report the figures or the error, such as too little memory."""
    backbone, budget = subject.backbone, subject.token_budget
    _forget(backbone.device)
    try:
        side = tune_together(backbone, tasks, _prompts(backbone, tasks), steps, budget)
    except Exception as error:
        report({**named, "passed": False, "error": short(error)})
        return None
    figures = _figures(side, backbone.config, subject.operations, tasks)
    report({**named, "tokens_of_a_micro_batch": budget, **figures})
    return side


def _figures(side: Side, config: PretrainedConfig, operations: float, tasks: Sequence[TaskWork]) -> Entry:
    work = operations * needed_tokens(config, tasks, side.prompts, len(side.losses))
    return {
        "tokens_a_second": side.rate,
        "step_seconds": side.step_seconds,
        "first_step_seconds": side.seconds[0],
        "useful_operations_a_second": work / side.step_seconds,
        "peak_mib": side.peak_bytes // 2**20,
        "first_losses": finite(float(np.mean(side.losses[0]))),
        "last_losses": finite(float(np.mean(side.losses[-1]))),
        "passed": bool(np.isfinite(side.losses).all()),
    }


def _prompts(backbone: Backbone, tasks: Sequence[TaskWork]) -> list[np.ndarray]:
    """Embeddings of random tokens."""
    rng = np.random.default_rng(0)
    sizes = [task.trial.settings.prompt.length for task in tasks]
    draws = [torch.as_tensor(rng.integers(3, backbone.embedding_rows, size)) for size in sizes]
    return [backbone.embed(ids).cpu().numpy() for ids in draws]


def _token_budget(backbone: Backbone) -> int:
    """Tokens of a micro-batch whose activations take about half of the memory that is free."""
    if backbone.device.type != "cuda":
        return 4096
    tokens = 4096
    activations = estimate_memory(backbone.config, True, backbone.dtype, 1, tokens).activations / tokens
    fit = int(free_bytes(backbone.device) / 2 / activations)
    return max(512, min(_MOST_TOKENS, fit // 256 * 256))


def _forget(device: torch.device) -> None:
    """Free what the last measurement left, and begin its peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def compare_peers(device: torch.device, report: Report, scale: Scale) -> None:
    """Four tasks together against PEFT with transformers' Trainer, one after another: in bfloat16, and in 8 bits."""
    for name in ("peft", "accelerate"):
        if importlib.util.find_spec(name) is None:
            report({"side": "PEFT", "skipped": f"{name} is not installed"})
            return
    shape, layers = "llama-3b", 8  # 28 layers would take a minute to write and to read
    config = scale.config(shape, layers)
    named: Entry = {"shape": shape, "layers": layers}
    work = {length: scale.tasks(config, 4, length) for length in (100, 20)}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "model")
        write_checkpoint(config, checkpoint)
        found, prompts = _our_side(checkpoint, device, named, work, scale.steps, report)
        operations = useful_operations(config, 1.0)
        for side, int8 in {"PEFT, bf16": False, "PEFT, load_in_8bit": True}.items():
            if int8 and importlib.util.find_spec("bitsandbytes") is None:
                report({**named, "side": side, "skipped": "bitsandbytes is not installed"})
                continue
            try:
                _peer_side(checkpoint, named | {"side": side}, int8, operations, (work, prompts, found), report)
            except Exception as error:
                report({**named, "side": side, "passed": False, "error": short(error)})


def _our_side(
    checkpoint: Path,
    device: torch.device,
    named: Entry,
    work: Mapping[int, Sequence[TaskWork]],
    steps: int,
    report: Report,
) -> tuple[dict[int, Side], dict[int, list[np.ndarray]]]:
    """By length our figures, and the prompts that all sides begin with."""
    files = find_model(str(checkpoint))
    dtype, products = compute_dtype("auto", device), agreed_products("auto", device)
    backbone = host_backbone(
        files, read_config(files), int8=True, dtype=dtype, device=device, sharded=False, products=products
    )
    found: dict[int, Side] = {}
    subject = _subject(backbone)
    for length, tasks in work.items():
        side = _measured({**named, "side": "ours", "length": length}, subject, tasks, steps, report)
        if side is not None:
            found[length] = side
    return found, {length: _prompts(backbone, tasks) for length, tasks in work.items()}


def _peer_side(
    checkpoint: Path,
    named: Entry,
    int8: bool,
    operations: float,
    sides: tuple[Mapping[int, Sequence[TaskWork]], Mapping[int, list[np.ndarray]], Mapping[int, Side]],
    report: Report,
) -> None:
    from pipeline.lab.benchmark.peft_trainer import PeerOptions, load_peer_model, tune_one_by_one

    work, prompts, ours = sides
    options, config = PeerOptions(int8=int8, bf16=True), read_config(find_model(str(checkpoint)))
    _forget(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model = load_peer_model(checkpoint, options)
    for length, tasks in work.items():
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        steps = len(ours[length].losses) if length in ours else SETTLING + 1
        side = tune_one_by_one(model, tasks, prompts[length], steps, options, checkpoint.parent / "trainer")
        more: Entry = {}
        if length in ours:
            apart = np.abs(np.array(side.losses) / np.array(ours[length].losses) - 1)
            more = {"ours_is_faster_by": ours[length].rate / side.rate, "losses_apart": finite(float(apart.max()))}
        report({**named, "length": length, **_figures(side, config, operations, tasks), **more})
