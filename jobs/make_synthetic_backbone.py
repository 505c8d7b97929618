#!/usr/bin/env python
"""Write a model folder of a published shape with random weights, to measure models without a download.

python jobs/make_synthetic_backbone.py t5-xl /tmp/t5-xl                   # 5.7 GB in bfloat16
python jobs/make_synthetic_backbone.py llama-70b /tmp/70b --layers 2      # only two of its layers
python jobs/make_synthetic_backbone.py some/config.json /tmp/own          # any supported family
"""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import typer
from rich.console import Console

from pipeline.errors import PromptBankError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
console = Console(soft_wrap=True, highlight=False)


@app.command(help=__doc__)
def main(
    shape: Annotated[str, typer.Argument(help="A published shape's short name, or a config.json.")],
    folder: Annotated[Path, typer.Argument(help="The model folder to write.")],
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than the shape has.")] = None,
    dtype: Annotated[Literal["bfloat16", "float16", "float32"], typer.Option(help="Type of the weights.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Another seed gives other weights.")] = 0,
    shard_mib: Annotated[int, typer.Option(min=1, help="Largest file, unless one tensor is larger.")] = 512,
) -> None:
    import torch

    from pipeline.lab.benchmark.shapes import published_config
    from pipeline.lab.benchmark.synthetic import write_checkpoint

    start = time.perf_counter()
    write_checkpoint(published_config(shape, layers), folder, getattr(torch, dtype), seed, shard_mib * 2**20)
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    console.print(f"{folder}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    try:
        app()
    except PromptBankError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)
