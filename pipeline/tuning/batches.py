"""Which rows a step takes, and which rank runs them: pure functions, the same on every rank.

A trial's batch at its own step s depends on (its seed, s) alone: not on the other trials, not on
the number of ranks, not on where a run was interrupted.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pipeline.tuning.trials import Trial, random_numbers


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


def plan_microbatches(lengths: Sequence[int], world_size: int, token_budget: int) -> list[list[list[int]]]:
    """Deal rows into micro-batches: `[micro-batch][rank] -> row numbers`, padding kept small.

    Rows are sorted by length and cut where rows x longest would exceed `token_budget` on a rank.
    Every rank has every micro-batch, since under ZeRO-3 all ranks run the model together; a rank's
    share may be empty in the last one.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    plan = []
    while order:
        per_rank = max(1, token_budget // lengths[order[0]])
        chunk, order = order[: per_rank * world_size], order[per_rank * world_size :]
        plan.append([chunk[rank::world_size] for rank in range(world_size)])
    return plan
