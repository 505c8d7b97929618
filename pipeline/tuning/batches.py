"""Which rows a step takes, and which rank runs them: pure functions, the same on every rank.

A trial's batch at its own step s depends on (its task and rows, its seed, s) alone: not on the other trials, not on
the number of ranks, not on where a run was interrupted.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.corpus.token_set import TokenSet
from pipeline.tuning.initialise import rows_started_from
from pipeline.tuning.trials import Trial, random_numbers

PASS_TOKENS = 100
"""What a forward and backward pass costs beside its tokens (gathers, dispatch), in tokens; measured on a CPU."""

ENOUGH_TOKENS = 1024
"""Tokens of a pass beyond which a CPU gains nothing, as measured (docs/benchmarks.md)."""


def rows_of_step(trial: Trial, train: TokenSet, step: int, size: int | None = None) -> np.ndarray:
    """Row numbers `[size]` of a trial's step: epoch after epoch, each in its own random order.

    A step has `batch_size` rows of train, unless `size` says how many.
    With `balance` the targets of the split take turns, row by row, and each has epochs of its own, so that rows of a
    rare target come more often. Over whole epochs this is the loss of weighting rows by their target's inverse
    frequency. It is done by drawing, because at 95 to 5 nearly half of all batches of 16 rows would hold no rare row to
    weight, and most others one that outweighs the rest, where here each holds eight; because a step's loss stays a
    plain mean; and because fine-tuning and LoRA take the same rows from here.
    """
    size, shown = size or trial.settings.batch_size, rows_started_from(trial, train)  # few rows, or none
    at = np.arange(step * size, (step + 1) * size)
    if not trial.settings.balance:
        rows = _in_turn(trial, len(train) - len(shown), at)
        for row in shown:
            rows[rows >= row] += 1
        return rows
    targets = train.rows_by_target
    rows = np.empty(size, dtype=np.int64)
    for place, (target, own) in enumerate(targets.items()):
        here = at % len(targets) == place
        if len(shown):
            left = own[~np.isin(own, shown)]
            own = left if len(left) else own
        rows[here] = own[_in_turn(trial, len(own), at[here] // len(targets), target)]
    return rows


def unlabelled_rows_of_step(trial: Trial, unlabelled: TokenSet, step: int) -> np.ndarray:
    """Numbers `[batch_size // 2]` of the unlabelled rows of a trial's step, in epochs of their own.

    They are half of a step however many there are. Mixed by their numbers, a few labelled rows beside many unlabelled
    ones would be in few steps, and what the labels say would come in jolts.
    """
    size = trial.settings.batch_size // 2
    return _in_turn(trial, len(unlabelled), np.arange(step * size, (step + 1) * size), "unlabelled")


def _in_turn(trial: Trial, total: int, at: np.ndarray, *of: str) -> np.ndarray:
    """Which of `total` rows come at the places `at` of the order that all epochs make."""
    epochs, places = np.divmod(at, total)
    rows = np.empty(len(at), dtype=np.int64)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        rows[here] = _orders.of(trial.seed, trial.task, total, epoch, *of)[places[here]]
    return rows


class _EpochOrders:
    """The orders of the epochs that trials are in, four bytes a row: what a rank holds that grows with a split's rows.

    Those used last are kept, up to a number of bytes: a step of many trials asks for all of theirs again.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._kept: dict[tuple[object, ...], np.ndarray] = {}

    def of(self, seed: int, task: str, total: int, epoch: int, *of: str) -> np.ndarray:
        key = (seed, task, total, epoch, *of)
        order = self._kept.pop(key, None)
        if order is None:
            order = random_numbers(seed, task, "rows", epoch, *of).permutation(total).astype(np.int32)
            self._bytes += order.nbytes
        self._kept[key] = order
        while self._bytes > self._most and len(self._kept) > 1:
            self._bytes -= self._kept.pop(next(iter(self._kept))).nbytes
        return order


_orders = _EpochOrders(most_bytes=512 * 2**20)


@dataclass(frozen=True)
class RowCost:
    """What running one row costs, in tokens."""

    slot: int
    """The prompt that it runs behind; rows of one slot share it where it runs once."""
    prompt: int
    own: int
    """Input, target and labels."""
    words: int | None = None
    """Tokens of a teacher's words, behind which the row runs a second time. That pass keeps nothing for a backward
    pass, and slots may share their words: so this counts rather too much than too little."""
    shared: int = 0
    """Of the row's own tokens, those that all rows of the slot begin with; they run once where rows are packed."""

    @property
    def prompts(self) -> int:
        """What runs once for rows of a slot that are packed, and with each row where they are padded."""
        return self.prompt + (self.words or 0) + self.shared * self.passes

    @property
    def run(self) -> int:
        """The other tokens, as often as they run."""
        return (self.own - self.shared) * self.passes

    @property
    def passes(self) -> int:
        return 1 if self.words is None else 2


Plan = list[list[list[int]]]
"""`[micro-batch][rank] -> row numbers`. Every rank has every micro-batch, since under ZeRO-3 all run the model
together; a share may be empty, but never the first."""


def pass_budget(costs: Sequence[RowCost], token_budget: int) -> int:
    """Tokens of a pass for rows whose model is at hand whole, on a CPU, where smaller passes cost nothing.

    A pass keeps all that its backward pass needs, so memory follows it. No slot's rows are split for that, as its
    prompt would run twice.
    """
    of_slot: dict[int, list[int]] = {}
    for row, cost in enumerate(costs):
        of_slot.setdefault(cost.slot, []).append(row)
    largest = max((_cost(costs, rows) for rows in of_slot.values()), default=0)
    return min(token_budget, max(ENOUGH_TOKENS, largest))


def one_prompt_each(costs: Sequence[RowCost]) -> list[RowCost]:
    """Costs of rows each of which runs with a prompt of its own, as an encoder reads it."""
    return [replace(cost, slot=row) for row, cost in enumerate(costs)]


def plan_rows(costs: Sequence[RowCost], world_size: int, token_budget: int, padded: bool) -> Plan:
    """Deal rows to ranks and micro-batches of at most `token_budget` tokens (a single row may be longer).

    Where rows are padded to the longest, each carries its own prompt; where they are not, a slot's prompt runs
    once in every share that has rows of it, and rows behind one prompt stay together.
    """
    if padded:
        return _plan_padded([cost.prompts + cost.run for cost in costs], world_size, token_budget)
    total = _cost(costs, range(len(costs)))
    passes = max(1, -(-total // (token_budget * world_size)))
    while True:
        bins = _fill(costs, passes * world_size, token_budget)
        if passes * world_size >= len(costs) or all(_cost(costs, rows) <= token_budget for rows in bins):
            break
        passes += 1
    # Ranks wait for one another: micro-batches of like cost, the costliest first.
    bins.sort(key=lambda rows: -_cost(costs, rows))
    plan = [bins[i : i + world_size] for i in range(0, len(bins), world_size)]
    return [shares for shares in plan if shares[0]]


def _fill(costs: Sequence[RowCost], count: int, token_budget: int) -> list[list[int]]:
    """Rows in `count` bins of like cost; a prompt's rows are split only where they would overfill one."""
    of_slot: dict[int, list[int]] = {}
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row].run, row)):
        of_slot.setdefault(costs[row].slot, []).append(row)
    fair = sum(_cost(costs, rows) for rows in of_slot.values()) / count
    parts = []
    for rows in of_slot.values():
        pieces = min(len(rows), max(1, round(_cost(costs, rows) / fair)))
        while pieces < len(rows) and _cost(costs, rows[::pieces]) > token_budget:  # the first piece is the costliest
            pieces += 1
        parts += [rows[piece::pieces] for piece in range(pieces)]
    bins: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for part in sorted(parts, key=lambda part: -_cost(costs, part)):
        least = min(range(count), key=lambda i: filled[i])
        bins[least] += part
        filled[least] += _cost(costs, part)
    return bins


def _cost(costs: Sequence[RowCost], rows: Sequence[int]) -> int:
    """Tokens that run when these rows are packed."""
    prompts = {costs[row].slot: costs[row].prompts for row in rows}
    return sum(prompts.values()) + sum(costs[row].run for row in rows)


def _plan_padded(lengths: Sequence[int], world_size: int, token_budget: int) -> Plan:
    """Rows sorted by length and cut so that padding and the passes' fixed cost are least together."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups = [order[i : i + world_size] for i in range(0, len(order), world_size)]
    plan = []
    for first, end in _cheapest_cuts([lengths[group[0]] for group in groups], token_budget):
        chunk = [row for group in groups[first:end] for row in group]
        plan.append([chunk[rank::world_size] for rank in range(world_size)])
    return plan


def _cheapest_cuts(longest: Sequence[int], token_budget: int) -> list[tuple[int, int]]:
    """Cut falling lengths into runs; a run costs a pass and its size x its first length."""
    cost, end_of = [0] * (len(longest) + 1), [0] * len(longest)
    for first in reversed(range(len(longest))):
        most = max(1, token_budget // longest[first])
        ends = range(first + 1, min(first + most, len(longest)) + 1)
        run_cost = {end: (end - first) * longest[first] + PASS_TOKENS + cost[end] for end in ends}
        end_of[first] = min(run_cost, key=lambda end: (run_cost[end], -end))
        cost[first] = run_cost[end_of[first]]
    cuts, first = [], 0
    while first < len(longest):
        cuts.append((first, end_of[first]))
        first = end_of[first]
    return cuts
