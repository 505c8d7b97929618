#!/usr/bin/env python
"""Measure tuning against what a user would pick instead. Runs without Ray, in one process.

python jobs/benchmark.py peers --data ../shared/data --length 100
python jobs/benchmark.py lengths --data ../shared/data
python jobs/benchmark.py growth --data ../shared/data
"""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console
from rich.table import Table

from pipeline.errors import PromptBankError

if TYPE_CHECKING:
    from pipeline.benchmark.comparison import Side

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False
)
console = Console(soft_wrap=True, highlight=False)

Data = Annotated[Path, typer.Option(help="A folder with <task>/train.parquet, columns text and label.")]
Tasks = Annotated[str, typer.Option(help="Tasks, separated by commas.")]
Model = Annotated[str, typer.Option(help="A decoder-only model: folder, hub name, .gguf file or packaged name.")]
Ranks = Annotated[int, typer.Option(help="Processes of our side; ZeRO-3 where there are several.")]
Threads = Annotated[int, typer.Option(help="Threads of either side, of all its processes together.")]
Rounds = Annotated[int, typer.Option(help="How often the sides run in turn.")]
Steps = Annotated[int, typer.Option(help="Steps a round, two of which do not count.")]
Batch = Annotated[int, typer.Option(help="Rows a step of every task.")]
Out = Annotated[Path, typer.Option(help="JSON file for the results.")]

FOUR = "sst2,trec,cr,mpqa"


@app.command()
def peers(
    data: Data,
    tasks: Tasks = FOUR,
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 100,
    batch: Batch = 16,
    steps: Steps = 5,
    rounds: Rounds = 2,
    ranks: Ranks = 2,
    threads: Threads = 2,
    with_int8_peer: Annotated[bool, typer.Option(help="Also PEFT on load_in_8bit.")] = False,
    with_switches: Annotated[bool, typer.Option(help="Also PEFT with bf16 and rows grouped by length.")] = False,
    out: Out = Path("docs/benchmarks/peers.json"),
) -> None:
    """All tasks together against PEFT and transformers' Trainer, one task after another, on the same rows."""
    from pipeline.benchmark.bench import open_bench
    from pipeline.benchmark.peft_trainer import PeerOptions

    with tempfile.TemporaryDirectory() as folder:
        bench = open_bench(model, data, tasks.split(","), length, batch, steps, ranks, threads, Path(folder))
        sides = {
            "ours, int8 products": bench.ours("int8"),
            "ours, exact products": bench.ours("exact"),
            "PEFT + Trainer, float32": bench.peer(PeerOptions()),
        }
        if with_int8_peer:
            sides["PEFT + Trainer, load_in_8bit"] = bench.peer(PeerOptions(int8=True))
        if with_switches:
            sides["PEFT + Trainer, bf16, by length"] = bench.peer(PeerOptions(bf16=True, by_length=True))
        _run(f"peers, prompt length {length}, {tasks}, {batch} rows a task", sides, rounds, out)


@app.command()
def lengths(
    data: Data,
    tasks: Tasks = FOUR,
    model: Model = "smollm2-135m",
    batch: Batch = 16,
    steps: Steps = 5,
    rounds: Rounds = 2,
    ranks: Ranks = 2,
    threads: Threads = 2,
    out: Out = Path("docs/benchmarks/lengths.json"),
) -> None:
    """What a step costs by prompt length: 1 against 20 and 100."""
    from pipeline.benchmark.bench import open_bench

    with tempfile.TemporaryDirectory() as folder:
        sides = {
            f"prompt length {length}": open_bench(
                model, data, tasks.split(","), length, batch, steps, ranks, threads, Path(folder)
            ).ours("int8")
            for length in (1, 20, 100)
        }
        _run(f"prompt lengths, {tasks}, {batch} rows a task", sides, rounds, out)


@app.command()
def growth(
    data: Data,
    tasks: Tasks = FOUR,
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 20,
    batch: Batch = 2,
    steps: Steps = 4,
    rounds: Rounds = 2,
    ranks: Ranks = 2,
    threads: Threads = 2,
    out: Out = Path("docs/benchmarks/growth.json"),
) -> None:
    """Tokens a second with 1, 4, 16 and 64 trials in one run, each of the same batch."""
    from pipeline.benchmark.bench import open_bench

    names = tasks.split(",") * 64
    with tempfile.TemporaryDirectory() as folder:
        sides = {
            f"{count} trials": open_bench(
                model,
                data,
                names[:count],
                length,
                batch,
                steps,
                ranks,
                threads,
                Path(folder),
            ).ours("int8")
            for count in (1, 4, 16, 64)
        }
        _run(f"growth, prompt length {length}, {batch} rows a trial", sides, rounds, out)


def _run(name: str, sides: "Mapping[str, Callable[[], Side]]", rounds: int, out: Path) -> None:
    from pipeline.benchmark.comparison import compare, save_results

    result = compare(name, sides, rounds)
    table = Table(title=f"{result.name} ({result.device})", title_justify="left")
    first = next(iter(sides))
    for column in ("side", "text tokens/s", f"'{first}' is faster by", "losses apart"):
        table.add_column(column)
    for side, rates in result.rates.items():
        low, middle, high = result.ratios.get(side, (1.0, 1.0, 1.0))
        apart = f"{result.loss_difference[side]:.2%}" if side in result.loss_difference else "–"
        table.add_row(side, " ".join(f"{rate:.0f}" for rate in rates), f"{middle:.2f} ({low:.2f} – {high:.2f})", apart)
    console.print(table)
    save_results(out, [result])
    console.print(f"Written to {out}.")


if __name__ == "__main__":
    try:
        app()
    except PromptBankError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)
