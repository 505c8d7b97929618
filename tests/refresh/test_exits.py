"""Exit codes: a scheduler can tell what to do next from the number alone."""

from dataclasses import replace

import pytest

from pipeline.errors import BankError, CorpusError, LeaseError, StorageError, TuningError
from pipeline.refresh.ending import exit_of, verdict
from pipeline.refresh.record import NightRecord, TaskRecord
from pipeline.reporting.html import Condition

NIGHT = NightRecord("small-n1", "n1", 0.0, "bank", "prod", alias_may_move=True)
PROMOTED = TaskRecord("a", "warm", "changed", result="promoted")
CARRIED = TaskRecord("b", "carried", "unchanged", result="carried")
NO_GAIN = TaskRecord("c", "warm", "changed", result="kept")
WORSE = replace(NO_GAIN, task="d", worse=True)
FAILED = TaskRecord("e", "cold", "new", result="failed")


@pytest.mark.parametrize(
    ("tasks", "version", "may_move", "code"),
    [
        ([CARRIED], None, True, 0),
        ([PROMOTED, CARRIED, NO_GAIN], 2, True, 0),
        ([PROMOTED, WORSE], 2, True, 3),
        ([PROMOTED, FAILED], 2, True, 3),
        ([FAILED, CARRIED], None, True, 4),
        ([PROMOTED, FAILED], 2, False, 6),
    ],
)
def test_a_night_that_came_to_its_end_has_one_code_and_says_what_came_of_it(tasks, version, may_move, code):
    conditions = () if may_move else (Condition("no canary worse", False, "'e' failed"),)
    record = replace(NIGHT, tasks=tuple(tasks), alias_may_move=may_move, conditions=conditions)
    found, sentence = verdict(record, version)
    assert found == code
    assert (f"Version {version}" in sentence) == (version is not None)
    assert ("stays where it was: 'e' failed" in sentence) == (not may_move)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BankError(""), 2), (CorpusError(""), 2), (TuningError(""), 5), (StorageError(""), 5), (KeyboardInterrupt(), 5),
        (LeaseError(""), 7), (AssertionError(), 1),
    ],
)  # fmt: skip
def test_what_stops_a_night_decides_whether_to_start_it_again(error, code):
    assert exit_of(error) == code
