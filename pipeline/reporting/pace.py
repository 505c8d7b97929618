"""The recent pace of a run, when it will be done, and whether it has fallen silent. Times are Unix seconds.

A run's storage does not show whether its processes are alive. It shows the last event, and how long the run usually
takes until the next one.
"""

import heapq
from collections import deque
from itertools import pairwise

from pipeline.reporting.events import Event
from pipeline.reporting.state import RunState

RECENT = 60
"""The pace is taken from so many newest events."""
_SILENT_AFTER = 60.0
_TIMES_THE_LONGEST_GAP = 3.0
_FEWEST_GAPS = 5


class Pace:
    """Pace of the newest events since the ranks last started; evaluations between steps count, as they take time."""

    def __init__(self) -> None:
        self.last: float | None = None
        """Time of the newest event."""
        self._times: deque[float] = deque(maxlen=RECENT)
        self._steps: deque[tuple[float, int]] = deque(maxlen=RECENT)

    def apply(self, event: Event) -> None:
        time = float(event.get("time") or 0.0)
        self.last = time
        if event["event"] in ("begin", "launch", "resume"):
            self._times.clear()
            self._steps.clear()
        self._times.append(time)
        if event["event"] == "step":
            self._steps.append((time, int(event.get("step") or 0)))

    @property
    def seconds_per_step(self) -> float | None:
        """Seconds that a step takes; None until there were two step events."""
        if len(self._steps) < 2:
            return None
        (first, at_first), (last, at_last) = self._steps[0], self._steps[-1]
        return (last - first) / (at_last - at_first) if at_last > at_first and last > first else None

    @property
    def longest_gap(self) -> float | None:
        """The longest time between neighbouring events lately; None while there were too few to tell."""
        gaps = [later - earlier for earlier, later in pairwise(self._times)]
        return max(gaps) if len(gaps) >= _FEWEST_GAPS else None

    def quiet(self, now: float) -> float:
        """Seconds since the newest event."""
        return max(0.0, now - self.last) if self.last is not None else 0.0

    def silent(self, now: float) -> bool:
        """Whether it has been quiet for a minute, and for three times as long as the longest recent gap, if known."""
        return self.quiet(now) > max(_SILENT_AFTER, _TIMES_THE_LONGEST_GAP * (self.longest_gap or 0.0))


def steps_to_go(state: RunState) -> int | None:
    """Steps until the last trial ends, if none stops early: trials that wait take the slots that become free first.

    None before the first step.
    """
    slots = [max(trial.max_steps - trial.step, 0) for trial in state.live.values()]
    if not slots:
        return None
    heapq.heapify(slots)
    for trial in state.trials.values():
        if not trial.live and not trial.finished:
            heapq.heapreplace(slots, slots[0] + max(trial.max_steps - trial.step, 0))
    return max(slots)


def done_at(state: RunState, pace: Pace) -> float | None:
    """When tuning will be done at the latest; None while that cannot be estimated. Publishing comes after it."""
    steps, seconds = steps_to_go(state), pace.seconds_per_step
    if steps is None or seconds is None or pace.last is None:
        return None
    return pace.last + steps * seconds
