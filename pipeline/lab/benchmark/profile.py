"""Where the time of a step goes, by what is done."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.lab.benchmark.bench import Bench, OurOptions, host_for
from pipeline.lab.benchmark.ours import tune_together
from pipeline.lab.benchmark.ranks import run_ranks
from pipeline.lab.benchmark.side_by_side import write_figures
from pipeline.tuning.machine import device_name

# Part of a step -> beginnings of the names that PyTorch's profiler has for it.
_PARTS = {
    "int8 products": ("aten::_int_mm",),
    "attention": ("_PackedAttention", "PackedAttention"),
    "quantising and rescaling": ("_Int8Product",),
    "output layer and losses": ("aten::mm", "aten::_log_softmax", "_ExactProduct", "aten::nll", "aten::gather"),
    "gates": ("GatedProduct",),
    "norms": ("RmsNorm",),
    "gathers and reductions over ranks": ("c10d::", "gloo:", "nccl:"),
}
_REST = "everything else, each below 2 %"


def profile_step(bench: Bench, options: OurOptions) -> dict[str, float]:
    """Shares of rank 0's time in a settled step, by part; other operators have their own names."""
    return run_ranks(bench.ranks, _on_rank, bench, options)[0]


def save_shares(path: Path, shares: Mapping[str, float]) -> None:
    write_figures(path, {"device": device_name(), "shares": shares})


def _on_rank(bench: Bench, options: OurOptions) -> dict[str, float]:
    backbone = host_for(bench, options)
    tune_together(backbone, bench.tasks, bench.prompts, bench.steps, options.token_budget)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiled:
        tune_together(backbone, bench.tasks, bench.prompts, 1, options.token_budget)
    seconds: dict[str, float] = {}
    for event in profiled.key_averages():
        own = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        seconds[_part(event.key)] = seconds.get(_part(event.key), 0.0) + own
    total = sum(seconds.values())
    shares = {part: own / total for part, own in seconds.items()}
    large = {part: share for part, share in shares.items() if part in _PARTS or share >= 0.02}
    return dict(sorted(large.items(), key=lambda item: -item[1])) | {_REST: 1 - sum(large.values())}


def _part(name: str) -> str:
    return next((part for part, starts in _PARTS.items() if name.startswith(starts)), name)
