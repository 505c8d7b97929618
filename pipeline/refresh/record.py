"""`night.json`: everything that a report of a night needs, in its run's folder; plain JSON of the classes below.

It is written anew at every stage, whole or not at all, and also when the night fails. Metrics are those of the dev
split; what was not measured or is not finite is null.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.refresh.plan import Decision
from pipeline.reporting.events import finite
from pipeline.reporting.html import Condition
from pipeline.whole_files import write_atomically

FILE = "night.json"
FORMAT = 1

Result = Literal["pending", "carried", "promoted", "kept", "failed", "removed"]
"""What became of a task:

    pending    not decided yet
    carried    the same blob again, nothing was trained
    promoted   the new prompt is in the version
    kept       tuned, and the bank's prompt stays: the new one was worse (`worse`), or no better than its start
    failed     there is no new prompt, for a reason of its own; the bank's stays where there is one (`stays`)
    removed    it has left the settings, and leaves the bank
"""
State = Literal["running", "publishing", "finished", "failed"]


@dataclass(frozen=True)
class TaskRecord:
    task: str
    decision: Decision
    """The plan: carried, warm, cold, retune, removed or unusable."""
    why: str
    """Why the plan says so, in one sentence."""
    result: Result = "pending"
    reason: str | None = None
    """Why the prompt was kept or has failed, or what is to be told of a promoted one's learning, in one sentence."""
    stays: bool = False
    """Whether the bank's prompt from before tonight is in the version."""
    worse: bool = False
    """Whether the gate refused the new prompt."""
    canary: bool = False
    metric: str | None = None
    incumbent: float | None = None
    """Of the bank's prompt, on tonight's dev rows."""
    new: float | None = None
    """Of the new prompt, on the same rows."""
    p_value: float | None = None
    """Of the gate's test (`pipeline/refresh/gate.py`): small means that the new one is worse."""
    dev_rows: int | None = None
    """Rows that both were measured on."""
    start: float | None = None
    """Of the prompt that the best trial started from."""
    constant: float | None = None
    """Of always giving the train split's most frequent target, on the same rows; for `f1` of a guess, where that has
    more; null for the metric `loss`."""
    learned: bool | None = None
    """Whether the new prompt is above that, and above its start unless it started from the bank's."""
    warm: float | None = None
    """Of the best trial that started from the bank's prompt, at its best step."""
    cold: float | None = None
    """Of the best trial that did not."""
    warm_beat_cold: bool | None = None
    """Equal metrics are told apart by the loss. Null where only one side was tuned."""
    trial: str | None = None
    """The best trial: the one whose prompt was compared, and published where it was promoted."""
    trials: tuple[str, ...] = ()
    """All of them; each has a curve in `metrics/<trial>.jsonl`."""
    steps: int = 0
    """Taken by all trials together."""
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Split -> status (ok, null, empty, input_long, target_long) -> rows."""
    tables: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Split -> addresses of the tables that it was read from tonight, with their versions."""


@dataclass(frozen=True)
class NightRecord:
    run: str
    """The night's run name: its folder under `run.storage`."""
    date: str
    started: float
    """Unix seconds, of its first attempt."""
    bank: str
    alias: str
    format: int = FORMAT
    state: State = "running"
    """`publishing` is a night that was stopped while it published, and is completed when it is started again."""
    outcome: str = ""
    """What came of it, in one sentence."""
    exit_code: int | None = None
    failure: str | None = None
    """What stopped the night, in one sentence."""
    ended: float | None = None
    attempts: int = 1
    """How often it was started."""
    model: str = ""
    backbone: str = ""
    """Fingerprint."""
    new_backbone: bool = False
    """Whether the alias' version belongs to another one."""
    ranks: int = 0
    alpha: float | None = None
    margin: float | None = None
    """Of the gate."""
    alias_before: int | None = None
    """The version that tasks are compared with; null before the first."""
    alias_after: int | None = None
    version: int | None = None
    """The version that was published; null when none was."""
    alias_may_move: bool | None = None
    """Whether every condition held."""
    conditions: tuple[Condition, ...] = ()
    tasks: tuple[TaskRecord, ...] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds of each stage over all attempts: check, cluster (reaching Ray, or starting it), corpus (the plan, too),
    tuning (all that ranks do: loading, tuning, measuring the bank's prompts), publish."""


def write_record(folder: Path, record: NightRecord) -> None:
    """Raises: StorageError."""
    plain = json.dumps(finite(asdict(record)), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / FILE, plain.encode() + b"\n")


def read_record(folder: Path) -> NightRecord | None:
    """The record of a run's folder; None when there is none, or it is written in another format."""
    try:
        plain: dict[str, Any] = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if plain["format"] != FORMAT:
            return None
        tasks = tuple(TaskRecord(**{**task, "trials": tuple(task["trials"])}) for task in plain["tasks"])
        conditions = tuple(Condition(**condition) for condition in plain["conditions"])
        return NightRecord(**{**plain, "tasks": tasks, "conditions": conditions})
    except (OSError, ValueError, KeyError, TypeError):
        return None


class NightRecordWriter:
    """Holds the record of a night while it lasts: changed, timed, and written down at every stage."""

    def __init__(self, folder: Path, record: NightRecord, guard: Callable[[], None] = lambda: None) -> None:
        """`guard` is called before every writing: it raises when the record is another night's to write."""
        self._folder = folder
        self._guard = guard
        before = read_record(folder)
        if before is not None:  # an attempt that was stopped
            record = replace(
                record, started=before.started, attempts=before.attempts + 1, stages=before.stages
            )  # fmt: skip
        self.record = record
        self._within = 0.0

    def write(self, **changes: Any) -> NightRecord:
        """Raises: StorageError, and what the guard raises."""
        self._guard()
        self.record = replace(self.record, **changes)
        write_record(self._folder, self.record)
        return self.record

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count the seconds of a stage, also of one that fails, less those of stages within it. Raises: as `write`."""
        outer, self._within = self._within, 0.0
        began = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - began
            seconds = self.record.stages.get(name, 0.0) + took - self._within
            self._within = outer + took
            self.record = replace(self.record, stages={**self.record.stages, name: round(seconds, 3)})
        self.write()
