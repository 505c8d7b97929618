"""Plots: what is drawn lies where it belongs, and what is not a number is not drawn."""

import math
import re

from hypothesis import given
from hypothesis import strategies as st

from pipeline.reporting.html import Curve, PastVersion
from pipeline.reporting.html.plots import HEIGHT, WIDTH, history_plot, loss_plot, loss_spark, metric_plot
from pipeline.reporting.html.scale import axis_of, thin
from tests.reporting.html.nights import task

values = st.one_of(st.none(), st.floats(-1e12, 1e12), st.just(math.nan), st.just(math.inf))
series = st.lists(values, max_size=400).map(lambda found: list(enumerate(found, start=1)))


def places(path: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r"[ML](-?[\d.]+),(-?[\d.]+)", path)]


@given(losses=series, evaluations=series, others=st.lists(series, max_size=2))
def test_every_point_lies_within_its_plot_whatever_the_numbers(losses, evaluations, others):
    curves = [Curve("a", losses, evaluations, best=True), *(Curve("b", other, other) for other in others)]
    night = task("film", "cold", curves=curves, history=[])
    for draw in (loss_plot, metric_plot, loss_spark):
        plot = draw(night)
        for x, y in [place for _, path in plot.lines for place in places(path)] if plot else []:
            assert 0 <= x <= plot.width and 0 <= y <= plot.height


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=30))
def test_an_axis_holds_its_values_and_has_a_few_ticks(found):
    axis = axis_of(found, 134, 8)
    assert all(8 <= axis.place(value) <= 134 for value in found)
    assert 3 <= len(axis.ticks) <= 8 and all(axis.low <= tick <= axis.high for tick in axis.ticks)


@given(series, st.integers(1, 200))
def test_few_points_hide_no_peak(found, most):
    buckets = thin(found, most)
    assert len(buckets) <= most
    finite = [value for _, value in found if value is not None and math.isfinite(value)]
    drawn = [bucket for bucket in buckets if bucket.mean is not None]
    assert bool(drawn) == bool(finite)
    if finite:
        assert (min(b.low for b in drawn), max(b.high for b in drawn)) == (min(finite), max(finite))


def test_a_loss_that_falls_is_drawn_from_the_upper_left_to_the_lower_right():
    plot = loss_plot(task("film", "cold", curves=[Curve("film", [(n, 3 - n / 50) for n in range(1, 101)])]))
    drawn = places(dict(plot.lines)["loss"])
    assert drawn == sorted(drawn) and drawn[0][0] < 60 and drawn[-1][0] == 330 and drawn[0][1] < 20 < 120 < drawn[-1][1]
    assert plot.title == "Training loss of film: 2.980 at step 1, 1.000 at step 100"


def test_what_is_not_a_number_leaves_a_gap():
    plot = loss_plot(task("film", "cold", curves=[Curve("film", [(1, 3.0), (2, 2.0), (3, None), (4, 2.0), (5, 1.0)])]))
    assert dict(plot.lines)["loss"].count("M") == 2


def test_a_spike_makes_the_axis_logarithmic_and_the_title_says_so():
    plot = loss_plot(task("film", "cold", curves=[Curve("film", [(1, 2.0), (2, 9e5), (3, 1.5)])]))
    assert "logarithmic" in plot.title and [tick.text for tick in plot.y_ticks][-1] == "1e+06"


def test_other_trials_of_a_sweep_are_behind_the_best_one():
    curves = [Curve("a", [(1, 2.0), (2, 1.0)]), Curve("b", [(1, 2.0), (2, 0.5)], best=True)]
    plot = loss_plot(task("film", "cold", curves=curves))
    assert [kind for kind, _ in plot.lines] == ["other", "loss"] and "0.500 at step 2" in plot.title


def test_the_banks_prompt_is_a_dashed_line_among_the_evaluations():
    plot = metric_plot(task("film", "kept", incumbent=0.95, curves=[Curve("film", [], [(0, 0.5), (10, 0.9)])]))
    assert [kind for kind, _ in plot.lines] == ["incumbent", "metric"] and "bank: 0.950" in plot.title


def test_versions_are_drawn_in_order_and_unmeasured_ones_are_named_but_not_drawn():
    past = [PastVersion(7, 0.5, "tuned"), PastVersion(8, None, "failed"), PastVersion(9, 0.7, "carried_forward")]
    plot = history_plot(task("film", "carried", history=past))
    assert [tick.text for tick in plot.x_ticks] == ["7", "8", "9"] and [dot.kind for dot in plot.dots] == [
        "tuned", "carried",
    ]  # fmt: skip
    assert "version 8: – (failed)" in plot.title and plot.width == WIDTH and plot.height == HEIGHT


def test_without_a_curve_or_a_version_there_is_no_plot():
    night = task("film", "removed", curves=[], history=[], incumbent=None)
    assert [draw(night) for draw in (loss_plot, metric_plot, history_plot, loss_spark)] == [None] * 4
