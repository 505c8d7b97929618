"""The results of a comparison as plain values: `results.json`, from which its pages are made.

Test figures and choices come together only here, after the choices were made.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pipeline.errors import StorageError
from pipeline.reporting.events import finite
from pipeline.reporting.words import ABSENT, figure
from pipeline.sealed_files import DamagedError, open_json, sealed_json
from pipeline.whole_files import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class CandidateRow:
    """One candidate: a method on a task, with one choice and one seed."""

    name: str
    method: str
    task: str
    choice: Mapping[str, Any]
    written_choice: str
    seed: int | None
    """None where there is no chance in it."""
    chosen: bool
    """Whether its choice is the method's best on the task, by the mean dev metric."""
    dev: float | None
    dev_loss: float | None
    test: float | None
    test_loss: float | None
    """Nats a target token."""
    failed: str | None
    trained_parameters: int
    stored_bytes: int
    rank_seconds: float
    peak_bytes: int | None
    prompt_tokens: int


@dataclass(frozen=True)
class Mean:
    """A figure over the seeds of one choice."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None of a single seed."""
    seeds: tuple[int | None, ...]
    values: tuple[float, ...] = ()
    """The figure of each seed."""

    @property
    def each(self) -> list[tuple[int | None, float]]:
        """(seed, its figure)"""
        return list(zip(self.seeds, self.values, strict=False))


@dataclass(frozen=True)
class MethodRow:
    """A method with one choice on a task, over its seeds."""

    method: str
    task: str
    choice: Mapping[str, Any]
    written_choice: str
    chosen: bool
    dev: Mean | None
    """None where every seed failed."""
    test: Mean | None
    """None where every seed failed or the task has no test split."""
    seen: int
    """Test rows that do not count, because a task that this one started from was trained on them."""
    trained_parameters: int
    stored_bytes: int
    rank_seconds: float
    """Mean over seeds."""
    peak_bytes: int | None
    prompt_tokens: int
    failed: int
    """Seeds that failed."""

    @property
    def shown(self) -> Mean | None:
        """The test figure; dev's where the task has no test split; None where every test row was seen in training."""
        return self.test if self.test is not None or self.seen else self.dev


@dataclass(frozen=True)
class EnsembleRow:
    """The seeds of a task's best choice answering together, as an ensemble."""

    task: str
    split: str
    seeds: tuple[int | None, ...]
    members: Mean
    """The seeds, each alone."""
    best: float
    """The figure of the seed that is best on dev."""
    average: float | None
    """With averaged label probabilities; None where answers are texts."""
    majority: float | None


@dataclass(frozen=True)
class TransferCell:
    """A task's best prompt on another task's test rows (dev rows where it has none)."""

    prompt_of: str
    seed: int
    on: str
    split: str
    value: float
    loss: float
    same_labels: bool
    rows: int
    """That count."""
    seen: int
    """That do not, because the prompt's task was trained on them."""


@dataclass(frozen=True)
class PromptSimilarity:
    """Cosine similarity of two tasks' best prompts: of the mean over their tokens, and the mean over all pairs."""

    a: str
    b: str
    mean_token: float
    token_pairs: float


@dataclass(frozen=True)
class ShiftRow:
    """A candidate that was trained on one task, on the test rows of another."""

    method: str
    trained_on: str
    on: str
    written_choice: str
    test: Mean
    rows: int
    """That count."""
    seen: int
    """That do not, because they are among the rows trained on."""


@dataclass(frozen=True)
class StartRow:
    """Prompts that started from other tasks' prompts, and the task's best choice without that, on the same rows."""

    task: str
    source: str
    plain: Mean
    started: Mean
    rows: int
    """That count."""
    seen: int
    """That do not, because the source was trained on them."""


@dataclass(frozen=True)
class PanelPoint:
    """The test metric at one value of a swept key, with the best of the other keys by mean dev metric."""

    task: str
    value: Any
    written_choice: str
    dev: Mean
    test: Mean | None


@dataclass(frozen=True)
class Panel:
    key: str
    points: tuple[PanelPoint, ...]


@dataclass(frozen=True)
class TaskFacts:
    name: str
    metric: str
    labels: tuple[str, ...] | None
    rows: Mapping[str, int]
    """Usable rows by split."""
    answered: Mapping[str, int]
    """Rows of dev and test that the figures are computed on."""
    repeated: int = 0
    """Answered test rows that the task's own train or dev split has, too. They count: the user made the splits."""


@dataclass(frozen=True)
class Results:
    run: str
    model: str
    weights: str
    backbone: str
    parameters: int
    ranks: int
    device: str
    started: float
    ended: float
    """Unix seconds, of the attempt that finished."""
    tasks: tuple[TaskFacts, ...]
    numbers: tuple[CandidateRow, ...]
    rows: tuple[MethodRow, ...]
    ensembles: tuple[EnsembleRow, ...] = ()
    transfer: tuple[TransferCell, ...] = ()
    likeness: tuple[PromptSimilarity, ...] = ()
    starts: tuple[StartRow, ...] = ()
    shifts: tuple[ShiftRow, ...] = ()
    panels: tuple[Panel, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Tasks that could not be used, and why."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    def metric(self, task: str) -> str:
        return next(facts.metric for facts in self.tasks if facts.name == task)


def with_spread(mean: Mean | None) -> str:
    """`0.871 ± 0.012`"""
    if mean is None:
        return ABSENT
    return figure(mean.mean) + ("" if mean.deviation is None else f" ± {figure(mean.deviation)}")


def write_results(path: Path, results: Results) -> None:
    """Raises: StorageError."""
    plain = {"format": FORMAT, **finite(asdict(results))}
    write_atomically(path, sealed_json(plain))


def read_results(path: Path) -> Mapping[str, Any]:
    """The plain values that `write_results` wrote. Raises: StorageError."""
    try:
        plain: Mapping[str, Any] = open_json(path.read_bytes(), ["format", *(known.name for known in fields(Results))])
    except (OSError, DamagedError) as error:
        raise StorageError(f"cannot read {path}: {error}; make it again") from error
    if plain.get("format") != FORMAT:
        raise StorageError(f"{path} is no comparison's results.json of this version; make it again")
    return plain


def by_method(rows: Sequence[MethodRow]) -> dict[str, list[MethodRow]]:
    """The chosen rows of each method, in the order of the methods."""
    found: dict[str, list[MethodRow]] = {}
    for row in rows:
        if row.chosen:
            found.setdefault(row.method, []).append(row)
    return found
