"""Progress: what people see of a run."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from pipeline.reporting.events import Event, EventLog
from pipeline.reporting.progress import Lines, bars, follow
from pipeline.reporting.state import RunState


def plain() -> Console:
    return Console(file=StringIO(), width=80)


def written(console: Console) -> list[str]:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def launch(trials: list[str], max_steps: int = 100, time: float = 0) -> Event:
    launched = [{"trial": trial, "task": trial, "max_steps": max_steps} for trial in trials]
    return {"time": time, "event": "launch", "trials": launched}


def step(number: int, trials: list[str], time: float = 0, loss: float | None = 0.5) -> Event:
    running = {trial: {"step": number, "loss": loss} for trial in trials}
    speed = {"live": len(trials), "tokens_per_second": 310.2}
    return {"time": time, "event": "step", "step": number, **speed, "trials": running}


def lines_of(events: list[Event]) -> list[str]:
    console = plain()
    with Lines(console) as lines:
        lines.show(events)
    return written(console)


def test_a_log_gets_a_step_line_every_ten_seconds_and_every_evaluation() -> None:
    events = [launch(["sst2"]), *(step(n, ["sst2"], time=n) for n in range(1, 31))]
    evaluations: list[Event] = [
        {"time": n, "event": "eval", "trial": "sst2", "step": n, "metric": "accuracy", "value": 0.75, "loss": 0.61}
        for n in (8, 9)
    ]
    shown = lines_of(sorted([*events, *evaluations], key=lambda event: event["time"]))
    assert [line.split(" · ")[0] for line in shown if line.startswith("step")] == [
        "step 1/100",
        "step 11/100",
        "step 21/100",
    ]
    assert "sst2 · step 8 · dev accuracy 0.75 · dev loss 0.61" in shown
    assert "sst2 · step 9 · dev accuracy 0.75 · dev loss 0.61" in shown


def test_a_step_line_tells_how_far_how_fast_and_each_loss() -> None:
    shown = lines_of([launch(["sst2", "trec"]), step(40, ["sst2", "trec"])])
    assert shown[-1] == "step 40/100 · 2 live · 310 tokens/s · loss sst2 0.50 trec 0.50"


def test_many_trials_stay_one_readable_line() -> None:
    names = [f"t{number}" for number in range(64)]
    line = lines_of([launch(names), step(1, names)])[-1]
    assert line.endswith("and 56 more") and len(line) < 200


def test_no_last_step_is_promised_while_trials_wait() -> None:
    shown = lines_of([launch(["sst2", "trec"]), step(40, ["sst2"])])
    assert shown[-1].startswith("step 40 · 1 live, 1 waiting · ")


def test_a_failed_trial_is_reported_with_its_reason() -> None:
    event = {"event": "finished", "trial": "trec", "status": "failed", "reason": "the loss is not a number"}
    assert lines_of([launch(["trec"]), event])[-1] == "trec · failed: the loss is not a number"


def test_a_restart_is_told_and_the_steps_go_on_from_the_checkpoint() -> None:
    again = [launch(["sst2"]), {"event": "resume", "step": 25}, step(26, ["sst2"], time=60)]
    shown = lines_of([launch(["sst2"]), step(40, ["sst2"], time=1), *again])
    assert shown[2:4] == ["launch: 1 trial", "resumed from the checkpoint of step 25"]
    assert shown[4].startswith("step 26/100")


def test_events_of_another_version_are_passed_over() -> None:
    odd: list[Event] = [{"event": "haiku"}, {"event": "stage"}, {"event": "eval", "trial": "?"}, {"event": "finished"}]
    assert lines_of(odd) == []


def test_everything_written_within_the_block_is_shown_when_it_ends(tmp_path: Path) -> None:
    path, console = tmp_path / "run" / "events.jsonl", plain()
    with pytest.raises(KeyboardInterrupt), follow(path, console), EventLog(path) as log:
        log.write("stage", name="corpus", text="[4] tasks read")
        log.write("finished", trial="sst2", status="tuned", reason=None)
        raise KeyboardInterrupt
    assert written(console) == ["corpus: [4] tasks read", "sst2 · tuned"]


def test_a_log_holds_no_colour_and_no_bars(tmp_path: Path) -> None:
    path, console = tmp_path / "events.jsonl", plain()
    with follow(path, console), EventLog(path) as log:
        log.write("stage", name="tuning", text="started")
    assert "".join(written(console)).isprintable()


def test_a_terminal_shows_bars_and_leaves_only_what_happened(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    terminal = Console(file=StringIO(), force_terminal=True, width=100)
    with follow(path, terminal), EventLog(path) as log:
        for event in (launch(["sst2"]), step(40, ["sst2"])):
            log.write(event.pop("event"), **{key: event[key] for key in event if key != "time"})
        log.write("finished", trial="sst2", status="stopped early", reason="no better dev metric")
    shown = "\n".join(written(terminal))
    assert "sst2 · stopped early: no better dev metric" in shown


def test_at_most_twelve_bars_are_drawn() -> None:
    state, console = RunState(), plain()
    names = [f"trial{number}" for number in range(20)]
    for event in (launch(names), step(7, names)):
        state.apply(event)
    console.print(bars(state))
    shown = written(console)
    assert sum("7/100" in line for line in shown if line.startswith("trial")) == 12
    assert shown[-1] == "and 8 more"


def test_a_bar_shows_the_trials_own_step_and_last_dev_metric() -> None:
    state, console = RunState(), plain()
    evaluation = {"event": "eval", "trial": "sst2", "step": 7, "metric": "accuracy", "value": 0.8712, "loss": 0.3}
    for event in (launch(["sst2"]), step(7, ["sst2"], loss=None), evaluation):
        state.apply(event)
    console.print(bars(state))
    bar = written(console)[-1]
    assert bar.startswith("sst2") and "7/100" in bar and "loss –" in bar and "dev accuracy 0.87" in bar
