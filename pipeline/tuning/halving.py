"""Successive halving: which trials of a sweep go on from a rung, and which end there.

Asynchronous, after ASHA (Li et al. 2020): a trial that reaches a rung (a number of evaluations) pauses, which frees
its slot for one that waits, and goes on as soon as it is among the best 1/factor of all that have reached the rung
so far. Synchronous rungs (Jamieson & Talwalkar 2016) would leave slots empty until the last trial is there. When no
more trials can reach a rung, the decision becomes final, and at least one trial goes on.

A slot stays free only where nothing is worth running: paused trials are not run on a guess to fill it, for that
would spend the steps that halving is to save.

Decisions are pure functions of the recorded dev scores: every rank takes the same ones, and so does a run that was
killed and started again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.settings import TaskSettings

Verdict = Literal["go on", "wait", "out"]


@dataclass(frozen=True)
class SweepTrial:
    """A trial of a sweep as halving sees it."""

    scores: Sequence[tuple[float, float]]
    """`metrics.goodness` of each evaluation after the start."""
    status: Literal["waiting", "live", "paused", "ended"]


def rungs(settings: TaskSettings) -> tuple[int, ...]:
    """Evaluations after which a trial of this task is judged; all lie before its last step."""
    if settings.halving is None:
        return ()
    found, rung = [], settings.halving.first
    while rung * settings.eval_every < settings.max_steps:
        found.append(rung)
        rung *= settings.halving.factor
    return tuple(found)


def verdicts(sweep: Sequence[SweepTrial], rungs: Sequence[int], factor: int) -> dict[int, Verdict]:
    """What becomes of each paused trial of a sweep, by its place in the sweep."""
    found: dict[int, Verdict] = {}
    for rung in rungs:
        below = [place for place, trial in enumerate(sweep) if len(trial.scores) < rung]
        may_come = any(
            sweep[place].status in ("waiting", "live") or found.get(place) in ("go on", "wait") for place in below
        )
        reached = ranking(sweep, rung)
        kept = reached[: max(len(reached) // factor, 0 if may_come else 1)]
        for place in reached:
            if sweep[place].status == "paused" and len(sweep[place].scores) == rung:
                found[place] = "go on" if place in kept else "wait" if may_come else "out"
    return found


def ranking(sweep: Sequence[SweepTrial], rung: int) -> list[int]:
    """Places of the trials that reached a rung, the best first, by the best score of each up to there."""
    reached = [place for place, trial in enumerate(sweep) if len(trial.scores) >= rung]
    return sorted(reached, key=lambda place: max(sweep[place].scores[:rung]), reverse=True)  # keeps ties in order
