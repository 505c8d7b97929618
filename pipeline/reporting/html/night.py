"""What the page shows of a night, as plain values. All texts are data, which the page escapes.

Metrics are dev metrics as the bank has them; None stands for one that was not measured or is not finite.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Decision = Literal["failed", "pending", "removed", "kept", "cold", "warm", "carried"]
"""What happened to a task's prompt:

    failed    there is no new prompt, for a reason of this task; the old one, if there is one, stays
    pending   nothing yet: the night was stopped before
    removed   the task has left the settings, and its prompt the bank
    kept      tuned tonight, but the prompt in the bank stays: the new one did not pass the gate
    cold      tuned from a fresh initialisation, and published
    warm      tuned from the prompt in the bank, and published
    carried   nothing changed and nothing was trained: the version refers to the same blob
"""
Verdict = Literal["good", "partial", "bad"]
"""Everything was published as asked for; only a part, or the alias stayed; nothing was published."""
Series = Sequence[tuple[int, float | None]]
"""(step, value) in the order of steps."""


@dataclass(frozen=True)
class Curve:
    """How one trial went: a task has one, or one per choice of its sweep."""

    trial: str
    losses: Series = ()
    """Training loss of every step."""
    evaluations: Series = ()
    """Dev metric of every evaluation; step 0 is the prompt as it was initialised."""
    best: bool = False
    """Whether it is the best of its task's trials, whose prompt was published, or compared and refused."""
    status: str = ""
    """tuned | stopped early | halved | no gain | failed"""
    reason: str | None = None


@dataclass(frozen=True)
class PastVersion:
    """A task's prompt as one version of the bank has it."""

    version: int
    value: float | None
    status: str
    """As in the manifest: tuned | carried_forward | kept | failed."""


@dataclass(frozen=True)
class TaskNight:
    """One task of the night: what happened to its prompt, and the figures that decided it."""

    name: str
    decision: Decision
    why: str
    """One sentence."""
    metric: str
    """Name of the dev metric; for `loss`, less is better."""
    incumbent: float | None = None
    """Metric of the prompt that was in the bank, on tonight's dev rows if it was measured again."""
    tuned: float | None = None
    """Metric of the prompt tuned tonight, on the same rows."""
    p_value: float | None = None
    """Of the gate's one-sided paired test: how likely a lead of the bank's prompt as large as this one is, if both are
    equally good. Small where tonight's prompt is worse."""
    start: float | None = None
    """Metric of the prompt that tuning started from."""
    warm: float | None = None
    """Metric of the trial that started from the bank's prompt, if both starts were tuned."""
    cold: float | None = None
    """Metric of the trial that started from a fresh prompt, if both starts were tuned."""
    steps: int = 0
    canary: bool = False
    history: Sequence[PastVersion] = ()
    """The last versions, oldest first, tonight's among them when there is one."""
    curves: Sequence[Curve] = ()
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split -> status (ok, null, empty, input_long, target_long) -> rows."""
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Split -> addresses of the tables that it was read from, with their versions."""
    constant: float | None = None
    """Metric of always giving train's most frequent target, on the same rows; for `f1` of a guess, where that has
    more."""
    learned: bool | None = None
    """Whether tonight's prompt is better than `constant` and than its start; None when that was not judged."""

    @property
    def trained(self) -> bool:
        """Whether there is a curve to draw."""
        return any(curve.losses or curve.evaluations for curve in self.curves)

    @property
    def baseline(self) -> float | None:
        """The metric that `tuned` is compared with: of the bank's prompt, or for a new task of the starting prompt."""
        return self.start if self.incumbent is None else self.incumbent

    @property
    def gain(self) -> float | None:
        """How much better tonight's prompt is than `baseline`; below 0 it is worse, whatever the metric."""
        if self.baseline is None or self.tuned is None:
            return None
        change = self.tuned - self.baseline
        return -change if self.metric == "loss" else change


@dataclass(frozen=True)
class Stage:
    """A stage of the run: its time and memory."""

    name: str
    seconds: float
    peak_bytes: int | None = None
    """Most memory that one rank held until the stage's end; None where it was not measured."""


@dataclass(frozen=True)
class Condition:
    """One of the run's own conditions for moving the alias."""

    name: str
    held: bool
    found: str
    """What the condition demands and what was measured, in one sentence."""


@dataclass(frozen=True)
class Fault:
    """Something that went wrong in the run as a whole: a lost rank, a store that was unreachable for a while."""

    time: float
    """Unix seconds"""
    what: str
    survived: bool = True


@dataclass(frozen=True)
class NightReport:
    """Everything that the page of one night, or of one run, shows."""

    title: str
    run: str
    verdict: Verdict
    outcome: str
    """The outcome in one sentence: the version and the alias, or why there is none."""
    started: float
    ended: float
    """Unix seconds"""
    tasks: Sequence[TaskNight]
    bank: str = ""
    alias: str = ""
    version: int | None = None
    """The version that was published, if one was."""
    parent: int | None = None
    """The version that tasks are compared with."""
    alias_before: int | None = None
    alias_after: int | None = None
    exit_code: int | None = None
    conditions: Sequence[Condition] = ()
    faults: Sequence[Fault] = ()
    stages: Sequence[Stage] = ()
    """Stages in the order in which they began."""
    ranks: int = 0
    rank_seconds: float = 0.0
    """Seconds for which ranks were held, summed over ranks."""
    price_per_rank_hour: float | None = None
    """In the reader's currency; without it the page shows no cost."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """Further facts by name: model, fingerprint, settings file, versions of libraries."""

    @property
    def price(self) -> float | None:
        return None if self.price_per_rank_hour is None else self.rank_seconds / 3600 * self.price_per_rank_hour
