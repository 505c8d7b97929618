"""Which rows a step takes and which rank runs them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.tuning.batches import PASS_TOKENS, plan_microbatches, rows_of_step
from pipeline.tuning.trials import make_trial
from tests.corpora import make_task

lengths = st.lists(st.integers(1, 300), min_size=1, max_size=80)


def trial_of(name: str, batch_size: int, seed: int = 0):
    return make_trial(name, make_task(batch_size=batch_size), seed, "corpus", "backbone")


@given(total=st.integers(1, 50), batch=st.integers(1, 16))
def test_every_epoch_takes_every_row_exactly_once(total, batch):
    trial = trial_of("a", batch)
    epochs = 3
    steps = -(-epochs * total // batch)
    taken = np.concatenate([rows_of_step(trial, total, step) for step in range(steps)])[: epochs * total]
    for epoch in np.split(taken, epochs):
        assert sorted(epoch) == list(range(total))


def test_a_step_takes_the_same_rows_whatever_came_before_it():
    trial = trial_of("a", 5)
    forward = [rows_of_step(trial, 33, step) for step in range(20)]
    backward = [rows_of_step(trial, 33, step) for step in reversed(range(20))][::-1]
    np.testing.assert_array_equal(forward, backward)


def test_trials_of_other_names_or_seeds_take_other_rows():
    first = rows_of_step(trial_of("a", 16), 1000, 0)
    assert list(first) != list(rows_of_step(trial_of("b", 16), 1000, 0))
    assert list(first) != list(rows_of_step(trial_of("a", 16, seed=1), 1000, 0))


@given(lengths, st.integers(1, 5), st.integers(64, 2000), st.booleans())
def test_every_row_is_run_once_on_one_rank_within_the_token_budget(lengths, world, budget, padded):
    plan = plan_microbatches(lengths, world, budget, padded)
    assert sorted(row for shares in plan for share in shares for row in share) == list(range(len(lengths)))
    for shares in plan:
        assert len(shares) == world, "under ZeRO-3 every rank has every micro-batch"
        assert shares[0], "a rank without rows borrows from the first"
        for share in shares:
            longest = max((lengths[row] for row in share), default=0)
            assert len(share) * longest <= max(budget, longest)


@given(lengths, st.integers(1, 3), st.integers(64, 2000))
def test_cuts_cost_no_more_than_one_pass_for_all_or_one_for_each_row(lengths, world, budget):
    def cost(plan) -> int:
        return sum(len(shares[0]) * max(lengths[row] for row in shares[0]) + PASS_TOKENS for shares in plan)

    chosen = cost(plan_microbatches(lengths, world, budget, padded=True))
    assert chosen <= cost(plan_microbatches(lengths, world, budget, padded=False))
    assert chosen <= cost(plan_microbatches(lengths, world, 1, padded=True))
