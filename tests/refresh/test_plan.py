"""The plan: what is unchanged costs nothing, what changed starts warm where it can, and nothing is forgotten."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.refresh.plan import TaskInputs, plan_night, without_incumbent
from tests.refresh.records import failed_record, make_record

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
DIGESTS = st.sampled_from(["x", "y", "z"])
TONIGHT = st.one_of(
    st.just("no such file"),
    st.builds(TaskInputs, DIGESTS, DIGESTS, st.frozensets(st.sampled_from([4, 8]), min_size=1)),
)


@st.composite
def records(draw):
    name = draw(NAMES)
    if draw(st.booleans()) and draw(st.booleans()):
        return failed_record(name)
    kept = draw(st.booleans())
    length = draw(st.sampled_from([4, 8]))
    return make_record(
        name,
        status="kept" if kept else "tuned",
        reason="worse" if kept else None,
        length=length,
        shape=(length, 8),
        inputs_digest=draw(st.one_of(st.none(), DIGESTS)),
        corpus_digest=draw(DIGESTS),
    )


@given(
    st.dictionaries(NAMES, TONIGHT),
    st.lists(records(), unique_by=lambda r: r.name),
    st.booleans(),
    st.frozensets(NAMES),
)
def test_every_task_is_planned_once_and_by_its_digests_alone(tasks, old, same_backbone, others):
    incumbents = {record.name: record for record in old}
    plan = plan_night(tasks, incumbents, same_backbone, others)
    assert sorted(p.task for p in plan) == sorted({*tasks, *incumbents, *others})
    assert [p.task for p in plan][: len(tasks)] == list(tasks), "in the settings' order"
    assert plan == plan_night(tasks, incumbents, same_backbone, others)
    for planned in plan:
        tonight, record = tasks.get(planned.task), incumbents.get(planned.task)
        assert planned.why
        assert (planned.decision == "removed") == (tonight is None)
        assert (planned.decision == "unusable") == isinstance(tonight, str)
        if not isinstance(tonight, TaskInputs):
            assert not planned.trains
            continue
        there = record is not None and record.digest is not None
        unchanged = there and same_backbone and record.inputs_digest == tonight.inputs_digest
        assert (planned.decision == "carried") == unchanged, "unchanged, and that alone, costs no training"
        assert planned.trains == (not unchanged)
        assert (planned.decision == "retune") == (there and not same_backbone)
        # What is in the bank and can be loaded is always there to be compared with.
        assert (planned.incumbent is record) if there and same_backbone else planned.incumbent is None
        if planned.decision == "warm":
            assert record.length in tonight.lengths


@given(st.dictionaries(NAMES, st.builds(TaskInputs, DIGESTS, DIGESTS, st.just(frozenset([4]))), min_size=1))
def test_a_night_after_one_that_took_everything_has_nothing_to_do(tasks):
    tuned = {name: make_record(name, inputs_digest=t.inputs_digest) for name, t in tasks.items()}
    kept = {
        name: make_record(name, status="kept", reason="worse", inputs_digest=t.inputs_digest)
        for name, t in tasks.items()
    }
    for records_of_last_night in (tuned, kept):
        assert {p.decision for p in plan_night(tasks, records_of_last_night, True)} == {"carried"}


@pytest.mark.parametrize(
    ("record", "tonight", "decision", "why"),
    [
        (make_record(), TaskInputs("inputs", "corpus", frozenset([4])), "carried", "nothing changed"),
        (make_record(), TaskInputs("other", "more rows", frozenset([4])), "warm", "its corpus changed"),
        (make_record(), TaskInputs("other", "corpus", frozenset([4])), "warm", "settings or templates changed"),
        (make_record(), TaskInputs("other", "corpus", frozenset([8])), "cold", "prompt.length is 8 and was 4"),
        (make_record(), TaskInputs("other", "corpus", frozenset([4, 8])), "warm", "settings"),
        (make_record(inputs_digest=None), TaskInputs("other", "corpus", frozenset([4])), "warm", "does not tell"),
        (None, TaskInputs("inputs", "corpus", frozenset([4])), "cold", "a new task"),
        (failed_record(), TaskInputs("inputs", "corpus", frozenset([4])), "cold", "it failed"),
        (make_record(), "no such file", "unusable", "no such file"),
    ],
)
def test_a_task_is_planned_with_a_reason_that_says_what_changed(record, tonight, decision, why):
    (planned,) = plan_night({"film": tonight}, {"film": record} if record else {}, same_backbone=True)
    assert planned.decision == decision and why in planned.why


def test_another_backbone_retunes_all_and_leaves_nothing_to_compare_with():
    tasks = {"film": TaskInputs("inputs", "corpus", frozenset([4])), "new": TaskInputs("i", "c", frozenset([4]))}
    film, new = plan_night(tasks, {"film": make_record()}, same_backbone=False)
    assert (film.decision, film.incumbent) == ("retune", None) and "another backbone" in film.why
    assert new.decision == "cold"


def test_a_prompt_of_a_backbone_that_is_no_longer_the_same_is_tuned_anew_and_the_others_are_not():
    tasks = dict.fromkeys(("film", "book"), TaskInputs("inputs", "corpus", frozenset([4])))
    incumbents = {name: make_record(name) for name in tasks}
    film, book = plan_night(tasks, incumbents, same_backbone=True, foreign=("film",))
    assert (film.decision, film.incumbent) == ("retune", None) and book.incumbent == incumbents["book"]


def test_a_prompt_that_cannot_be_read_is_tuned_from_the_start_and_says_so():
    (planned,) = plan_night(
        {"film": TaskInputs("other", "c", frozenset([4]))}, {"film": make_record()}, same_backbone=True
    )
    again = without_incumbent(planned, "its blob is damaged")
    assert (again.decision, again.incumbent) == ("cold", None)
    assert "its corpus changed" in again.why and "its blob is damaged" in again.why
