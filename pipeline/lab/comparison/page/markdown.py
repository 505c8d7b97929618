"""The tables of a comparison as Markdown, for documentation."""

from collections.abc import Iterable, Sequence

from pipeline.lab.comparison.page.render import MethodLine, method_lines, seeds, shift_groups
from pipeline.lab.comparison.results import MethodRow, Results, TransferCell, with_spread
from pipeline.reporting.words import ABSENT, duration, figure, millions, size

_UNSEEN = "Rows that the task trained on shares with another task are left out; brackets show how many are left."


def to_markdown(results: Results) -> str:
    lines = method_lines(results)
    parts = [*_head(results), *_methods(results, lines), *_of_each_task(results), *_between_tasks(results)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(results: Results) -> list[str]:
    return [
        f"# Comparison {results.run}",
        f"{results.model} ({millions(results.parameters)} parameters), {results.ranks} rank(s), {results.device}. "
        "Choices by the mean dev metric over seeds, figures on test (dev, where a task has none): mean ± standard "
        "deviation over seeds.",
    ]


def _methods(results: Results, lines: Sequence[MethodLine]) -> list[str]:
    tasks = [facts.name for facts in results.tasks]
    metric = [[line.method, *(_shown(cell) for cell in line.cells), figure(line.mean)] for line in lines]
    cost = [
        [
            line.method,
            line.trained_parameters,
            size(line.stored_bytes),
            line.prompt_tokens,
            duration(line.rank_seconds),
            size(line.peak_bytes) if line.peak_bytes else ABSENT,
        ]
        for line in lines
    ]
    chosen = [
        [line.method, cell.task, cell.written_choice, seeds(cell.shown)]
        for line in lines
        for cell in line.cells
        if cell is not None
    ]
    heads = ["trained parameters", "to store a task", "tokens before a row", "training, rank-seconds", "most memory"]
    return [
        "## Methods",
        table(["method", *tasks, "mean"], metric),
        "## What it costs",
        table(["method", *heads], cost),
        "## What was chosen",
        table(["method", "task", "choice by dev", "seeds"], chosen),
    ]


def _of_each_task(results: Results) -> list[str]:
    parts: list[str] = []
    for panel in results.panels:
        rows = [
            [p.task, str(p.value), p.written_choice, with_spread(p.dev), with_spread(p.test), seeds(p.dev)]
            for p in panel.points
        ]
        parts += [f"## {panel.key}", table(["task", panel.key, "best choice there", "dev", "test", "seeds"], rows)]
    if results.ensembles:
        rows = [
            [
                r.task,
                r.split,
                with_spread(r.members),
                figure(r.best),
                figure(r.average),
                figure(r.majority),
                seeds(r.members),
            ]
            for r in results.ensembles
        ]
        heads = ["task", "split", "one seed", "best on dev", "average", "majority vote", "seeds"]
        parts += ["## Ensembles", table(heads, rows)]
    return parts


def _between_tasks(results: Results) -> list[str]:
    parts: list[str] = []
    if results.transfer:
        tasks = [facts.name for facts in results.tasks]
        cells = {(cell.prompt_of, cell.on): cell for cell in results.transfer}
        rows = []
        for prompt in dict.fromkeys(cell.prompt_of for cell in results.transfer):
            own = [cells.get((prompt, on)) for on in tasks]
            rows.append([prompt, *(_cell(cell) for cell in own)])
        parts += ["## Every prompt on every task", table(["prompt of", *tasks], rows), _UNSEEN]
    if results.starts:
        rows = [
            [r.task, r.source, with_spread(r.plain), with_spread(r.started), f"{r.rows}", f"{r.seen}"]
            for r in results.starts
        ]
        heads = ["task", "started from", "without", "with", "rows", "seen by the source"]
        parts += ["## Started from other tasks' prompts", table(heads, rows)]
    if results.likeness:
        rows = [[p.a, p.b, f"{p.mean_token:.3f}", f"{p.token_pairs:.3f}"] for p in results.likeness]
        parts += ["## Cosine similarity of prompts", table(["task", "task", "mean token", "all pairs"], rows)]
    for source, (tasks, methods) in shift_groups(results.shifts).items():
        rows = [[m, *(with_spread(on[t].test) if t in on else ABSENT for t in tasks)] for m, on in methods.items()]
        counted = {task: row for on in methods.values() for task, row in on.items()}
        rows.append(["rows", *(f"{counted[task].rows}" for task in tasks)])
        rows.append(["seen in training", *(f"{counted[task].seen}" for task in tasks)])
        parts += [f"## Trained on {source}", table(["method", *tasks], rows), _UNSEEN]
    return parts


def _shown(row: MethodRow | None) -> str:
    if row is None:
        return ABSENT
    return with_spread(row.shown) + (f" ({row.seen} rows left out)" if row.seen else "")


def _cell(cell: TransferCell | None) -> str:
    if cell is None:
        return ABSENT
    return f"{figure(cell.value)} ({cell.rows})" if cell.seen else figure(cell.value)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
