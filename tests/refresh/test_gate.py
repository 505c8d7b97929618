"""The gate's statistics: an equally good prompt is rarely refused, a clearly worse one nearly always."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.refresh import gate
from pipeline.refresh.gate import compare, judge
from pipeline.tuning.incumbents import Pair
from pipeline.tuning.metrics import label_metric

METRICS = ("accuracy", "f1", "exact_match", "rouge_l", "loss")
ALPHA = 0.05


def outcomes(rng, metric: str, rows: int, quality: float, wanted=None) -> np.ndarray:
    """`[rows, 2]`: how a prompt of this quality (0 to 1) answers."""
    if metric in ("accuracy", "f1"):
        wanted = rng.integers(0, 3, rows) if wanted is None else wanted
        right = rng.random(rows) < quality
        return np.stack([np.where(right, wanted, (wanted + rng.integers(1, 3, rows)) % 3), wanted], 1).astype(float)
    if metric == "loss":
        return np.stack([rng.gamma(2.0, 2.0 - quality, rows), np.full(rows, 3.0)], 1)
    scores = rng.random(rows) < quality if metric == "exact_match" else rng.beta(4 * quality, 4 * (1 - quality), rows)
    return np.stack([scores, np.ones(rows)], 1).astype(float)


def make_pair(rng, metric: str, rows: int, old: float, new: float) -> Pair:
    wanted = rng.integers(0, 3, rows)
    return Pair(outcomes(rng, metric, rows, old, wanted), outcomes(rng, metric, rows, new, wanted))


def refusals(metric: str, old: float, new: float, nights: int = 400, rows: int = 60) -> float:
    rng = np.random.default_rng(7)
    pairs = (make_pair(rng, metric, rows, old, new) for _ in range(nights))
    return float(np.mean([compare(metric, pair, night, shuffles=199)[2] <= ALPHA for night, pair in enumerate(pairs)]))


@pytest.mark.parametrize("metric", METRICS)
def test_an_equally_good_prompt_is_refused_about_as_often_as_alpha_says(metric):
    # Of 400 nights at a rate of 0.05, four standard deviations are 0.044; discrete metrics stay below the rate.
    assert 0.01 <= refusals(metric, 0.7, 0.7) <= ALPHA + 0.044


@pytest.mark.parametrize("metric", METRICS)
def test_a_clearly_worse_prompt_is_nearly_always_refused_and_a_better_one_never(metric):
    assert refusals(metric, 0.9, 0.4, 100) > 0.9
    assert refusals(metric, 0.4, 0.9, 100) == 0.0


def test_few_rows_that_differ_are_counted_exactly():
    def pair(old, new):
        return Pair(np.array([old, [1] * len(old)], float).T, np.array([new, [1] * len(new)], float).T)

    # The old prompt is right on five rows where the new one is wrong: one of the 2^5 swaps leads by as much.
    assert compare("exact_match", pair([1] * 5 + [1, 0, 0], [0] * 5 + [1, 0, 0])) == (6 / 8, 1 / 8, 1 / 32)
    # Four against one: swaps that leave four or five of the five with the old side: (5 + 1) / 32.
    assert compare("accuracy", pair([1, 1, 1, 1, 0], [0, 0, 0, 0, 1]))[2] == 6 / 32
    assert compare("exact_match", pair([1, 0, 1], [1, 0, 1]))[2] == 1.0
    # Loss, in nats: only when no row is swapped does the old side lead by 1 + 2 + 4.
    assert compare("loss", pair([1, 1, 1], [2, 3, 5]))[2] == 1 / 8


@settings(max_examples=40)
@given(st.sampled_from(METRICS), st.integers(1, 8), st.floats(0.1, 0.9), st.floats(0.1, 0.9), st.integers(0, 2**16))
def test_the_p_value_of_few_rows_is_that_of_every_swap_computed_from_the_rows_themselves(metric, rows, old, new, seed):
    pair = make_pair(np.random.default_rng(seed), metric, rows, old, new)

    def value(side):
        if metric == "f1":
            return label_metric("f1", side[:, 0].astype(int).tolist(), side[:, 1].astype(int).tolist())
        if metric == "accuracy":
            return float(np.mean(side[:, 0] == side[:, 1]))
        return side[:, 0].sum() / side[:, 1].sum() * (-1 if metric == "loss" else 1)

    leads = []
    for swap in product([False, True], repeat=rows):
        swapped = np.array(swap)[:, None]
        a, b = np.where(swapped, pair.new, pair.incumbent), np.where(swapped, pair.incumbent, pair.new)
        leads.append(value(a) - value(b))
    got_old, got_new, p_value = compare(metric, pair)
    sign = -1 if metric == "loss" else 1
    assert (got_old * sign, got_new * sign) == pytest.approx((value(pair.incumbent), value(pair.new)))
    assert p_value == pytest.approx(np.mean(np.array(leads) >= leads[0] - 1e-9))


@pytest.mark.parametrize("metric", METRICS)
def test_drawn_shuffles_agree_with_all_of_them(metric, monkeypatch):
    pair = make_pair(np.random.default_rng(3), metric, 12, 0.8, 0.5)
    exact = compare(metric, pair)[2]
    drawn = compare(metric, pair, shuffles=2_000)[2]
    assert drawn == pytest.approx(exact, abs=0.05)
    assert compare(metric, pair, shuffles=2_000)[2] == drawn, "the same numbers give the same verdict"


def test_where_rows_are_too_few_for_the_test_the_margin_refuses():
    pair = Pair(np.array([[1.0, 1.0]] * 4), np.array([[0.0, 1.0]] * 4))
    assert judge("exact_match", pair, ALPHA, None).refused is None
    verdict = judge("exact_match", pair, ALPHA, 0.1)
    assert verdict.p_value == 1 / 16 and "margin 0.1" in verdict.refused
    loss = Pair(np.array([[2.0, 1.0]] * 2), np.array([[2.1, 1.0]] * 2))
    assert judge("loss", loss, ALPHA, 0.1).refused is None, "5 % of the old loss"
    assert "margin" in judge("loss", loss, ALPHA, 0.04).refused


def test_a_prompt_that_is_worse_beyond_noise_is_refused_with_the_figures():
    rng = np.random.default_rng(0)
    refused = judge("accuracy", make_pair(rng, "accuracy", 100, 0.9, 0.6), ALPHA, None).refused
    assert "paired randomisation test" in refused and "100 rows" in refused
    assert judge("accuracy", make_pair(rng, "accuracy", 100, 0.6, 0.9), ALPHA, 0.1).refused is None


def test_a_prompt_whose_outcome_is_no_number_is_refused():
    pair = Pair(np.array([[1.0, 1.0]] * 3), np.array([[np.nan, 1.0]] * 3))
    assert "not a number" in judge("loss", pair, ALPHA, None).refused


def test_the_number_of_shuffles_can_tell_the_default_level_apart():
    assert 1 / (gate.SHUFFLES + 1) < ALPHA / 100


@pytest.mark.parametrize(("old", "new", "refused"), [(17, 16, True), (15, 16, False), (17, 18, False)])
def test_a_prompt_above_a_constant_answer_is_kept_against_one_that_is_not(old, new, refused):
    """Of 20 rows; the constant answer is right on 16. Where neither is above it, the test and the margin decide."""
    sides = [np.stack([np.arange(20) >= right, np.zeros(20)], 1).astype(float) for right in (old, new)]
    verdict = judge("accuracy", Pair(*sides), ALPHA, 0.1, constant=0.8)
    assert (verdict.refused is not None) == refused
    assert not refused or "most frequent target has 0.800" in verdict.refused
