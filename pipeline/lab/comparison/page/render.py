"""Make the page of a comparison from its results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import yaml
from jinja2 import ChoiceLoader, PackageLoader

from pipeline.lab.comparison.page import heat, plots
from pipeline.lab.comparison.results import Mean, MethodRow, Results, ShiftRow, by_method, with_spread
from pipeline.reporting import words
from pipeline.reporting.html.pages import TEMPLATES, environment, own_texts

OWN_TEMPLATES = ChoiceLoader([PackageLoader("pipeline.lab.comparison.page", "templates"), TEMPLATES])
_FILTERS = (words.figure, words.signed, words.duration, words.size, words.millions, words.moment, words.counted)


@dataclass(frozen=True)
class MethodLine:
    """A method's best choices, task by task, and what they cost."""

    method: str
    cells: Sequence[MethodRow | None]
    """In the order of the tasks."""
    best: Sequence[bool]
    """Whether no other method has a better mean."""
    mean: float | None
    """Mean over the tasks, if the method has all of them and they share a metric."""
    trained_parameters: str
    stored_bytes: int
    rank_seconds: float
    peak_bytes: int | None
    prompt_tokens: str


def render_comparison(results: Results) -> str:
    """The page as HTML that needs no other file. All texts are escaped, and it has no script."""
    page = environment(OWN_TEMPLATES)
    page.filters |= {word.__name__: word for word in _FILTERS} | {
        "spread": with_spread,
        "seeds": seeds,
        "share": percentage,
    }
    metrics = {facts.name: facts.metric for facts in results.tasks}
    return page.get_template("comparison.html.jinja").render(
        found=results,
        lines=method_lines(results),
        method_class=plots.method_class,
        method_plots=[plots.method_plot(results, task) for task in metrics],
        panels=[(panel, [plots.panel_plot(panel, task, results) for task in metrics]) for panel in results.panels],
        ensemble_plots=[
            plots.ensemble_plot(row, metrics[row.task]) for row in results.ensembles if row.split == "test"
        ],
        transfer_map=heat.transfer_map(results.transfer, metrics),
        likeness_maps=[
            (
                heat.similarity_map(results.likeness, lambda pair: pair.mean_token, "of their mean tokens"),
                "of the mean token",
            ),
            (
                heat.similarity_map(results.likeness, lambda pair: pair.token_pairs, "mean over all pairs of tokens"),
                "mean over all pairs of tokens",
            ),
        ],
        shifts=shift_groups(results.shifts),
        shift_plots=[
            plots.shift_plot([row for row in results.shifts if row.trained_on == source], on, metrics[on])
            for source, on in dict.fromkeys((row.trained_on, row.on) for row in results.shifts)
        ],
        settings=yaml.safe_dump(dict(results.settings), sort_keys=False, allow_unicode=True),
        **own_texts(OWN_TEMPLATES, ["night.css", "comparison.css"], []),
    )


def method_lines(results: Results) -> list[MethodLine]:
    tasks = [facts.name for facts in results.tasks]
    table = {method: {row.task: row for row in rows} for method, rows in by_method(results.rows).items()}
    one_metric = len({facts.metric for facts in results.tasks}) == 1
    lines = []
    for method, of_task in table.items():
        cells, own = [of_task.get(task) for task in tasks], list(of_task.values())
        means = [shown.mean for cell in cells if cell is not None and (shown := cell.shown) is not None]
        lines.append(
            MethodLine(
                method=method,
                cells=cells,
                best=[_is_best(method, task, table, results.metric(task)) for task in tasks],
                mean=sum(means) / len(means) if one_metric and len(means) == len(tasks) else None,
                trained_parameters=_range([row.trained_parameters for row in own]),
                stored_bytes=max(row.stored_bytes for row in own),
                rank_seconds=sum(row.rank_seconds for row in own) / len(own),
                peak_bytes=max((row.peak_bytes for row in own if row.peak_bytes is not None), default=None),
                prompt_tokens=_range([row.prompt_tokens for row in own]),
            )
        )
    return lines


def shift_groups(rows: Sequence[ShiftRow]) -> dict[str, tuple[list[str], dict[str, dict[str, ShiftRow]]]]:
    """By the task trained on: the tasks tested on, and each method's rows by task."""
    found: dict[str, tuple[list[str], dict[str, dict[str, ShiftRow]]]] = {}
    for row in rows:
        tasks, methods = found.setdefault(row.trained_on, ([], {}))
        if row.on not in tasks:
            tasks.append(row.on)
        methods.setdefault(row.method, {})[row.on] = row
    return found


def seeds(mean: Mean | None) -> str:
    """`seeds 0, 1, 2`; `no seed` where nothing is random."""
    known = [str(seed) for seed in mean.seeds if seed is not None] if mean is not None else []
    return f"seed{'s' * (len(known) > 1)} {', '.join(known)}" if known else "no seed"


def percentage(value: float, whole: float) -> str:
    """`0.006 %`"""
    return f"{100 * value / whole:.2g} %" if whole else words.ABSENT


def _is_best(method: str, task: str, table: Mapping[str, Mapping[str, MethodRow]], metric: str) -> bool:
    shown = {
        other: mean.mean * (-1 if metric == "loss" else 1)
        for other, of_task in table.items()
        if task in of_task
        and not of_task[task].seen  # only figures over the same rows can be compared
        and (mean := of_task[task].shown) is not None
    }
    return method in shown and shown[method] == max(shown.values())


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
