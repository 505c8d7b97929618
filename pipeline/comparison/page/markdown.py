"""The tables of a comparison as Markdown, for documentation."""

from collections.abc import Iterable, Sequence

from pipeline.comparison.page.render import MethodLine, method_lines, seeds, shift_groups, spread
from pipeline.comparison.results import Results, TransferCell
from pipeline.reporting.words import ABSENT, duration, figure, millions, size


def to_markdown(results: Results) -> str:
    lines = method_lines(results)
    return "\n\n".join(filter(None, [*_head(results), *_methods(results, lines), *_sections(results)])) + "\n"


def _head(results: Results) -> list[str]:
    return [
        f"# Comparison {results.run}",
        f"{results.model} ({millions(results.parameters)} parameters), {results.ranks} rank(s), {results.device}. "
        "Choices by the mean dev metric over seeds, figures on test (dev, where a task has none): mean ± standard "
        "deviation over seeds.",
    ]


def _methods(results: Results, lines: Sequence[MethodLine]) -> list[str]:
    tasks = [facts.name for facts in results.tasks]
    metric = [
        [line.method, *(spread((c.test or c.dev) if c else None) for c in line.cells), figure(line.mean)]
        for line in lines
    ]
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
        [line.method, cell.task, cell.written_choice, seeds(cell.test or cell.dev)]
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


def _sections(results: Results) -> list[str]:
    parts: list[str] = []
    for panel in results.panels:
        rows = [
            [p.task, str(p.value), p.written_choice, spread(p.dev), spread(p.test), seeds(p.dev)] for p in panel.points
        ]
        parts += [f"## {panel.key}", table(["task", panel.key, "best choice there", "dev", "test", "seeds"], rows)]
    if results.ensembles:
        rows = [
            [
                r.task,
                r.split,
                spread(r.members),
                figure(r.best),
                figure(r.average),
                figure(r.majority),
                seeds(r.members),
            ]
            for r in results.ensembles
        ]
        heads = ["task", "split", "one seed", "best on dev", "average", "majority vote", "seeds"]
        parts += ["## Ensembles", table(heads, rows)]
    if results.transfer:
        tasks = [facts.name for facts in results.tasks]
        cells = {(cell.prompt_of, cell.on): cell for cell in results.transfer}
        rows = []
        for prompt in dict.fromkeys(cell.prompt_of for cell in results.transfer):
            own = [cells.get((prompt, on)) for on in tasks]
            rows.append([prompt, *(_cell(cell) for cell in own)])
        note = "Where the two tasks' labels differ, the loss in nats a target token."
        parts += ["## Every prompt on every task", table(["prompt of", *tasks], rows), note]
    if results.likeness:
        rows = [[p.a, p.b, f"{p.mean_token:.3f}", f"{p.token_pairs:.3f}"] for p in results.likeness]
        parts += ["## Cosine similarity of prompts", table(["task", "task", "mean token", "all pairs"], rows)]
    for source, (tasks, methods) in shift_groups(results.shifts).items():
        rows = [[m, *(spread(on[t].test) if t in on else ABSENT for t in tasks)] for m, on in methods.items()]
        parts += [f"## Trained on {source}", table(["method", *tasks], rows)]
    return parts


def _cell(cell: TransferCell | None) -> str:
    if cell is None:
        return ABSENT
    return figure(cell.value) if cell.same_labels else f"loss {figure(cell.loss)}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
