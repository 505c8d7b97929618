"""Which rows a step takes and which rank runs them."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.token_set import TokenSet, flat_column
from pipeline.tuning.batches import (
    ENOUGH_TOKENS,
    PASS_TOKENS,
    RowCost,
    pass_budget,
    plan_rows,
    rows_of_step,
    unlabelled_rows_of_step,
)
from pipeline.tuning.trials import make_trial
from tests.corpora import make_task

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=80)


def trial_of(name: str, batch_size: int, seed: int = 0, **changes):
    return make_trial(name, make_task(batch_size=batch_size, **changes), seed, "corpus", "backbone")


def split_of(targets) -> TokenSet:
    """Rows of no tokens with these targets."""
    none = flat_column(np.empty(0, np.int32), np.zeros(len(targets) + 1, int), pa.array(targets, pa.large_string()))
    return TokenSet(np.arange(len(targets), dtype=np.uint64), none, none)


@given(total=st.integers(1, 50), batch=st.integers(1, 16))
def test_every_epoch_takes_every_row_exactly_once(total, batch):
    trial, split = trial_of("a", batch), split_of(["a"] * total)
    epochs = 3
    steps = -(-epochs * total // batch)
    taken = np.concatenate([rows_of_step(trial, split, step) for step in range(steps)])[: epochs * total]
    for epoch in np.split(taken, epochs):
        assert sorted(epoch) == list(range(total))


@given(total=st.integers(1, 50), batch=st.integers(2, 17))
def test_half_of_a_step_are_unlabelled_rows_and_every_epoch_of_these_takes_each_exactly_once(total, batch):
    trial, split = trial_of("a", batch), split_of(["a"] * total)
    steps = -(-2 * total // (batch // 2))
    of_steps = [unlabelled_rows_of_step(trial, split, step) for step in range(steps)]
    assert {len(rows) for rows in of_steps} == {batch // 2}
    for epoch in np.split(np.concatenate(of_steps)[: 2 * total], 2):
        assert sorted(epoch) == list(range(total))


@given(total=st.integers(1, 50), batch=st.integers(1, 16), size=st.integers(1, 16))
def test_a_step_of_fewer_rows_of_train_takes_those_of_a_trial_with_such_a_batch(total, batch, size):
    split, changes = split_of(["a", "b"] * total), {"balance": total % 2 == 0}
    for step in range(3):
        few = rows_of_step(trial_of("a", batch, **changes), split, step, size)
        np.testing.assert_array_equal(few, rows_of_step(trial_of("a", size, **changes), split, step))


def test_a_step_takes_the_same_rows_whatever_came_before_it():
    trial, split = trial_of("a", 5), split_of(["a"] * 33)
    forward = [rows_of_step(trial, split, step) for step in range(20)]
    backward = [rows_of_step(trial, split, step) for step in reversed(range(20))][::-1]
    np.testing.assert_array_equal(forward, backward)


def test_trials_of_other_names_or_seeds_take_other_rows():
    split = split_of(["a", "b"] * 500)
    for changes in ({}, {"balance": True}):
        first = rows_of_step(trial_of("a", 16, **changes), split, 0)
        assert list(first) != list(rows_of_step(trial_of("b", 16, **changes), split, 0))
        assert list(first) != list(rows_of_step(trial_of("a", 16, seed=1, **changes), split, 0))


TARGETS = st.lists(st.sampled_from("abcd"), min_size=1, max_size=40)


@given(targets=TARGETS, batch=st.integers(1, 16), step=st.integers(0, 50))
def test_a_balanced_step_has_equally_many_rows_of_every_target_of_the_split(targets, batch, step):
    rows = rows_of_step(trial_of("a", batch, balance=True), split_of(targets), step)
    counts = Counter(targets[row] for row in rows)
    least = batch // len(set(targets))
    assert len(rows) == batch and all(least <= counts[target] <= least + 1 for target in set(targets))


@given(targets=TARGETS, batch=st.integers(1, 16))
def test_balanced_steps_take_every_row_of_a_target_exactly_once_before_one_comes_again(targets, batch):
    trial, split, most = trial_of("a", batch, balance=True), split_of(targets), max(Counter(targets).values())
    steps = -(-most * len(set(targets)) // batch)
    taken = np.concatenate([rows_of_step(trial, split, step) for step in range(steps)])
    for target, own in split.rows_by_target.items():
        of_target = [row for row in taken if targets[row] == target]
        whole = len(of_target) // len(own) * len(own)
        assert whole >= len(own)
        for epoch in np.split(np.array(of_target[:whole]), whole // len(own)):
            assert sorted(epoch) == own.tolist()


def test_a_balanced_step_takes_the_same_rows_whatever_came_before_it():
    trial, split = trial_of("a", 5, balance=True), split_of(["a"] * 19 + ["b"])
    forward = [rows_of_step(trial, split, step) for step in range(20)]
    backward = [rows_of_step(trial, split, step) for step in reversed(range(20))][::-1]
    np.testing.assert_array_equal(forward, backward)


def loads_of(rows) -> list[RowCost]:
    """Rows of five trials with prompts of 1, 21, 41, … tokens; every other trial has a teacher with many words."""
    return [RowCost(slot, 1 + 20 * slot, own, 50 * slot if slot % 2 else None) for slot, own in rows]


def tokens_run(loads, share) -> int:
    """What a packed share runs: each of its prompts once, and its rows; and again behind a teacher's words."""
    taught = [row for row in share if loads[row].words is not None]
    student = sum({loads[row].slot: loads[row].prompt for row in share}.values()) + sum(loads[row].own for row in share)
    teacher = sum({loads[row].slot: loads[row].words for row in taught}.values())
    return student + teacher + sum(loads[row].own for row in taught)


rows_of_trials = st.lists(st.tuples(st.integers(0, 4), st.integers(1, 400)), min_size=1, max_size=60)


@settings(max_examples=500)
@given(rows_of_trials, st.integers(1, 5), st.integers(64, 2000), st.booleans())
def test_every_row_is_run_once_on_one_rank_within_the_token_budget(rows, world, budget, padded):
    loads = loads_of(rows)
    plan = plan_rows(loads, world, budget, padded)
    assert sorted(row for shares in plan for share in shares for row in share) == list(range(len(loads)))
    for shares in plan:
        assert len(shares) == world, "under ZeRO-3 every rank has every micro-batch"
        assert shares[0], "a rank without rows borrows from the first"
        for share in shares:
            longest = max((tokens_run(loads, [row]) for row in share), default=0)
            cost = len(share) * longest if padded else tokens_run(loads, share)
            assert len(share) <= 1 or cost <= budget


@given(rows_of_trials, st.integers(64, 5000))
def test_passes_on_a_cpu_are_as_small_as_they_gain_from_but_hold_any_trial_whole(rows, budget):
    loads = loads_of(rows)
    trials = [[row for row, load in enumerate(loads) if load.slot == slot] for slot in {load.slot for load in loads}]
    largest = max(tokens_run(loads, of_trial) for of_trial in trials)
    assert pass_budget(loads, budget) == min(budget, max(largest, ENOUGH_TOKENS))


@given(st.integers(2, 8), st.integers(1, 4), st.integers(5, 200))
def test_packed_prompts_run_once_where_trials_can_be_dealt_whole(trials, world, prompt):
    """The cost of a step hardly depends on the prompts' length only if no rank runs another's prompts."""
    loads = [RowCost(slot, prompt, 10) for slot in range(trials * world) for _ in range(8)]
    (shares,) = plan_rows(loads, world, 10**6, padded=False)
    assert sum(tokens_run(loads, share) for share in shares) == trials * world * (prompt + 80)
    assert len({tokens_run(loads, share) for share in shares}) == 1


@given(lengths, st.integers(1, 3), st.integers(64, 2000))
def test_padded_rows_are_cut_no_worse_than_one_row_a_pass(lengths, world, budget):
    def cost(plan) -> int:
        return sum(len(shares[0]) * max(lengths[row] for row in shares[0]) + PASS_TOKENS for shares in plan)

    loads = [RowCost(0, 0, length) for length in lengths]
    assert cost(plan_rows(loads, world, budget, padded=True)) <= cost(plan_rows(loads, world, 1, padded=True))
