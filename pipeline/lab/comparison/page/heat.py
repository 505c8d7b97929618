"""Heat maps over pairs of tasks."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.lab.comparison.page.drawing import Cell, Drawing, Label
from pipeline.lab.comparison.results import PromptSimilarity, TransferCell
from pipeline.reporting.words import counted, figure

_CELL_WIDTH, _CELL_HEIGHT, _LEFT, _TOP = 62, 30, 92, 44
_FULL = 0.9
"""The strongest cell's strength."""
_LIGHT_TEXT_FROM = 0.6


@dataclass(frozen=True)
class HeatValue:
    kind: str
    strength: float
    text: str
    tooltip: str


def transfer_map(cells: Sequence[TransferCell], metrics: Mapping[str, str]) -> Drawing | None:
    """Prompts in rows and tasks in columns. Each column has its own scale, since metrics of tasks differ."""
    of_pair, tasks = {(cell.prompt_of, cell.on): cell for cell in cells}, list(metrics)
    ranges: dict[str, tuple[float, float]] = {}
    for on in tasks:
        column = [cell.value for cell in cells if cell.on == on]
        if column:
            ranges[on] = min(column), max(column)

    def value(row: str, on: str) -> HeatValue | None:
        cell = of_pair.get((row, on))
        if cell is None:
            return None
        tooltip = f"prompt of {row} on {on}: {metrics[on]} {figure(cell.value)}, loss {figure(cell.loss)}"
        tooltip += f"; {counted(cell.rows, 'row')}, {cell.seen} seen in training left out" if cell.seen else ""
        tooltip += "" if cell.same_labels else "; the tasks' labels differ"
        low, high = ranges[on]
        place = (cell.value - low) / (high - low) if high > low else 1.0
        share = 1 - place if metrics[on] == "loss" else place
        return HeatValue("more", _FULL * share, figure(cell.value), tooltip)

    rows = [task for task in tasks if any(cell.prompt_of == task for cell in cells)]
    title = "The metric of every task's prompt (rows) on every task's rows (columns)"
    return _map(title, rows, tasks, value) if rows else None


def similarity_map(
    pairs: Sequence[PromptSimilarity], of: Callable[[PromptSimilarity], float], what: str
) -> Drawing | None:
    """Blue where prompts point the same way, orange where they point apart."""
    tasks = list(dict.fromkeys(task for pair in pairs for task in (pair.a, pair.b)))
    known: Mapping[frozenset[str], float] = {frozenset((pair.a, pair.b)): of(pair) for pair in pairs}
    most = max((abs(value) for value in known.values()), default=0.0) or 1.0

    def value(row: str, column: str) -> HeatValue | None:
        if row == column:
            return HeatValue("same", 0.0, "", f"{row} itself")
        found = known[frozenset((row, column))]
        kind = "more" if found >= 0 else "less"
        return HeatValue(
            kind, _FULL * abs(found) / most, f"{found:.2f}".replace("-", "−"), f"{row} and {column}: {found:.3f}"
        )

    return _map(f"Cosine similarity of prompts, {what}", tasks, tasks, value) if tasks else None


def _map(
    title: str, rows: Sequence[str], columns: Sequence[str], value: Callable[[str, str], HeatValue | None]
) -> Drawing:
    cells, labels = [], []
    for j, column in enumerate(columns):
        labels.append(Label(_LEFT + _CELL_WIDTH * (j + 0.5), _TOP - 10, _cut(column, 10), "middle", "name"))
    for i, row in enumerate(rows):
        y = _TOP + _CELL_HEIGHT * i
        labels.append(Label(_LEFT - 8, y + _CELL_HEIGHT / 2 + 4, _cut(row, 13), "end", "name"))
        for j, column in enumerate(columns):
            shown = value(row, column)
            if shown is None:
                continue
            x = _LEFT + _CELL_WIDTH * j
            cells.append(Cell(x, y, _CELL_WIDTH - 2, _CELL_HEIGHT - 2, shown.kind, shown.strength, shown.tooltip))
            kind = "value light" if shown.strength >= _LIGHT_TEXT_FROM else f"value {shown.kind}"
            middle = x + _CELL_WIDTH / 2 - 1, y + _CELL_HEIGHT / 2 + 3
            labels.append(Label(*middle, shown.text, "middle", kind))
    width, height = _LEFT + _CELL_WIDTH * len(columns) + 6, _TOP + _CELL_HEIGHT * len(rows) + 6
    return Drawing(title, width, height, labels=labels, cells=cells)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
