"""Whether a new prompt may take the place of the bank's: a paired test on tonight's dev rows.

The test is approximate randomisation (Noreen 1989; for metrics of language tasks Yeh 2000). If the two prompts are
equally good, then for each row it is as likely as not that their answers were the other way round; so the answers are
swapped, row by row, by the toss of a coin, the metric of both sides is computed anew, and the p-value is the share of
such shuffles in which the old prompt leads by as much as it really does. Why this one: it is paired (both prompts
answered the same rows, and hard rows are hard for both), it assumes nothing of how scores are distributed, and it fits
every metric here alike, also macro-F1, which is no mean over rows and which a sign test, McNemar's or a t-test cannot
take. Where few rows differ, all their swaps are counted instead of drawn: the p-value is then exact.

A new prompt is refused when

- the one-sided test finds it worse at the level `alpha`: an equally good one is refused on at most that share of
  nights;
- or its metric is worse by more than `margin`, whatever the test says. Four rows can never reach 0.05 (the least
  p-value is 1/16), so on a tiny dev split the test alone would let anything pass. The price: on small splits chance
  alone goes beyond the margin, too (two unrelated systems of accuracy 0.7 on 60 rows: one night in ten; on 500 rows it
  adds nothing);
- or it is not above what always giving train's most frequent target scores, while the bank's prompt is. Where neither
  is, the other two decide: keeping the bank's would be no better.

Else it is promoted. This is no proof that it is better: it was chosen by its metric on these very rows, which flatters
it, while the old one may have been chosen on others. The gate is there to keep out what is worse.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.run.results import below_constant
from pipeline.tuning.incumbents import Pair

SHUFFLES = 9_999
_BLOCK = 2_000
_TIE = 1e-9
"""Sums of the same numbers in another order differ by less."""


@dataclass(frozen=True)
class Verdict:
    incumbent: float
    """Metric of the bank's prompt on tonight's dev rows."""
    new: float
    """Of the new one, on the same rows."""
    p_value: float
    """How likely a lead of the bank's prompt as large as this is, if both are equally good."""
    refused: str | None
    """Why the new one is not promoted, in one sentence."""


def judge(
    metric: str, pair: Pair, alpha: float, margin: float | None, seed: int = 0, constant: float | None = None
) -> Verdict:
    """Compare two prompts row by row; the same numbers give the same verdict.

    constant: what an answer that never looks at the row scores on the same rows (`constant_scores`), where known.
    """
    incumbent, new, p_value = compare(metric, pair, seed)
    worse_by = _sign(metric) * (incumbent - new)
    allowed = None if margin is None else margin * (abs(incumbent) if metric == "loss" else 1.0)
    figures = f"dev {metric} {new:.3f} where the bank's prompt has {incumbent:.3f} on the same {len(pair.new)} rows"
    refused = None
    if not np.isfinite(new):
        refused = f"its dev {metric} is not a number"
    elif p_value <= alpha:
        refused = f"{figures}; a paired randomisation test finds it worse (p = {p_value:.3g})"
    elif allowed is not None and worse_by > allowed:
        refused = f"{figures}; that is worse by more than the margin {margin:g}"
    elif (unlearned := below_constant(metric, new, constant)) and not below_constant(metric, incumbent, constant):
        refused = f"{figures}, and {unlearned}"
    return Verdict(incumbent, new, p_value, refused)


def compare(metric: str, pair: Pair, seed: int = 0, shuffles: int = SHUFFLES) -> tuple[float, float, float]:
    """-> both metrics, and the one-sided p-value for the new prompt being worse."""
    sides = _columns(metric, pair)
    old, new = sides[0].sum(0), sides[1].sum(0)
    values = float(_metric(metric, old)), float(_metric(metric, new))
    differs = (sides[0] != sides[1]).any(1)
    changes = (sides[1] - sides[0])[differs]  # [D, K]
    lead = _sign(metric) * (values[0] - values[1])
    if not np.isfinite(lead):
        return *values, 0.0 if np.isfinite(values[0]) else 1.0
    exact = 2 ** len(changes) <= shuffles + 1
    total = 2 ** len(changes) if exact else shuffles
    rng = np.random.default_rng(seed)
    as_large = 0
    for first in range(0, total, _BLOCK):
        count = min(_BLOCK, total - first)
        if exact:
            swaps = (np.arange(first, first + count)[:, None] >> np.arange(len(changes))) & 1  # [count, D]
        else:
            swaps = rng.integers(0, 2, (count, len(changes)))
        moved = swaps @ changes  # [count, K]
        leads = _sign(metric) * (_metric(metric, old + moved) - _metric(metric, new - moved))
        as_large += int((leads >= lead - _TIE).sum())
    # Of drawn shuffles the real one counts as one more, so that no p-value is 0 (Noreen 1989; Davison & Hinkley 1997).
    return *values, as_large / total if exact else (as_large + 1) / (total + 1)


def _columns(metric: str, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """Both sides as `[N, K]`, so that a metric follows from the sums of the columns."""
    if metric == "accuracy":
        return _right(pair.incumbent), _right(pair.new)
    if metric == "f1":
        labels = int(max(pair.incumbent.max(initial=0), pair.new.max(initial=0))) + 1
        return _hits(pair.incumbent, labels), _hits(pair.new, labels)
    return pair.incumbent, pair.new


def _right(outcomes: np.ndarray) -> np.ndarray:
    return np.stack([outcomes[:, 0] == outcomes[:, 1], np.ones(len(outcomes))], axis=1).astype(np.float64)


def _hits(outcomes: np.ndarray, labels: int) -> np.ndarray:
    """`[N, 3 L]`: for each label whether it was answered rightly, answered, and wanted."""
    answered, wanted = (outcomes[:, side, None] == np.arange(labels) for side in (0, 1))
    return np.concatenate([answered & wanted, answered, wanted], axis=1).astype(np.float64)


def _metric(metric: str, sums: np.ndarray) -> np.ndarray:
    """The metric of `[…, K]` sums, as `tuning.metrics` has it."""
    if metric != "f1":
        quotient: np.ndarray = sums[..., 0] / sums[..., 1]
        return quotient
    hits, answered, wanted = np.split(sums, 3, axis=-1)
    there = answered + wanted > 0
    scores = np.divide(2 * hits, answered + wanted, out=np.zeros_like(hits), where=there)
    mean: np.ndarray = scores.sum(-1) / there.sum(-1)
    return mean


def _sign(metric: str) -> float:
    return -1.0 if metric == "loss" else 1.0
