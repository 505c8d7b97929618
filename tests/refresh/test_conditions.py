"""The run's own conditions: the alias moves only when enough was refreshed and no canary came to harm."""

import pytest

from pipeline.refresh.ending import check_conditions
from pipeline.refresh.record import TaskRecord
from pipeline.settings import RefreshSettings


def task(name: str, decision: str, result: str, worse: bool = False) -> TaskRecord:
    return TaskRecord(name, decision, "why", result=result, worse=worse)


CARRIED = task("carried", "carried", "carried")
PROMOTED = task("promoted", "warm", "promoted")
NO_GAIN = task("no-gain", "warm", "kept")
WORSE = task("worse", "cold", "kept", worse=True)
FAILED = task("failed", "cold", "failed")
UNUSABLE = task("unusable", "unusable", "failed")
REMOVED = task("removed", "removed", "removed")


def held(tasks, **settings) -> bool:
    return all(condition.held for condition in check_conditions(tasks, RefreshSettings(**settings)))


@pytest.mark.parametrize(
    ("tasks", "share"),
    [
        ([PROMOTED, NO_GAIN], 1.0),
        ([PROMOTED, WORSE], 1.0),
        ([PROMOTED, FAILED], 0.5),
        ([PROMOTED, UNUSABLE, FAILED, WORSE], 0.5),
        ([PROMOTED, CARRIED, REMOVED], 1.0),
        ([FAILED, CARRIED, CARRIED], 0.0),
        ([CARRIED, REMOVED], 1.0),
    ],
)
def test_the_share_is_of_the_tasks_that_had_to_be_tuned(tasks, share):
    assert held(tasks, min_refreshed=share)
    if share < 1:
        assert not held(tasks, min_refreshed=share + 0.01)


@pytest.mark.parametrize("harmed", [WORSE, FAILED, UNUSABLE])
def test_a_canary_that_failed_or_came_out_worse_keeps_the_alias_and_is_named(harmed):
    tasks = [PROMOTED] * 9 + [harmed]
    assert held(tasks, canaries=["promoted"])
    assert not held(tasks, canaries=["promoted", harmed.task])
    told = check_conditions(tasks, RefreshSettings(canaries=[harmed.task]))[-1].found
    assert f"'{harmed.task}'" in told


@pytest.mark.parametrize("well", [PROMOTED, NO_GAIN, CARRIED])
def test_a_canary_that_is_as_good_as_before_does_not(well):
    assert held([well], canaries=[well.task])
