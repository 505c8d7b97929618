"""Which rows a step takes, and which rank runs them: pure functions, the same on every rank.

A trial's batch at its own step s depends on (its seed, s) alone: not on the other trials, not on
the number of ranks, not on where a run was interrupted.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pipeline.tuning.trials import Trial, random_numbers

PASS_TOKENS = 100
"""What a forward and backward pass costs beside its tokens (gathers, dispatch), in tokens; measured on a CPU."""


def rows_of_step(trial: Trial, total: int, step: int) -> np.ndarray:
    """Row numbers `[batch_size]` of a trial's step: epoch after epoch, each in its own random order."""
    size = trial.settings.batch_size
    at = np.arange(step * size, (step + 1) * size)
    epochs, places = np.divmod(at, total)
    orders = [_epoch_order(trial.seed, trial.name, total, int(epoch)) for epoch in epochs]
    return np.array([order[place] for order, place in zip(orders, places, strict=True)], dtype=np.int64)


@lru_cache(maxsize=256)
def _epoch_order(seed: int, name: str, total: int, epoch: int) -> np.ndarray:
    return random_numbers(seed, name, "rows", epoch).permutation(total).astype(np.int32)


def plan_microbatches(
    lengths: Sequence[int], world_size: int, token_budget: int, padded: bool
) -> list[list[list[int]]]:
    """Deal rows into micro-batches: `[micro-batch][rank] -> row numbers`, at the least cost.

    Rows are sorted by length and cut with rows x longest within `token_budget` on every rank (a single
    row may be longer): into few passes, or, where padding is computed (`padded`), so that padding and
    the passes' fixed cost are least together. Every rank has every micro-batch, since under ZeRO-3 all
    run the model together; a share may be empty in the last one.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups = [order[i : i + world_size] for i in range(0, len(order), world_size)]
    cuts = _cheapest_cuts([lengths[group[0]] for group in groups], token_budget, padded)
    plan = []
    for first, end in cuts:
        chunk = [row for group in groups[first:end] for row in group]
        plan.append([chunk[rank::world_size] for rank in range(world_size)])
    return plan


def _cheapest_cuts(longest: Sequence[int], token_budget: int, padded: bool) -> list[tuple[int, int]]:
    """Cut falling lengths into runs; a run costs a pass and, padded, its size x its first length."""
    cost, end_of = [0] * (len(longest) + 1), [0] * len(longest)
    for first in reversed(range(len(longest))):
        most = max(1, token_budget // longest[first])
        ends = range(first + 1, min(first + most, len(longest)) + 1)
        run_cost = {end: (end - first) * longest[first] * padded + PASS_TOKENS + cost[end] for end in ends}
        end_of[first] = min(run_cost, key=lambda end: (run_cost[end], -end))
        cost[first] = run_cost[end_of[first]]
    cuts, first = [], 0
    while first < len(longest):
        cuts.append((first, end_of[first]))
        first = end_of[first]
    return cuts
