"""Results for people: tables, and one plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rich.table import Table

from pipeline.lab.benchmark.corpus import CorpusFigures
from pipeline.lab.benchmark.cost import StepCost
from pipeline.lab.benchmark.evaluation import EvaluationResult
from pipeline.lab.benchmark.fit import Fit
from pipeline.lab.benchmark.grown_corpus import GrownCorpus
from pipeline.lab.benchmark.many_tasks import ManyTasks
from pipeline.lab.benchmark.quality import Quality
from pipeline.lab.benchmark.side_by_side import SidesResult
from pipeline.lab.benchmark.split_memory import RankMemory
from pipeline.lab.benchmark.sweep import SweepResult


def comparison_table(result: SidesResult, shares: Mapping[str, float] | None = None) -> Table:
    """One row for each side."""
    first = next(iter(result.rates))
    table = Table(title=f"{result.name} ({result.device})", title_justify="left")
    columns = ["side", "text tokens/s", "s/step", "peak MiB", f"'{first}' is faster by", "losses apart"]
    for column in [*columns, *(["of int8 peak"] if shares else [])]:
        table.add_column(column)
    for side in result.rates:
        low, middle, high = result.ratios.get(side, (1.0, 1.0, 1.0))
        table.add_row(
            side,
            _joined(result.rates[side], "{:.0f}"),
            _joined(result.step_seconds[side], "{:.2f}"),
            _joined(result.peak_mib[side], "{:.0f}"),
            f"{middle:.2f} ({low:.2f} – {high:.2f})",
            f"{result.loss_difference[side]:.2%}" if side in result.loss_difference else "–",
            *([f"{shares[side]:.0%}"] if shares else []),
        )
    return table


def evaluation_table(result: EvaluationResult) -> Table:
    """One row for each kind of evaluation."""
    table = Table(title=f"evaluation ({result.device})", title_justify="left")
    for column in ["", *(f"{side}, s" for side in result.label_seconds), "ours is faster by", "answered alike"]:
        table.add_column(column)
    kinds = {
        f"labels of {result.rows} rows": (result.label_seconds, result.label_ratio, result.same_labels),
        f"{result.decoded_rows} answers of {result.tokens} tokens": (
            result.decode_seconds,
            result.decode_ratio,
            result.same_answers,
        ),
    }
    for name, (seconds, ratio, alike) in kinds.items():
        table.add_row(name, *(_joined(of, "{:.1f}") for of in seconds.values()), f"{ratio:.2f}", f"{alike:.1%}")
    return table


def shares_table(shares: Mapping[str, float]) -> Table:
    """The parts of a step, with the share of its time that each takes."""
    table = Table(title="where the time of a step goes", title_justify="left")
    table.add_column("part")
    table.add_column("share", justify="right")
    for part, share in shares.items():
        table.add_row(part, f"{share:.1%}")
    return table


def quality_table(sides: Mapping[str, Quality]) -> Table:
    """One row for each side: every task's mean over seeds, and its spread."""
    table = Table(title="dev accuracy, mean over seeds ± standard deviation", title_justify="left")
    table.add_column("side")
    tasks = list(next(iter(sides.values())).after)
    for column in [*tasks, "mean", "mean loss", "tuning, s"]:
        table.add_column(column)
    for side, quality in sides.items():
        cells = [f"{np.mean(quality.after[task]):.3f} ± {np.std(quality.after[task]):.3f}" for task in tasks]
        table.add_row(side, *cells, f"{quality.mean:.3f}", f"{quality.mean_loss:.3f}", f"{quality.seconds:.0f}")
    return table


def corpus_tables(figures: CorpusFigures) -> tuple[Table, Table]:
    """Two tables: rates against the bare tokenizer, and memory and seconds by corpus size."""
    speed = Table(title=f"tokenising on {figures.cores} cores ({figures.device})", title_justify="left")
    for column in ("texts", "tokens a text", "MB", "side", "k tokens/s", "ours / it", "by CPU time"):
        speed.add_column(column)
    for of in figures.speed:
        speed.add_row(of.texts, f"{of.tokens_a_text:.0f}", f"{of.megabytes:.0f}", "ours", _thousands(of.ours))
        for side, bare in (("bare", of.bare), ("bare, keeping as many words", of.keeping)):
            ratios = [f"{middle:.2f} ({low:.2f} – {high:.2f})" for low, middle, high in (bare.ratio, bare.cpu_ratio)]
            speed.add_row("", "", "", side, _thousands(bare.rates), *ratios)
    nights = Table(title="a task's corpus by size", title_justify="left")
    for column in ("MB", "rows", "driver, MiB", "greatest worker, MiB", "workers, MiB", "first night, s", "second, s"):
        nights.add_column(column)
    for night in figures.nights:
        memory = (night.driver_mib, night.worker_mib, night.workers_mib)
        seconds = f"{night.first_seconds:.1f}", f"{night.second_seconds:.1f}"
        nights.add_row(f"{night.megabytes:.0f}", f"{night.rows:,}", *map(str, memory), *seconds)
    return speed, nights


def grown_table(figures: GrownCorpus) -> Table:
    """One row for each night."""
    title = f"{figures.files} files, {figures.megabytes:.0f} MB, {figures.rows:,} rows ({figures.device})"
    table = Table(title=title, title_justify="left")
    for column in ("night", "seconds", "of the first"):
        table.add_column(column)
    nights = {
        "first": figures.first_seconds,
        "nothing changed": figures.unchanged_seconds,
        f"one file more, {figures.new_rows:,} rows": figures.grown_seconds,
        "one file less": figures.shrunk_seconds,
        "the grown corpus from nothing": figures.anew_seconds,
    }
    for night, seconds in nights.items():
        table.add_row(night, f"{seconds:.2f}", f"{seconds / figures.first_seconds:.1%}")
    return table


def memory_of_splits(figures: Sequence[RankMemory]) -> Table:
    """One row for each split and way to hold it."""
    table = Table(title="what a rank holds of a split, MiB of anonymous memory", title_justify="left")
    for column in ("tokens, MB", "rows", "way", "before", "opened", "after steps", "opening, s", "rows of a step, ms"):
        table.add_column(column)
    for of in figures:
        memory = f"{of.before:.0f}", f"{of.opened:.0f}", f"{of.stepped:.0f}"
        times = f"{of.opening_seconds:.2f}", f"{of.step_milliseconds:.2f}"
        table.add_row(f"{of.megabytes:.0f}", f"{of.rows:,}", of.way, *memory, *times)
    return table


def many_tasks_table(figures: Sequence[ManyTasks]) -> Table:
    """One row for each stage: its seconds, and how many times longer it takes with the most tasks than the fewest."""
    table = Table(title="many small tasks, seconds of each stage", title_justify="left")
    for column in ("stage", *(f"{run.tasks} tasks" for run in figures), "longer by"):
        table.add_column(column)
    stages = {"settings": [run.settings for run in figures], "plan": [run.plan for run in figures]}
    for night, of_run in (("first", [r.first for r in figures]), ("unchanged", [r.unchanged for r in figures])):
        stages |= {f"{night} night: {name}": [run[name] for run in of_run] for name in of_run[0]}
    stages |= {"corpora once more": [run.corpora for run in figures], "report": [run.report for run in figures]}
    for stage, seconds in stages.items():
        table.add_row(stage, *(f"{took:.2f}" for took in seconds), f"{seconds[-1] / max(seconds[0], 0.01):.1f}")
    return table


def sweep_table(result: SweepResult) -> Table:
    """One row for each side. Of the trials one after another, only a sample ran."""
    table = Table(title=f"a sweep of {result.trials} trials", title_justify="left")
    for column in ["side", "wall time, s", "faster by", "text tokens/s", "steps", "ends", "best dev accuracy"]:
        table.add_column(column)
    alone = f"one after another ({result.alone.trials} ran, time scaled to {result.trials})"
    sides = {
        "together": (result.together, result.together.seconds),
        "together, halving": (result.halving, result.halving.seconds),
        alone: (result.alone, result.alone_seconds),
    }
    for name, (side, seconds) in sides.items():
        low, middle, high = result.ratios.get(name, (1.0, 1.0, 1.0))
        table.add_row(
            name,
            _joined(seconds, "{:.0f}"),
            f"{middle:.2f} ({low:.2f} – {high:.2f})",
            f"{side.rate:.0f}",
            str(side.steps),
            ", ".join(f"{count} {status}" for status, count in side.ends.items()),
            ", ".join(f"{task} {value:.3f}" for task, value in side.best.items()),
        )
    return table


def sweep_distances(result: SweepResult) -> Table:
    """How far the sides' prompts are apart, which shows whether they tuned the same ones."""
    table = Table(title="at most apart, relative", title_justify="left")
    for column in ["sides", "rate", "prompts", "dev loss at the first evaluation", "dev loss at the last"]:
        table.add_column(column)
    sides = {"together, alone": result.alone_apart, "halving's survivors, together": result.survivors_apart}
    for name, of_rate in sides.items():
        for rate, apart in of_rate.items():
            figures = (apart.prompt, apart.first_loss, apart.last_loss)
            table.add_row(name, f"{rate:g}", *(f"{figure:.1e}" for figure in figures))
    return table


def cost_table(costs: Mapping[str, Sequence[StepCost]], tokens: int) -> Table:
    """The cost of a step on a rank, by shape and number of ranks."""
    table = Table(title=f"a step of one micro-batch of {tokens:,} tokens on each rank", title_justify="left")
    for column in ["model", "ranks", "gathered, GB", "all-reduced, MB", "gathers, s", "products, s", "gathers' share"]:
        table.add_column(column)
    for shape, row in costs.items():
        for cost in row:
            sizes = f"{cost.gathered / 1e9:.1f}", f"{cost.reduced / 1e6:.1f}"
            seconds = f"{cost.gather_seconds:.3f}", f"{cost.compute_seconds:.3f}"
            table.add_row(shape, str(cost.ranks), *sizes, *seconds, f"{cost.share:.0%}")
    return table


def fit_table(fit: Fit) -> Table:
    """One row for each rank, in GB; the title has the bound and its parts."""

    def gb(size: float) -> str:
        return f"{size / 1e9:.2f}"

    size = fit.size
    title = (
        f"{fit.shape}, {size.parameters / 1e9:.2f} B parameters ({fit.device})\n"
        f"bound: {gb(size.int8_bytes)} int8 / {fit.options.ranks} ranks + {gb(size.layer_bytes)} layer + 1 GiB = "
        f"{gb(fit.bound)} GB: {'holds' if fit.holds else 'DOES NOT HOLD'}\n"
        f"loading {fit.load_rate / 1e9:.2f} GB/s, plain reading {' and '.join(gb(rate) for rate in fit.plain_rates)} "
        f"GB/s ({'from disk' if fit.cold else 'from the page cache'}); "
        f"ranks' losses {'agree' if fit.ranks_agree else 'DIFFER'}"
    )
    table = Table(title=title, title_justify="left")
    columns = ["rank", "before", "int8 held", "loading: peak", "anonymous", "training: peak", "anonymous", "files"]
    for column in [*columns, "loading, s", "steps, s"]:
        table.add_column(column)
    for place, rank in enumerate(fit.ranks):
        loading, training = rank.loading, rank.training
        sizes = [
            rank.before.total,
            rank.held["int8"],
            loading.total,
            loading.own,
            training.total,
            training.own,
            training.file,
        ]
        steps = " ".join(f"{seconds:.1f}" for seconds in rank.step_seconds)
        table.add_row(str(place), *map(gb, sizes), f"{rank.load_seconds:.1f}", steps)
    return table


def plot_growth(counts: Sequence[int], result: SidesResult, path: Path) -> None:
    """Tokens a second and memory by the number of trials in one run."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (speed, memory) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, values, label in (
        (speed, result.rates, "text tokens a second"),
        (memory, result.peak_mib, "peak memory of all ranks, MiB"),
    ):
        axis.plot(counts, [max(values[side]) for side in values], marker="o", color="#0072b2")
        axis.set_xscale("log", base=4)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.set_ylim(bottom=0)
        axis.set_xlabel("trials in one run")
        axis.set_title(label, fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    pyplot.close(figure)


def _joined(values: Sequence[float], form: str) -> str:
    return " ".join(form.format(value) for value in values)


def _thousands(rates: Sequence[float]) -> str:
    return _joined([rate / 1000 for rate in rates], "{:.0f}")
