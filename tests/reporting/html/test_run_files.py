"""From a run's files and the bank's manifests to what the page draws."""

from pathlib import Path

from pipeline.bank import Metrics, PromptBank
from pipeline.reporting.html import Fault, PastVersion, Stage
from pipeline.reporting.html.from_record import past_versions
from pipeline.reporting.html.run_files import faults_of, read_curve, stages_of
from tests.bank.conftest import make_prompt, publish


def test_a_curve_is_read_with_what_is_not_a_number_and_without_a_line_that_a_kill_cut_off(tmp_path: Path) -> None:
    (tmp_path / "metrics").mkdir()
    lines = ['{"step": 0, "dev_metric": 0.5, "dev_loss": 3.0}', '{"step": 1, "loss": 2.5}', '{"step": 2, "loss": NaN}']
    (tmp_path / "metrics" / "film.jsonl").write_text("\n".join([*lines, '{"step": 3']))
    curve = read_curve(tmp_path, "film")
    assert (curve.losses, curve.evaluations) == ([(1, 2.5), (2, None)], [(0, 0.5)])


def test_a_trial_that_never_started_has_an_empty_curve(tmp_path: Path) -> None:
    curve = read_curve(tmp_path, "film")
    assert not curve.losses and not curve.evaluations


def test_the_time_of_a_stage_is_summed_over_restarts_and_the_time_between_them_is_nobodys() -> None:
    def at(time: float, event: str, **more: object) -> dict[str, object]:
        return {"time": time, "event": event, **more}

    events = [
        at(100, "begin", tasks=1),
        at(103, "stage", name="corpus", text="read"),
        at(104, "launch", trials=[]),
        at(110, "stage", name="backbone", text=""),
        at(115, "stage", name="tuning", text=""),
        at(115, "memory", stage="backbone", peak_bytes=7),
        at(140, "step", step=1),
        at(9000, "begin", tasks=1),
        at(9001, "launch", trials=[]),
        at(9003, "stage", name="backbone", text=""),
        at(9004, "stage", name="tuning", text=""),
        at(9010, "memory", stage="tuning", peak_bytes=9),
        at(9010, "stage", name="publish", text=""),
        at(9012, "end", version=1, exit=0),
    ]
    assert stages_of(events) == [
        Stage("corpus", 5.0),
        Stage("starting ranks", 8.0),
        Stage("backbone", 6.0, 7),
        Stage("tuning", 31.0, 9),
        Stage("publish", 2.0),
    ]


def test_the_last_five_versions_before_tonights_are_told_with_their_metric(tmp_path: Path) -> None:
    bank = PromptBank.open(tmp_path / "bank", create=True)
    for number in range(1, 8):
        publish(bank, make_prompt("film", number, metrics=Metrics(dev_after=number / 10)))
    publish(bank, make_prompt("book", 1, metric="f1"))  # version 8 carries film forward
    publish(bank, make_prompt("film", 9, metric="f1"), make_prompt("book", array=None, status="failed", reason="gone"))
    publish(bank, make_prompt("film", 11))
    found = past_versions(bank, {"film": "accuracy", "book": "f1", "new": "loss"}, tonight=9)
    assert found["film"] == [
        *(PastVersion(n, n / 10, "tuned") for n in range(4, 8)),
        PastVersion(8, 0.7, "carried_forward"),
        PastVersion(9, None, "tuned"),
    ]
    assert [past.version for past in found["book"]] == [8, 9] and found["new"] == []


def test_a_damaged_version_is_passed_over(tmp_path: Path) -> None:
    bank = PromptBank.open(tmp_path / "bank", create=True)
    for number in (1, 2, 3):
        publish(bank, make_prompt("film", number))
    (tmp_path / "bank" / "versions" / "2.json").write_text("{}")
    bank = PromptBank.open(tmp_path / "bank")
    assert [past.version for past in past_versions(bank, {"film": "accuracy"}, 3)["film"]] == [1, 3]


def test_lost_ranks_and_new_starts_are_faults_and_a_first_start_is_none() -> None:
    def at(time: float, event: str, **more: object) -> dict[str, object]:
        return {"time": time, "event": event, **more}

    begun = [at(1, "begin"), at(2, "launch", trials=[]), at(3, "step", step=1)]
    assert faults_of(begun) == []
    lost = [*begun, at(9, "stage", name="backbone", text=""), at(10, "resume", step=1), at(11, "step", step=2)]
    assert faults_of(lost) == [Fault(10, "ranks were lost and started again, from the checkpoint of step 1")]
    stopped = [*begun, at(4, "stopped", reason="the disk is full"), *begun[:2], at(9, "resume", step=1)]
    assert faults_of(stopped) == [
        Fault(4, "stopped: the disk is full"),
        Fault(9, "the run was started again, from the checkpoint of step 1"),
    ]
