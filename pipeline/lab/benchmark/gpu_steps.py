"""Whether a GPU's whole step is right: losses and prompts' gradients of small models, against float64.

The reference is transformers' own model in float64, with the weights that the int8 rows and their scales stand for, and
each row by itself behind its prompt.
"""

import importlib.util
import itertools
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Gemma3TextConfig,
    LlamaConfig,
    PretrainedConfig,
    Qwen3Config,
    T5Config,
)

from pipeline.backbone import encoder_decoder, gpu, prompted
from pipeline.backbone.embedding import embed_words
from pipeline.backbone.files import find_model, read_config
from pipeline.backbone.fused import use_kernels
from pipeline.backbone.host import Backbone, host_backbone
from pipeline.backbone.int8 import scale_of, set_products
from pipeline.backbone.offload import Keep, in_files, in_main_memory
from pipeline.backbone.rows import as_indices
from pipeline.lab.benchmark.gpu_checks import (
    Check,
    Distance,
    Report,
    distance,
    run_checks,
    short,
    triton_is_missing,
)
from pipeline.lab.benchmark.random_weights import random_backbone
from pipeline.lab.benchmark.synthetic import write_checkpoint

_VOCABULARY = 512
_DECODER = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "Llama": LlamaConfig(**_DECODER),
    "Qwen3": Qwen3Config(**_DECODER),
    # One layer with a window that is shorter than the rows, and one that sees all.
    "Gemma 3": Gemma3TextConfig(
        **_DECODER,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        query_pre_attn_scalar=32,
    ),
    "T5": T5Config(
        vocab_size=_VOCABULARY, d_model=128, d_kv=32, d_ff=256, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", tie_word_embeddings=True, decoder_start_token_id=0,
    ),
}  # fmt: skip
# Type of activations, products -> bounds of the losses' and the gradients' relative distance. Int8 rounds the
# activations of every product, and bfloat16 every number.
_BOUNDS = {
    (torch.float32, "exact"): (1e-4, 1e-3),
    (torch.float32, "int8_forward"): (0.02, 0.15),
    (torch.float32, "int8"): (0.02, 0.15),
    (torch.bfloat16, "exact"): (0.02, 0.15),
    (torch.bfloat16, "int8_forward"): (0.02, 0.2),
    (torch.bfloat16, "int8"): (0.02, 0.2),
}


@dataclass(frozen=True)
class _Rows:
    """Rows behind prompts of two lengths."""

    prompts: Sequence[Tensor]
    """`[P, H]` each, leaves of autograd."""
    of_row: Sequence[int]
    inputs: Sequence[np.ndarray]
    targets: Sequence[np.ndarray]


Found = tuple[Tensor, Tensor]
"""Losses `[B]`, and all prompts' gradients one after the other."""


def check_steps(device: torch.device, report: Report) -> None:
    """Every family in every type and product, with kernels (Triton's on a GPU) and without."""
    run_checks(report, _family_checks(device))


def _family_checks(device: torch.device) -> Iterator[Check]:
    for name, dtype in itertools.product(CONFIGS, (torch.float32, torch.bfloat16)):
        told = f"{name}, {str(dtype).removeprefix('torch.')}"
        try:
            backbone = random_backbone(CONFIGS[name], device, dtype)
            expected = _in_float64(backbone, _rows(device))
        except Exception as error:  # told as a check that failed; the other families go on
            yield told, partial(_raise, error)
            continue
        if device.type == "cuda" and triton_is_missing(device) is None:
            yield f"{told}, keeps Triton's kernels", partial(_keeps_kernels, device)
        for (of, products), bounds in _BOUNDS.items():
            for kernels in (True, False) if of == dtype else ():
                how = f"{told}, {products} products, {'with' if kernels else 'without'} kernels"
                yield how, partial(_step, backbone, products, kernels, expected, bounds)


def _raise(error: Exception) -> Mapping[str, Distance]:
    raise error


def _keeps_kernels(device: torch.device) -> dict[str, Distance]:
    """When a model is loaded, kernels that fail give way to PyTorch's operators without an error."""
    return {"none was given up": Distance(0.0, float(not gpu.runs_on(device)), 0.0)}


def _rows(device: torch.device) -> _Rows:
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    prompts = [(torch.randn(n, 128, generator=generator) * 0.1).to(device).requires_grad_() for n in (20, 7)]
    inputs, targets = ([rng.integers(3, _VOCABULARY, n) for n in of] for of in ((5, 33, 1, 12, 18), (2, 1, 4, 3, 1)))
    return _Rows(prompts, [0, 1, 1, 0, 1], inputs, targets)


def _step(
    backbone: Backbone, products: str, kernels: bool, expected: Found, bounds: tuple[float, float]
) -> dict[str, Distance]:
    model: Any = backbone.hosted.model
    set_products(model, products, backbone.device)
    use_kernels(model, kernels)
    return _distances(_found(backbone, _rows(backbone.device)), expected, bounds)


def _distances(found: Found, expected: Found, bounds: tuple[float, float]) -> dict[str, Distance]:
    names = ("losses", "gradients")
    return {n: distance(a, b, bound) for n, a, b, bound in zip(names, found, expected, bounds, strict=True)}


def _found(backbone: Backbone, rows: _Rows) -> Found:
    """By one pass, as a step computes them."""
    behind = prompted.Rows(rows.prompts, rows.of_row, rows.inputs)
    return _with_gradients(backbone.run(prompted.target_nll, behind, rows.targets), rows)


def _with_gradients(losses: Tensor, rows: _Rows) -> Found:
    gradients = torch.autograd.grad(losses.sum(), rows.prompts)
    return losses.detach(), torch.cat([of.flatten() for of in gradients])


def _in_float64(backbone: Backbone, rows: _Rows) -> Found:
    """By transformers' own model, one row after another."""
    config = backbone.config
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: Any = kind.from_config(config, dtype=torch.float64).to(backbone.device).eval().requires_grad_(False)
    _copy_weights(backbone.hosted.model, model)  # type: ignore[arg-type]
    losses = []
    for place, (x, y) in enumerate(zip(rows.inputs, rows.targets, strict=True)):
        prompt = rows.prompts[rows.of_row[place]]
        ids = x if config.is_encoder_decoder else np.concatenate([x, y[:-1]])
        words = embed_words(model, as_indices(ids, prompt))
        more = {}
        if config.is_encoder_decoder:
            more = {"decoder_input_ids": encoder_decoder.decoder_inputs(model, [y], prompt.device)}
        logits = model(inputs_embeds=torch.cat([prompt.double(), words])[None], use_cache=False, **more).logits
        losses.append(functional.cross_entropy(logits[0, -len(y) :], as_indices(y, prompt), reduction="sum"))
    return _with_gradients(torch.stack(losses), rows)


@torch.no_grad()
def _copy_weights(ours: nn.Module, model: nn.Module) -> None:
    """Give transformers' model what the parameters of ours stand for."""
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            own = ours.get_submodule(path)
            weight: Any = own._parameters[key]
            scaled = weight.dtype == torch.int8
            scale = getattr(own, scale_of(key)).double()[:, None] if scaled else 1.0
            parameter.copy_(weight.double() * scale)


def check_partitioned(device: torch.device, report: Report, small: bool = False) -> None:
    """ZeRO-3 on one rank: weights on the device, in main memory and in files, against the whole model.

    `small` leaves out T5 and bfloat16. It joins a process group of one, in a process that has none.
    """
    if importlib.util.find_spec("deepspeed") is None:
        report({"check": "ZeRO-3 on one rank", "skipped": "deepspeed is not installed"})
        return
    with tempfile.TemporaryDirectory() as folder, _one_rank(Path(folder, "meeting"), device):
        run_checks(report, _partition_checks(device, Path(folder), small))


@contextmanager
def _one_rank(meeting: Path, device: torch.device) -> Iterator[None]:
    backend = "nccl" if device.type == "cuda" else "gloo"
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads them
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _partition_checks(device: torch.device, folder: Path, small: bool) -> Iterator[Check]:
    places: dict[str, Keep | None] = {
        "on the device": None,
        "in main memory": in_main_memory,
        "in files": in_files(folder / "kept"),
    }
    for name in ("Llama",) if small else ("Llama", "T5"):
        place_of_model = folder / name
        write_checkpoint(CONFIGS[name], place_of_model, torch.float32)
        for dtype, products in [(torch.float32, "exact"), (torch.bfloat16, "int8")][: 1 if small else 2]:
            told = f"{name}, {str(dtype).removeprefix('torch.')}, {products} products"
            try:
                whole = _hosted(place_of_model, device, dtype, products, False, None)
                expected = _in_float64(whole, _rows(device))
                beside = _found(whole, _rows(device))
            except Exception as error:
                yield f"{told}, whole", partial(_raise, RuntimeError(short(error)))
                continue
            bounds = _BOUNDS[dtype, products]
            yield f"{told}, whole", partial(_distances, beside, expected, bounds)
            for place, keep in places.items():
                how = (place_of_model, device, dtype, products, True, keep)
                yield f"{told}, partitioned, {place}", partial(_partitioned, how, expected, beside, bounds)


def _hosted(
    folder: Path, device: torch.device, dtype: torch.dtype, products: str, sharded: bool, keep: Keep | None
) -> Backbone:
    files = find_model(str(folder))
    return host_backbone(
        files, read_config(files), int8=True, dtype=dtype, device=device, sharded=sharded, products=products,
        keep=keep, share_memory=False,
    )  # fmt: skip


def _partitioned(
    how: tuple[Any, ...], expected: Found, whole: Found, bounds: tuple[float, float]
) -> dict[str, Distance]:
    backbone = _hosted(*how)
    found = _found(backbone, _rows(backbone.device))
    again = _found(backbone, _rows(backbone.device))  # by what ZeRO-3 noted in the first pass
    kept, device = how[-1], backbone.device
    held = [p.ds_tensor for p in backbone.hosted.parameters() if getattr(p, "ds_tensor", None) is not None]  # type: ignore[attr-defined]
    away = kept is None or device.type == "cpu" or not any(tensor.is_cuda for tensor in held)
    close = (1e-4, 1e-3) if backbone.dtype == torch.float32 else (2e-2, 0.1)
    beside = {f"{part} beside the whole model's": of for part, of in _distances(found, whole, close).items()}
    return {
        **_distances(found, expected, bounds),
        **beside,
        **{f"{part} of a second pass": of for part, of in _distances(again, found, close).items()},
        "weights stay where they are kept": Distance(0.0, float(not (away and held)), 0.0),
    }
