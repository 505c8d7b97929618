#!/usr/bin/env python
"""Benchmark against what a user would pick instead. Each command runs alone, and only `corpus` needs Ray.

python jobs/benchmark.py peers --data ../shared/data --length 100   # against PEFT and transformers' Trainer
python jobs/benchmark.py ablation --data ../shared/data             # what each part of a fast step gains
python jobs/benchmark.py earlier ../earlier --data ../shared/data   # against another checkout of this project
python jobs/benchmark.py profile --data ../shared/data              # where the time of a step goes
python jobs/benchmark.py lengths --data ../shared/data              # what a longer prompt costs
python jobs/benchmark.py growth --data ../shared/data               # 1 to 256 trials in one run
python jobs/benchmark.py evaluation --data ../shared/data           # labels and answers, against transformers
python jobs/benchmark.py serving --data ../shared/data              # the service, against another checkout
python jobs/benchmark.py zero --data ../shared/data                 # what ZeRO-3 costs
python jobs/benchmark.py ranks --data ../shared/data                # bytes of a step here, and on up to 64 GPUs
python jobs/benchmark.py quality --data ../shared/data              # whether a fast step makes prompts worse
python jobs/benchmark.py corpus --data ../shared/data               # tokenising through Ray Data, by corpus size
python jobs/benchmark.py lake --data ../shared/data                 # reading a Delta table against its files alone
python jobs/benchmark.py grown --data ../shared/data                # a corpus that grew by one file in a hundred
python jobs/benchmark.py memory                                     # what a rank holds of a split, by its size
python jobs/benchmark.py tasks                                      # a thousand small tasks, stage by stage
python jobs/benchmark.py sweep --data ../shared/data                # 64 trials of a sweep against one after another
python jobs/benchmark.py fit                                        # memory of models of 3 billion parameters
python jobs/benchmark.py gpu                                        # is a GPU right, and how fast is it: nine minutes
"""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import typer
from rich.console import Console

from pipeline.errors import PromptBankError

if TYPE_CHECKING:
    from pipeline.lab.benchmark.bench import Bench
    from pipeline.lab.benchmark.side_by_side import Side, SidesResult

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None, pretty_exceptions_enable=False
)
console = Console(soft_wrap=True, highlight=False)

Data = Annotated[Path, typer.Option(help="A folder with <task>/train.parquet, columns text and label.")]
Tasks = Annotated[str, typer.Option(help="Tasks, separated by commas.")]
Model = Annotated[str, typer.Option(help="A model: folder, hub name, .gguf file or packaged name.")]
Ranks = Annotated[int, typer.Option(help="Processes of our side; ZeRO-3 where there are several.")]
Threads = Annotated[int, typer.Option(help="Threads of each side, all its processes together.")]
Rounds = Annotated[int, typer.Option(help="How often the sides run in turn.")]
Steps = Annotated[int, typer.Option(help="Steps a round, two of which do not count.")]
Batch = Annotated[int, typer.Option(help="Rows a step of every task.")]
Instruction = Annotated[int, typer.Option(help="Tokens that all inputs begin with; the only part that is left out.")]
Out = Annotated[Path, typer.Option(help="JSON file for the results.")]

FOUR = "sst2,trec,cr,mpqa"
WITH_DEV = "sst2,cr,mpqa,subj"


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
    int8_peer: Annotated[bool, typer.Option(help="Also PEFT on load_in_8bit.")] = False,
    switches_peer: Annotated[bool, typer.Option(help="Also PEFT with bf16 and rows grouped by length.")] = False,
    out: Out = Path("docs/benchmarks/peers.json"),
) -> None:
    """All tasks together against PEFT and transformers' Trainer, one task after another, on the same rows."""
    from pipeline.lab.benchmark.bench import OurOptions
    from pipeline.lab.benchmark.peft_trainer import PeerOptions

    bench = _bench(data, tasks.split(","), model, length, batch, steps, ranks, threads)
    sides = {
        "ours": bench.ours(),
        "ours, exact products": bench.ours(OurOptions(products="exact")),
        "PEFT + Trainer": bench.peer(PeerOptions()),
    }
    if int8_peer:
        sides["PEFT + Trainer, load_in_8bit"] = bench.peer(PeerOptions(int8=True))
    if switches_peer:
        sides["PEFT + Trainer, bf16, by length"] = bench.peer(PeerOptions(bf16=True, by_length=True))
    _run(f"peers, prompt length {length}, {tasks}, {batch} rows a task", sides, rounds, out, bench)


@app.command()
def earlier(
    checkout: Annotated[Path, typer.Argument(help="A checkout of the earlier commit: git worktree add FOLDER COMMIT.")],
    data: Data,
    tasks: Tasks = FOUR,
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 100,
    batch: Batch = 16,
    steps: Steps = 6,
    rounds: Rounds = 3,
    ranks: Ranks = 2,
    threads: Threads = 2,
    out: Out = Path("docs/benchmarks/earlier.json"),
) -> None:
    """This code against that of an earlier commit, on the same rows."""
    from pipeline.lab.benchmark.earlier import earlier_side

    names, counts = tasks.split(","), (steps, ranks, threads)
    bench = _bench(data, names, model, length, batch, *counts)
    then = earlier_side(checkout, data, names, model, {"length": length, "batch_size": batch}, counts)
    name = f"now and an earlier commit, prompt length {length}, {tasks}, {batch} rows a task"
    _run(name, {"now": bench.ours(), "earlier": then}, rounds, out, bench)


@app.command()
def ablation(
    data: Data,
    tasks: Tasks = FOUR,
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 100,
    batch: Batch = 16,
    steps: Steps = 5,
    rounds: Rounds = 2,
    ranks: Ranks = 2,
    threads: Threads = 2,
    instruction: Instruction = 0,
    out: Out = Path("docs/benchmarks/ablation.json"),
) -> None:
    """The speed of a step, and of a step without each of its parts."""
    from pipeline.lab.benchmark import ablation as without
    from pipeline.lab.benchmark.bench import OurOptions

    bench = _bench(data, tasks.split(","), model, length, batch, steps, ranks, threads, instruction=instruction)
    if instruction:
        whole = bench.ours(OurOptions(nll=without.beginning_per_row))
        name = f"an instruction of {instruction} tokens, prompt length {length}, {tasks}, {batch} rows a task"
        _run(name, {"it runs once": bench.ours(), "it runs with every row": whole}, rounds, out, bench)
        return
    sides = {
        "all parts": bench.ours(),
        "a prompt runs with every row": bench.ours(OurOptions(nll=without.prompt_per_row)),
        "rows padded to the longest": bench.ours(OurOptions(nll=without.padded_rows)),
        "logits at every position": bench.ours(OurOptions(nll=without.all_logits)),
        "float gradients": bench.ours(OurOptions(products="int8_forward")),
        "float products both ways": bench.ours(OurOptions(products="exact")),
        "partitioned by ZeRO-3": bench.ours(OurOptions(partition="always")),
        "no compiled kernels": bench.ours(OurOptions(kernels=False)),
    }
    _run(f"ablation, prompt length {length}, {tasks}, {batch} rows a task", sides, rounds, out, bench)


@app.command()
def profile(
    data: Data,
    tasks: Tasks = FOUR,
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 100,
    batch: Batch = 16,
    ranks: Ranks = 2,
    threads: Threads = 2,
    out: Out = Path("docs/benchmarks/profile.json"),
) -> None:
    """Where the time of a step goes."""
    from pipeline.lab.benchmark.bench import OurOptions
    from pipeline.lab.benchmark.profile import profile_step, save_shares
    from pipeline.lab.benchmark.tables import shares_table

    bench = _bench(data, tasks.split(","), model, length, batch, 3, ranks, threads)
    shares = profile_step(bench, OurOptions())
    console.print(shares_table(shares))
    save_shares(out, shares)
    console.print(f"Written to {out}.")


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
    bench = {
        length: _bench(data, tasks.split(","), model, length, batch, steps, ranks, threads) for length in (1, 20, 100)
    }
    sides = {f"prompt length {length}": of_length.ours() for length, of_length in bench.items()}
    _run(f"prompt lengths, {tasks}, {batch} rows a task", sides, rounds, out)


@app.command()
def growth(
    data: Data,
    tasks: Tasks = FOUR,
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 20,
    batch: Batch = 4,
    steps: Steps = 4,
    rounds: Rounds = 1,
    ranks: Ranks = 2,
    threads: Threads = 2,
    most: Annotated[int, typer.Option(help="Most trials in one run: 1, 4, 16, … up to it.")] = 256,
    out: Out = Path("docs/benchmarks/growth.json"),
) -> None:
    """Tokens a second and memory with 1, 4, 16, 64 and 256 trials in one run, also as a plot beside the JSON file."""
    from pipeline.lab.benchmark.tables import plot_growth

    counts = [count for count in (1, 4, 16, 64, 256, 1024) if count <= most]
    names = tasks.split(",") * most
    bench = {count: _bench(data, names[:count], model, length, batch, steps, ranks, threads) for count in counts}
    sides = {f"{count} trials": of_count.ours() for count, of_count in bench.items()}
    result = _run(f"growth, prompt length {length}, {batch} rows a trial", sides, rounds, out)
    plot_growth(counts, result, out.with_suffix(".svg"))


@app.command()
def evaluation(
    data: Data,
    tasks: Tasks = "sst2,sst5,cr,mpqa,subj",
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 20,
    rows: Annotated[int, typer.Option(help="Dev rows of every task whose labels are scored.")] = 500,
    answers: Annotated[int, typer.Option(help="Rows of all tasks together that are answered in words.")] = 500,
    tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 20,
    rounds: Rounds = 1,
    ranks: Ranks = 2,
    threads: Threads = 2,
    out: Out = Path("docs/benchmarks/evaluation.json"),
) -> None:
    """Scoring labels and decoding answers, against transformers' forward pass of padded batches and `generate`."""
    from pipeline.lab.benchmark.evaluation import compare_evaluation, save_evaluation
    from pipeline.lab.benchmark.tables import evaluation_table

    bench = _bench(data, tasks.split(","), model, length, 16, 1, ranks, threads, dev_rows=rows)
    result = compare_evaluation(bench, tokens, answers, rounds)
    console.print(evaluation_table(result))
    save_evaluation(out, result)
    console.print(f"Written to {out}.")


@app.command()
def serving(
    data: Data,
    tasks: Tasks = "sst2,trec,cr,mpqa,subj,mr,sst5",
    model: Model = "smollm2-135m",
    earlier: Annotated[Path | None, typer.Option(help="A checkout of an earlier commit, as the other side.")] = None,
    bank: Annotated[str | None, typer.Option(help="A bank with prompts of these tasks; else untuned ones.")] = None,
    length: Annotated[int, typer.Option(help="Length of untuned prompts.")] = 20,
    rows: Annotated[str, typer.Option(help="Rows of batches, separated by commas; answers for the first.")] = "64,512",
    tokens: Annotated[int, typer.Option(help="Tokens of an answer, at most.")] = 16,
    rounds: Rounds = 1,
    clients: Annotated[int, typer.Option(help="Clients over HTTP.")] = 8,
    seconds: Annotated[float, typer.Option(help="Of load over HTTP on each side; 0 leaves it out.")] = 20,
    out: Out = Path("docs/benchmarks/serving.json"),
) -> None:
    """Mixed rows on one thread: labels and answers by int16 and exact products, and by an earlier commit; and HTTP."""
    from pipeline.lab.benchmark.serving import ServingOptions, compare_serving, save_serving, serving_tables

    counts = [int(count) for count in rows.split(",")]
    options = ServingOptions(model, length, counts, tokens, rounds, clients, seconds)
    figures = compare_serving(data, tasks.split(","), earlier, options, bank)
    for table in serving_tables(figures):
        console.print(table)
    save_serving(out, figures)
    console.print(f"Written to {out}.")


@app.command()
def zero(
    data: Data,
    tasks: Tasks = FOUR,
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 100,
    batch: Batch = 16,
    steps: Steps = 5,
    rounds: Rounds = 3,
    ranks: Ranks = 2,
    threads: Threads = 2,
    out: Out = Path("docs/benchmarks/zero.json"),
) -> None:
    """What ZeRO-3 costs where the model fits on every rank: partitioned against whole."""
    from pipeline.lab.benchmark.bench import OurOptions

    bench = _bench(data, tasks.split(","), model, length, batch, steps, ranks, threads)
    sides = {
        "partitioned by ZeRO-3": bench.ours(OurOptions(partition="always")),
        "whole on every rank": bench.ours(OurOptions(partition="never")),
    }
    _run(f"ZeRO-3, {ranks} ranks, prompt length {length}, {tasks}, {batch} rows a task", sides, rounds, out, bench)


@app.command()
def ranks(
    data: Data,
    tasks: Tasks = FOUR,
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 100,
    batch: Batch = 16,
    shapes: Annotated[str, typer.Option(help="Published shapes, separated by commas.")] = "t5-xxl,llama-7b,llama-70b",
    counts: Annotated[str, typer.Option(help="Numbers of GPUs, separated by commas.")] = "1,2,8,16,64",
    tokens: Annotated[int, typer.Option(help="Tokens of a micro-batch on each GPU.")] = 8192,
    trials: Annotated[int, typer.Option(help="Prompts of 100 tokens that are tuned together.")] = 64,
    out: Out = Path("docs/benchmarks/ranks.json"),
) -> None:
    """Bytes that a step gathers and sends on 2 ranks here, and modelled for up to 64 GPUs and 70 B parameters."""
    from pipeline.lab.benchmark.cost import costs_of, measure_traffic, save_costs
    from pipeline.lab.benchmark.tables import cost_table

    traffic = measure_traffic(_bench(data, tasks.split(","), model, length, batch, 3, 2, 2))
    console.print(
        f"{model} on 2 ranks here: a rank receives {traffic.gathered / 1e6:.1f} MB of weights a step, "
        f"{traffic.walks:.2f} times what the model gives for a micro-batch, and sums {traffic.reduced / 1e6:.2f} MB"
    )
    costs = costs_of(shapes.split(","), [int(count) for count in counts.split(",")], tokens, trials, 100)
    console.print(cost_table(costs, tokens))
    save_costs(out, traffic, tokens, trials, costs)
    console.print(f"Written to {out}.")


@app.command()
def quality(
    data: Data,
    tasks: Tasks = WITH_DEV,
    model: Model = "smollm2-135m",
    length: Annotated[int, typer.Option(help="Prompt length.")] = 20,
    batch: Batch = 8,
    steps: Steps = 100,
    seeds: Annotated[int, typer.Option(help="Trials of every task.")] = 3,
    rate: Annotated[float, typer.Option(help="Adafactor's rate.")] = 0.03,
    dev_rows: Annotated[int, typer.Option(help="Dev rows of every task, at most.")] = 500,
    ranks: Ranks = 2,
    threads: Threads = 2,
    peer: Annotated[bool, typer.Option(help="Also PEFT and Trainer, one trial after another.")] = False,
    out: Out = Path("docs/benchmarks/quality.json"),
) -> None:
    """Dev accuracy at equal steps with int8 products, only forward ones, none, float weights, and (--peer) PEFT."""
    from pipeline.lab.benchmark.quality import compare_quality
    from pipeline.lab.benchmark.tables import quality_table

    work = {"rate": rate, "seeds": seeds, "rows": 100_000, "dev_rows": dev_rows}
    bench = _bench(data, tasks.split(","), model, length, batch, steps, ranks, threads, **work)
    result = compare_quality(bench, peer, out)
    console.print(quality_table(result))
    console.print(f"Written to {out}.")


@app.command()
def corpus(
    data: Data,
    model: Model = "smollm2-135m",
    gigabytes: Annotated[float, typer.Option(help="The largest corpus.")] = 1.0,
    rounds: Rounds = 3,
    speed_megabytes: Annotated[str, typer.Option(help="Parquet of a round, sizes separated by commas.")] = "40,200",
    scratch: Annotated[Path | None, typer.Option(help="Where corpora are generated, and deleted afterwards.")] = None,
    out: Out = Path("docs/benchmarks/corpus.json"),
) -> None:
    """Tokenising with Ray Data: rate against the bare fast tokenizer, memory by size, an unchanged second night."""
    from pipeline.lab.benchmark.corpus import measure_corpus, save_figures
    from pipeline.lab.benchmark.tables import corpus_tables

    sizes = [size for size in (10.0, 100.0, 1000.0) if size < gigabytes * 1000] + [gigabytes * 1000]
    speed_sizes = [float(size) for size in speed_megabytes.split(",")]
    figures = measure_corpus(data, model, sizes, rounds, speed_sizes, scratch)
    for table in corpus_tables(figures):
        console.print(table)
    save_figures(out, figures)
    console.print(f"Written to {out}.")


@app.command()
def lake(
    data: Data,
    gigabytes: Annotated[float, typer.Option(help="Parquet of the table.")] = 1.0,
    rounds: Rounds = 3,
    scratch: Annotated[Path | None, typer.Option(help="Where the table is generated, and deleted afterwards.")] = None,
    out: Out = Path("docs/benchmarks/lake.json"),
) -> None:
    """Reading a Delta table, and with a filter, against the same files as plain Parquet."""
    from dataclasses import asdict

    from pipeline.lab.benchmark.lake import measure_tables, rate_table
    from pipeline.lab.benchmark.side_by_side import write_figures

    rates = measure_tables(data, gigabytes, rounds, scratch)
    console.print(rate_table(rates))
    write_figures(out, {"rates": [asdict(rate) for rate in rates]})
    console.print(f"Written to {out}.")


@app.command()
def grown(
    data: Data,
    model: Model = "smollm2-135m",
    megabytes: Annotated[float, typer.Option(help="Parquet of the first night.")] = 400.0,
    files: Annotated[int, typer.Option(help="Files of the first night; the next one has one more.")] = 100,
    scratch: Annotated[Path | None, typer.Option(help="Where corpora are generated, and deleted afterwards.")] = None,
    out: Out = Path("docs/benchmarks/grown.json"),
) -> None:
    """A night with one new file against the first night, and against the same corpus built anew: same rows."""
    from pipeline.lab.benchmark.grown_corpus import measure_grown, save_grown
    from pipeline.lab.benchmark.tables import grown_table

    figures = measure_grown(data, model, megabytes, files, scratch)
    console.print(grown_table(figures))
    save_grown(out, figures)
    console.print(f"Written to {out}.")


@app.command()
def memory(
    megabytes: Annotated[str, typer.Option(help="Tokens of a split, sizes separated by commas.")] = "10,100,1000,2000",
    steps: Annotated[int, typer.Option(help="Batches of 64 rows.")] = 200,
    in_memory: Annotated[bool, typer.Option(help="Also read into memory whole, as ranks did once.")] = True,
    scratch: Annotated[Path | None, typer.Option(help="Where splits are generated, and deleted afterwards.")] = None,
    out: Out = Path("docs/benchmarks/memory.json"),
) -> None:
    """What a rank holds of a split of random tokens, and how long it takes to read a step's rows."""
    from pipeline.lab.benchmark.split_memory import measure_split_memory, save_split_memory
    from pipeline.lab.benchmark.tables import memory_of_splits

    figures = measure_split_memory([float(size) for size in megabytes.split(",")], steps, in_memory, scratch)
    console.print(memory_of_splits(figures))
    save_split_memory(out, figures)
    console.print(f"Written to {out}.")


@app.command("tasks")
def many_tasks(
    counts: Annotated[str, typer.Option(help="Numbers of tasks, separated by commas.")] = "250,500,1000",
    rows: Annotated[int, typer.Option(help="Rows of every task.")] = 200,
    steps: Annotated[int, typer.Option(help="Steps of every task.")] = 4,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 4,
    live: Annotated[int, typer.Option(help="Trials at the same time.")] = 64,
    scratch: Annotated[Path | None, typer.Option(help="Where projects are generated, and deleted afterwards.")] = None,
    out: Out = Path("docs/benchmarks/tasks.json"),
) -> None:
    """Two nights of many small tasks on a tiny model, stage by stage."""
    from pipeline.lab.benchmark.many_tasks import TasksOptions, measure_many_tasks, save_many_tasks
    from pipeline.lab.benchmark.tables import many_tasks_table

    options = TasksOptions(rows, steps, eval_every, live)
    figures = measure_many_tasks([int(count) for count in counts.split(",")], options, scratch)
    console.print(many_tasks_table(figures))
    save_many_tasks(out, figures, options)
    console.print(f"Written to {out}.")


@app.command()
def sweep(
    data: Data,
    tasks: Tasks = "cr,mpqa",
    model: Model = "smollm2-135m",
    lengths: Annotated[str, typer.Option(help="Prompt lengths, separated by commas.")] = "8,20",
    rates: Annotated[str, typer.Option(help="Adafactor's rates, separated by commas.")] = "0.001,0.003,0.01,0.03",
    seeds: Annotated[int, typer.Option(help="Seeds; with two tasks, lengths and rates as they are, 64 trials.")] = 4,
    batch: Annotated[int, typer.Option(help="Rows a step of every trial.")] = 2,
    steps: Annotated[int, typer.Option(help="Steps of every trial.")] = 12,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.")] = 3,
    dev_rows: Annotated[int, typer.Option(help="Dev rows of every task, at most.")] = 16,
    factor: Annotated[int, typer.Option(help="Halving lets one trial in so many go on.")] = 3,
    sample: Annotated[int, typer.Option(min=2, help="Trials that run alone; their time is scaled to all.")] = 8,
    rounds: Rounds = 1,
    ranks: Ranks = 2,
    threads: Threads = 2,
    products: Annotated[str, typer.Option(help="auto, int8 or exact.")] = "auto",
    out: Out = Path("docs/benchmarks/sweep.json"),
) -> None:
    """A sweep's wall time: together, with and without halving, against one after another (a sample, scaled)."""
    from pipeline.lab.benchmark.sweep import SweepOptions, compare_sweeps
    from pipeline.lab.benchmark.tables import sweep_distances, sweep_table

    options = SweepOptions(
        model=model,
        data=data,
        tasks=tasks.split(","),
        lengths=[int(length) for length in lengths.split(",")],
        rates=[float(rate) for rate in rates.split(",")],
        seeds=seeds,
        batch_size=batch,
        steps=steps,
        eval_every=eval_every,
        dev_rows=dev_rows,
        factor=factor,
        sample=sample,
        rounds=rounds,
        ranks=ranks,
        threads=threads,
        products=products,
    )
    result = compare_sweeps(options, out)
    console.print(sweep_table(result))
    console.print(sweep_distances(result))
    console.print(f"Halving saved {result.steps_saved:.0%} of the steps.")
    console.print(f"Written to {out}.")


@app.command()
def fit(
    shapes: Annotated[str, typer.Option(help="Published shapes, separated by commas.")] = "t5-xl,llama-3b",
    layers: Annotated[int | None, typer.Option(help="Fewer layers than the shapes have.")] = None,
    folder: Annotated[Path, typer.Option(help="Where checkpoints are written, and used if there.")] = Path(
        "runs/large"
    ),
    keep: Annotated[
        bool, typer.Option(help="Keep checkpoints that were written; otherwise only one is on disk at a time.")
    ] = False,
    prompts: Annotated[int, typer.Option(help="Prompts tuned together.")] = 4,
    length: Annotated[int, typer.Option(help="Prompt length.")] = 10,
    batch: Batch = 1,
    steps: Annotated[int, typer.Option(help="Steps of all prompts.")] = 3,
    offload_folder: Annotated[Path | None, typer.Option(help="Keep weights in files there.")] = None,
    ranks: Ranks = 2,
    threads: Threads = 2,
    out: Out = Path("docs/benchmarks/fit.json"),
) -> None:
    """Large models of random weights in int8: every rank's peak memory against its bound, and loading's speed."""
    from pipeline.lab.benchmark.fit import FitOptions, measure_fit, save_fits
    from pipeline.lab.benchmark.tables import fit_table

    offload = None if offload_folder is None else str(offload_folder)
    options = FitOptions(ranks, threads, prompts, length, batch, steps, offload)
    for shape in shapes.split(","):
        result = measure_fit(shape, layers, folder, options, keep)
        console.print(fit_table(result))
        save_fits(out, [result])
        console.print(f"Written to {out}.")


@app.command()
def gpu(
    device: Annotated[str, typer.Option(help="cuda; or cpu, where Triton's kernels are left out.")] = "cuda",
    sections: Annotated[str, typer.Option(help="Some sections, separated by commas; all by default.")] = "",
    minutes: Annotated[float, typer.Option(help="The command ends after so many, with what it has.")] = 8.5,
    data: Annotated[Path | None, typer.Option(help="As --data elsewhere; random tokens by default.")] = None,
    small: Annotated[bool, typer.Option(help="Tiny shapes, to try the command itself.")] = False,
    out: Out = Path("docs/benchmarks/gpu.json"),
) -> None:
    """Whether a GPU's results are right, and how fast it is, in one file; exits with 1 where something is wrong."""
    from pipeline.lab.benchmark.gpu import GpuOptions, measure_gpu

    options = GpuOptions(device, minutes, tuple(filter(None, sections.split(","))), data, small)
    right = measure_gpu(options, out, lambda line: console.print(line, markup=False))
    console.print(f"Written to {out}: {'all is right' if right else 'something is WRONG'}.")
    raise typer.Exit(0 if right else 1)


def _bench(
    data: Path,
    names: list[str],
    model: str,
    length: int,
    batch: int,
    steps: int,
    ranks: int,
    threads: int,
    **work: Any,
) -> "Bench":
    from pipeline.lab.benchmark.bench import open_bench
    from pipeline.lab.benchmark.work import WorkOptions

    return open_bench(model, data, names, WorkOptions(length, batch, **work), steps, ranks, threads)


def _run(
    name: str, sides: "Mapping[str, Callable[[], Side]]", rounds: int, out: Path, bench: "Bench | None" = None
) -> "SidesResult":
    from pipeline.lab.benchmark.peak import shares_of_peak
    from pipeline.lab.benchmark.side_by_side import compare_sides, save_results
    from pipeline.lab.benchmark.tables import comparison_table

    result = compare_sides(name, sides, rounds)
    facts = shares_of_peak(result, bench.config, bench.needed_tokens, bench.threads) if bench else {}
    console.print(comparison_table(result, facts.get("share_of_peak")))
    save_results(out, [result], **facts)
    console.print(f"Written to {out}.")
    return result


if __name__ == "__main__":
    try:
        app()
    except PromptBankError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        sys.exit(2)
