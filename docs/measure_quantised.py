"""Prints the table of quantised formats in docs/models.md, measured on the matrices of SmolLM2-135M.

PYTHONPATH=. python docs/measure_quantised.py > /tmp/table.md

Each matrix is brought into a format and back, as its libraries do, and what comes back into int8 rows. Losses are of
the first tokens of docs/design.md, with the model in float32.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes import functional as bitsandbytes
from torch import Tensor
from transformers import AutoModelForCausalLM

from pipeline.backbone.files import find_model, read_tokenizer
from pipeline.backbone.int8 import quantize_matrix

TOKENS = 768
FP8 = torch.float8_e4m3fn
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def int8_rows(w: Tensor) -> Tensor:
    rows, scale = quantize_matrix(w.contiguous())
    return rows.float() * scale[:, None]


def four_bits(kind: str, nested: bool) -> Callable[[Tensor], Tensor]:
    def back(w: Tensor) -> Tensor:
        return bitsandbytes.dequantize_4bit(
            *bitsandbytes.quantize_4bit(w.contiguous(), quant_type=kind, compress_statistics=nested)
        ).float()

    return back


def eight_bits(w: Tensor) -> Tensor:
    rows, absmax, _ = bitsandbytes.int8_vectorwise_quant(w.half())
    return rows.float() * absmax[:, None] / 127


def fp8(scale: Tensor, w: Tensor) -> Tensor:
    return (w / scale).to(FP8).float() * scale


def fp8_rows(w: Tensor) -> Tensor:
    return fp8(w.abs().amax(1, keepdim=True) / torch.finfo(FP8).max, w)


def fp8_blocks(w: Tensor) -> Tensor:
    blocks = [[fp8(b.abs().max() / torch.finfo(FP8).max, b) for b in rows.split(128, 1)] for rows in w.split(128)]
    return torch.cat([torch.cat(row, 1) for row in blocks])


def mxfp4(w: Tensor) -> Tensor:
    blocks = w.reshape(-1, 32)
    power = (blocks.abs().amax(1, keepdim=True).clamp_min(1e-30).log2().floor() - 2).exp2()
    parts = [(part[..., None].abs() - FP4).abs().argmin(-1) for part in (blocks / power).split(2**16)]
    return (FP4[torch.cat(parts)] * blocks.sign() * power).view_as(w)


def groups(w: Tensor) -> Tensor:
    """4 bits with a scale and a zero point for 64 inputs, as GPTQ and AWQ store them, rounded to nearest."""
    x = w.reshape(-1, 64)
    low, high = x.amin(1, keepdim=True).clamp(max=0), x.amax(1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round()
    return (((x / scale).round() + zero).clamp(0, 15) - zero).mul(scale).view_as(w)


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda w: w,
    "bitsandbytes, 8 bit": eight_bits,
    "FP8, a scale a row": fp8_rows,
    "FP8, blocks of 128 × 128": fp8_blocks,
    "bitsandbytes, NF4": four_bits("nf4", nested=True),
    "GPTQ or AWQ, 4 bit, groups of 64": groups,
    "bitsandbytes, FP4": four_bits("fp4", nested=False),
    "MXFP4": mxfp4,
}


@torch.no_grad()
def main() -> None:
    files = find_model("smollm2-135m")
    model = AutoModelForCausalLM.from_pretrained(files.folder, gguf_file=files.gguf, dtype=torch.float32).eval()
    text = Path(__file__).with_name("design.md").read_text(encoding="utf-8")
    ids = torch.tensor(read_tokenizer(files)(text).input_ids[:TOKENS])[None]
    matrices = {name: weight for name, weight in model.named_parameters() if name.endswith("_proj.weight")}
    floats = {name: weight.clone() for name, weight in matrices.items()}

    def loss(weights: dict[str, Tensor]) -> float:
        for name, weight in weights.items():
            matrices[name].copy_(weight)
        return float(model(ids, labels=ids).loss)

    def distance(weights: dict[str, Tensor], others: dict[str, Tensor]) -> float:
        off = sum(float((weights[name] - others[name]).square().sum()) for name in others)
        return (off / sum(float(other.square().sum()) for other in others.values())) ** 0.5

    print("| format | off the floats it was made from | int8 rows off the format | loss | loss in int8 rows |")
    print("|---|---|---|---|---|")
    for name, back in FORMATS.items():
        kept = {key: back(weight) for key, weight in floats.items()}
        rows = {key: int8_rows(weight) for key, weight in kept.items()}
        off = f"{distance(kept, floats):.2%} | {distance(rows, kept):.2%}"
        print(f"| {name} | {off} | {loss(kept):.3f} | {loss(rows):.3f} |", flush=True)


if __name__ == "__main__":
    main()
