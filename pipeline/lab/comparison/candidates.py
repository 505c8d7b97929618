"""Candidates: all that can answer a task, each with the choices and the seed that it was made with."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.settings.comparing import parts

Method = Literal["hard prompt", "prompt tuning", "transferred prompt", "LoRA", "fine-tuning"]
METHODS: tuple[Method, ...] = ("hard prompt", "prompt tuning", "transferred prompt", "LoRA", "fine-tuning")


@dataclass(frozen=True)
class Candidate:
    """One tuned or written prompt, or one set of tuned weights."""

    name: str
    """Unique among all candidates, and fit to be a file's name."""
    method: Method
    task: str
    choice: Mapping[str, Any]
    """The values chosen for it, without the seed: `{"prompt.length": 20}`."""
    seed: int | None
    """None where nothing in it is random."""

    @property
    def group(self) -> tuple[str, str, str]:
        """Equal for candidates that differ only in the seed."""
        return self.method, self.task, choice_text(self.choice)

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The tasks whose rows it was trained on, its own first."""
        return (self.task, *(parts(self.choice["prompt.source"]) if self.method == "transferred prompt" else ()))


@dataclass(frozen=True)
class Cost:
    """What a candidate costs for its task."""

    trained_parameters: int = 0
    stored_bytes: int = 0
    """Bytes to be stored for the task beside the one frozen model."""
    rank_seconds: float = 0.0
    """Seconds of tuning, dev evaluations included, summed over ranks."""
    peak_bytes: int | None = None
    """Most memory that a rank held while it was tuned."""
    prompt_tokens: int = 0
    """Tokens that stand before every row."""


@dataclass(frozen=True)
class MeasuredCandidate:
    """A candidate with its dev metric, which is all that choices may be based on."""

    candidate: Candidate
    value: float
    """The task's dev metric at the candidate's best evaluation; NaN where it failed."""
    loss: float
    """Nats a target token, on dev."""
    cost: Cost = field(default_factory=Cost)
    failed: str | None = None
    """Why it cannot answer, in one sentence."""


def choice_text(choice: Mapping[str, Any]) -> str:
    """`length 20, init class_labels`; the empty choice is `as set`."""
    parts = [f"{key.rpartition('.')[2]} {'none' if value is None else value}" for key, value in choice.items()]
    return ", ".join(parts) or "as set"
