"""How far a run is: from its events alone, restarts included."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.reporting.events import Event
from pipeline.reporting.pace import steps_to_go
from pipeline.reporting.state import RunState
from pipeline.reporting.watched import WatchedRun, read_run
from tests.reporting.test_progress import launch, step


def watched(events: list[Event]) -> WatchedRun:
    run = WatchedRun("small", Path("small"))
    for event in events:
        run.apply(event)
    return run


def steps(first: int, last: int, trials: list[str], since: float = 0.0, every: float = 2.0) -> list[Event]:
    return [step(n, trials, time=since + every * (n - first)) for n in range(first, last + 1)]


def test_a_run_is_done_when_the_steps_that_are_left_have_taken_as_long_as_the_last_ones() -> None:
    run = watched([launch(["a", "b"], max_steps=100), *steps(1, 40, ["a", "b"])])
    assert run.pace.seconds_per_step == 2.0 and run.steps_to_go == 60
    assert run.done_at == 2.0 * 39 + 60 * 2.0


def test_the_pace_is_that_of_the_last_events_and_not_of_a_slow_start() -> None:
    slow, fast = steps(1, 20, ["a"], every=60.0), steps(21, 100, ["a"], since=1200.0, every=1.0)
    assert watched([launch(["a"]), *slow, *fast]).pace.seconds_per_step == 1.0


def test_evaluations_between_the_steps_are_part_of_the_pace() -> None:
    events = [launch(["a"]), step(1, ["a"], time=0), {"time": 9, "event": "eval", "trial": "a", "step": 1}]
    assert watched([*events, step(2, ["a"], time=10)]).pace.seconds_per_step == 10.0


def test_the_time_before_a_restart_is_no_part_of_the_pace() -> None:
    again: list[Event] = [launch(["a"], time=9000), {"time": 9001, "event": "resume", "step": 20}]
    run = watched([launch(["a"]), *steps(1, 20, ["a"]), *again])
    assert run.pace.seconds_per_step is None and run.done_at is None
    assert watched([*[launch(["a"])], *again, *steps(21, 23, ["a"], since=9002)]).pace.seconds_per_step == 2.0


@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=12),
    slots=st.integers(1, 5),
)
def test_the_steps_to_go_are_those_that_the_slots_will_take(lengths: list[int], slots: int) -> None:
    names = [f"t{place}" for place in range(len(lengths))]
    state = RunState()
    trials = [{"trial": n, "task": n, "max_steps": length} for n, length in zip(names, lengths, strict=True)]
    state.apply({"event": "launch", "trials": trials})
    state.apply(step(0, names[:slots]))
    left, waiting, run_steps = lengths[:slots], lengths[slots:], 0
    while left:  # as the loop of the tuning does it
        run_steps += 1
        left = [steps - 1 for steps in left if steps > 1]
        while waiting and len(left) < slots:
            left.append(waiting.pop(0))
    assert steps_to_go(state) == run_steps


def test_a_run_is_silent_when_it_is_quiet_for_much_longer_than_it_ever_was_lately() -> None:
    run = watched([launch(["a"]), *steps(1, 20, ["a"], every=40.0)])
    last = 40.0 * 19
    assert run.condition(last + 119) == "running" and run.condition(last + 121) == "silent"
    quick = watched([launch(["a"]), *steps(1, 20, ["a"], every=1.0)])
    assert quick.condition(19 + 59) == "running", "a minute is never silence"
    assert quick.condition(19 + 61) == "silent"


def test_a_run_that_ended_or_stopped_is_never_silent_and_goes_on_when_it_is_started_again() -> None:
    events = [launch(["a"]), *steps(1, 20, ["a"])]
    ended = watched([*events, {"time": 50, "event": "end", "version": 3, "exit": 0}])
    assert (ended.condition(1e9), ended.state.version, ended.done_at) == ("done", 3, None)
    stopped = watched([*events, {"time": 50, "event": "stopped", "reason": "the disk is full"}])
    assert (stopped.condition(1e9), stopped.state.stopped) == ("stopped", "the disk is full")
    stopped.apply({"time": 60, "event": "begin", "tasks": 1})
    assert stopped.condition(61) == "running"


def test_after_a_restart_a_trial_is_what_the_checkpoint_says() -> None:
    def ends(trial: str) -> Event:
        return {"event": "finished", "trial": trial, "status": "tuned", "reason": None}

    kept = {"a": {"step": 10, "status": "tuned", "reason": None}, "b": {"step": 8}}
    again: list[Event] = [launch(["a", "b", "c"]), {"event": "resume", "step": 10, "trials": kept}]
    run = watched([launch(["a", "b", "c"]), *steps(1, 12, ["a", "b"]), ends("a"), ends("b"), *again])
    trials = run.state.trials
    assert [(t.step, t.finished, t.status) for t in trials.values()] == [
        (10, True, "tuned"), (8, False, ""), (0, False, ""),
    ]  # fmt: skip
    assert run.state.waiting == 2


def test_a_launch_of_workers_that_resume_nothing_forgets_no_trial_that_has_finished() -> None:
    """A run whose every trial had ended is started again: no rank runs, and no checkpoint is told of."""
    run = watched([launch(["a"]), *steps(1, 3, ["a"]), {"event": "finished", "trial": "a", "status": "tuned"}])
    run.apply(launch(["a"]))
    assert run.state.trials["a"].status == "tuned" and run.state.waiting == 0


@pytest.mark.parametrize("count", [10, 500])
def test_a_long_log_is_read_for_its_newest_steps_and_says_the_same(tmp_path: Path, count: int) -> None:
    events = [launch(["a"], max_steps=1000), *steps(1, count, ["a"])]
    events.insert(5, {"time": 7, "event": "eval", "trial": "a", "step": 3, "metric": "f1", "value": 0.5, "loss": 1.0})
    written = "".join(json.dumps({"time": event["time"], **event}) + "\n" for event in events)
    (tmp_path / "events.jsonl").write_text(written + '{"time": 9, "event": "st')  # its writer is within a line
    run, whole = read_run(tmp_path, "small"), watched(events)
    assert run.state == whole.state
    assert (run.done_at, run.pace.longest_gap) == (whole.done_at, whole.pace.longest_gap)
