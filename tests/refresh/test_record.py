"""night.json: whole or absent, plain JSON, and read back as it was."""

import json
import math

import pytest

from pipeline.errors import LeaseError
from pipeline.refresh.record import NightRecord, NightRecordWriter, TaskRecord, read_record, write_record
from pipeline.reporting.html import Condition

RECORD = NightRecord(
    run="small-n1",
    date="n1",
    started=1.5,
    bank="bank",
    alias="latest",
    conditions=(Condition("share", True, "all"),),
    tasks=(TaskRecord("film", "warm", "its corpus changed", trials=("a", "b"), rows={"dev": {"ok": 3}}),),
    stages={"check": 1.0},
)


def test_a_record_read_back_is_the_one_written_and_is_strict_json(tmp_path):
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path) == RECORD
    broken = NightRecord("r", "d", 0.0, "b", "a", tasks=(TaskRecord("film", "cold", "new", new=math.nan),))
    write_record(tmp_path, broken)
    plain = json.loads((tmp_path / "night.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert plain["tasks"][0]["new"] is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2}', '{"format": 1}'])
def test_what_is_no_record_of_ours_is_none(tmp_path, text):
    assert read_record(tmp_path) is None
    (tmp_path / "night.json").write_text(text)
    assert read_record(tmp_path) is None


def test_a_night_started_again_counts_its_attempts_and_adds_up_its_seconds(tmp_path):
    first = NightRecordWriter(tmp_path, RECORD)
    with first.stage("check"):
        pass
    again = NightRecordWriter(tmp_path, NightRecord("small-n1", "n1", 99.0, "bank", "latest"))
    with again.stage("check"):
        pass
    record = read_record(tmp_path)
    assert (record.started, record.attempts) == (1.5, 2) and record.stages["check"] >= 1.0
    assert record.tasks == (), "what was planned is planned anew"


def test_a_stage_that_fails_is_timed_and_a_record_of_another_night_is_not_touched(tmp_path):
    write_record(tmp_path, RECORD)

    def lost():
        raise LeaseError("another night")

    chronicle = NightRecordWriter(tmp_path, RECORD, lost)
    with pytest.raises(LeaseError), chronicle.stage("corpus"):
        pass
    assert "corpus" in chronicle.record.stages
    assert read_record(tmp_path) == RECORD
