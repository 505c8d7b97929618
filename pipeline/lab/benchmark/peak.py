"""How close a step comes to the machine's limits: its useful operations against the fastest products."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PretrainedConfig

from pipeline.backbone.loading import build_skeleton
from pipeline.lab.benchmark.side_by_side import SidesResult

_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (1536, 576, 1536))
_SHAPES_ON_GPU = ((4096, 4096, 4096), (8192, 8192, 8192), (16_384, 8192, 8192))
_SECONDS = 1.0
_COPIED = {"cpu": 2**26, "cuda": 2**30}
"""Bytes, more than caches hold."""


def shares_of_peak(result: SidesResult, config: PretrainedConfig, tokens: float, threads: int) -> dict[str, Any]:
    """For every side of a result, its useful operations as a share of the machine's int8 peak.

    `tokens` is the least number of tokens that a step must compute.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peak, work = int8_peak(device, threads), useful_operations(config, tokens)
    shares = {side: work / statistics.median(seconds) / peak for side, seconds in result.step_seconds.items()}
    return {"int8_peak_operations_a_second": peak, "useful_operations_a_step": work, "share_of_peak": shares}


def int8_peak(device: torch.device, threads: int) -> float:
    """Operations a second of int8 products, the best of some shapes; a multiply-add counts two.

    At least those of float32 on a CPU, where PyTorch has no more than a plain loop if the instructions are not there.
    """

    def product(n: int, k: int, m: int) -> Callable[[], object]:
        x, y = (torch.randint(-127, 127, sides, dtype=torch.int8, device=device) for sides in ((n, k), (m, k)))
        return lambda: torch._int_mm(x, y.t())

    return max(_best_rate(device, threads, product), _float32_peak_of_cpu(device, threads))


def bfloat16_peak(device: torch.device, threads: int) -> float:
    """The same of products in bfloat16."""
    return max(_float_peak(device, threads, torch.bfloat16), _float32_peak_of_cpu(device, threads))


def _float32_peak_of_cpu(device: torch.device, threads: int) -> float:
    return _float_peak(device, threads, torch.float32) if device.type == "cpu" else 0.0


def _float_peak(device: torch.device, threads: int, dtype: torch.dtype) -> float:
    def product(n: int, k: int, m: int) -> Callable[[], object]:
        x, y = (torch.randn(sides, dtype=dtype, device=device) for sides in ((n, k), (m, k)))
        return lambda: x @ y.t()

    return _best_rate(device, threads, product)


def copy_rate(device: torch.device) -> float:
    """Bytes a second that a large copy on the device reads and writes together."""
    source = torch.ones(_COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _least_seconds(device, lambda: target.copy_(source))


def _best_rate(device: torch.device, threads: int, product: Callable[[int, int, int], Callable[[], object]]) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shapes = _SHAPES_ON_GPU if device.type == "cuda" else _SHAPES
        return max(2 * n * k * m / _least_seconds(device, product(n, k, m)) for n, k, m in shapes)
    finally:
        torch.set_num_threads(before)


def _least_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Of a call, run again and again for about a second."""
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def useful_operations(config: PretrainedConfig, tokens: float) -> float:
    """4 x parameters outside the embeddings x tokens: the forward pass, and the backward pass to the activations.

    In an encoder-decoder a token passes through about half of the parameters, and of experts through those that it is
    sent to.
    """
    skeleton = build_skeleton(config, int8=False)
    tables = {id(p) for name, p in skeleton.named_parameters() if "embed" in name or "lm_head" in name}
    text: Any = config.get_text_config(decoder=True)
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1
    sent = getattr(text, "num_experts_per_tok", None) or experts
    # Fused experts are the parameters of three sides.
    used = {id(p): p.numel() * (sent / experts if p.dim() == 3 else 1.0) for p in skeleton.parameters()}
    parameters = sum(number for key, number in used.items() if key not in tables)
    return 4.0 * parameters * tokens / (2 if config.is_encoder_decoder else 1)
