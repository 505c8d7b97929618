"""The event log: what was written is read, whoever is killed."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import LeaseError, StorageError
from pipeline.reporting.events import EventLog, EventTail, telling_why

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(texts=st.lists(texts, max_size=6), cuts=st.lists(st.integers(0, 400), max_size=8))
def test_events_are_read_once_and_in_order_however_the_file_grows(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("run")
    with EventLog(folder / "whole.jsonl") as log:
        for text in texts:
            log.write("stage", name="tuning", text=text)
    whole = (folder / "whole.jsonl").read_bytes()

    growing = folder / "growing.jsonl"
    tail = EventTail(growing)
    seen = tail.read()  # nothing there yet
    for end in [*sorted(cuts), len(whole)]:  # cut anywhere, also inside a letter
        growing.write_bytes(whole[:end])
        seen += tail.read()
    assert [event["text"] for event in seen] == texts


def test_a_tail_starts_at_the_end_of_what_is_there(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.write("resume", step=1)
        tail = EventTail(tmp_path / "events.jsonl")
        log.write("resume", step=2)
    assert [event["step"] for event in tail.read()] == [2]
    assert tail.read() == []


def test_a_line_cut_off_by_a_kill_costs_that_event_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    with EventLog(path) as log:
        log.write("resume", step=1)
    with path.open("a") as file:
        file.write('{"event": "step", "st')
    assert [event["step"] for event in tail.read()] == [1]
    with EventLog(path) as log:  # the writer started again
        log.write("resume", step=2)
    assert [event["step"] for event in tail.read()] == [2]


def test_a_log_replaced_by_a_shorter_one_is_read_from_its_start(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("stage", name="corpus", text="a long text " * 20)
    tail = EventTail(path)
    path.unlink()
    with EventLog(path) as log:
        log.write("resume", step=3)
    assert [event["step"] for event in tail.read()] == [3]


def test_numbers_that_are_not_finite_are_still_valid_json(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.write("step", step=1, live=1, tokens_per_second=2.0, trials={"a": {"step": 1, "loss": float("nan")}})
        log.write("eval", trial="a", step=1, metric="loss", value=float("inf"), loss=float("-inf"))

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is no JSON")

    step, evaluation = (json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines())
    assert step["trials"] == {"a": {"step": 1, "loss": None}}
    assert evaluation["value"] is None and evaluation["loss"] is None


def test_a_log_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file where the run's folder should be")
    with pytest.raises(StorageError, match=r"run.events\.jsonl"):
        EventLog(tmp_path / "run" / "events.jsonl")


def test_a_full_disk_is_one_sentence() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with EventLog(full) as log, pytest.raises(StorageError, match="No space left on device"):
        log.write("resume", step=1)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (StorageError("the disk is full"), "the disk is full"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_stops_a_run_is_told_and_still_raised(tmp_path: Path, error: BaseException, reason: str) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log, pytest.raises(type(error)), telling_why(log):
        raise error
    assert [(event["event"], event["reason"]) for event in EventTail(path, whole=True).read()] == [("stopped", reason)]


def test_a_start_that_lost_its_lease_tells_nothing_to_the_log_of_the_one_that_has_it(tmp_path):
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log, pytest.raises(LeaseError), telling_why(log):
        raise LeaseError("another start has taken over the lease")
    assert path.read_bytes() == b""
