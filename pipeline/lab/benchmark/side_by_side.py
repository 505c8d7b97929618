"""Run two or more sides in turn for several rounds: rates, ratios and their spread."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from pipeline.tuning.machine import device_name

SETTLING = 2
"""The first steps do not count, while allocators, kernels and ZeRO-3's trace settle."""


@dataclass(frozen=True)
class Side:
    """What one side did, step by step."""

    tokens: Sequence[int]
    """Text tokens of each step, without padding and prompt."""
    seconds: Sequence[float]
    losses: Sequence[Sequence[float]]
    """Losses of every task, in nats a target token."""
    prompts: Sequence[np.ndarray] = ()
    """`[P, H]` of every task, at the end."""
    peak_bytes: int = 0
    """Peak memory of all its processes together, loading included: resident on a CPU, allocated on a GPU."""

    @property
    def rate(self) -> float:
        """Text tokens a second, once settled."""
        return sum(self.tokens[SETTLING:]) / sum(self.seconds[SETTLING:])

    @property
    def step_seconds(self) -> float:
        """Of a step, once settled."""
        return sum(self.seconds[SETTLING:]) / len(self.seconds[SETTLING:])


@dataclass(frozen=True)
class SidesResult:
    """Every side's figures in every round, and how many times faster the first side is than each other side."""

    name: str
    device: str
    rates: Mapping[str, Sequence[float]]
    """Text tokens a second."""
    step_seconds: Mapping[str, Sequence[float]]
    peak_mib: Mapping[str, Sequence[int]]
    ratios: Mapping[str, tuple[float, float, float]]
    """Ratios of rates: least, median and greatest over the rounds."""
    losses: Mapping[str, Sequence[Sequence[float]]]
    """Losses of the first round, by step and task, in nats a target token."""
    loss_difference: Mapping[str, float]
    """Greatest relative difference of a loss from the first side's, over the tasks that both have."""


def compare_sides(name: str, sides: Mapping[str, Callable[[], Side]], rounds: int) -> SidesResult:
    """Run all sides in turn, round after round; the others are compared with the first."""
    done: dict[str, list[Side]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, run in sides.items():
            done[side].append(run())
    first, *others = sides
    ratios, differences = {}, {}
    for other in others:
        each = [mine.rate / theirs.rate for mine, theirs in zip(done[first], done[other], strict=True)]
        ratios[other] = (min(each), statistics.median(each), max(each))
        steps = zip(done[first][0].losses, done[other][0].losses, strict=True)
        pairs = [pair for mine, theirs in steps for pair in zip(mine, theirs, strict=False)]
        differences[other] = max(abs(a - b) / abs(b) for a, b in pairs)
    return SidesResult(
        name=name,
        device=device_name(),
        rates={side: [round(run.rate, 1) for run in runs] for side, runs in done.items()},
        step_seconds={side: [round(run.step_seconds, 4) for run in runs] for side, runs in done.items()},
        peak_mib={side: [run.peak_bytes // 2**20 for run in runs] for side, runs in done.items()},
        ratios=ratios,
        losses={side: [list(step) for step in runs[0].losses] for side, runs in done.items()},
        loss_difference=differences,
    )


def save_results(path: Path, results: Sequence[SidesResult], **facts: object) -> None:
    """Write results as JSON, each with the facts given."""
    write_figures(path, [{**asdict(result), **facts} for result in results])


def write_figures(path: Path, figures: object) -> None:
    """Write figures as JSON, and make the folders above the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures, indent=1) + "\n")
