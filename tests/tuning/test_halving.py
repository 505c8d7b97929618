"""Successive halving's decisions: slots stay filled, one in `factor` goes on, and when trials arrive decides little."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from pipeline.tuning.halving import SweepTrial, rungs, verdicts
from tests.corpora import make_task


def test_rungs_lie_a_factor_apart_and_before_the_last_step():
    task = make_task(max_steps=200, eval_every=10, halving={"first": 2, "factor": 3})
    assert rungs(task) == (2, 6, 18)
    assert rungs(make_task(max_steps=180, eval_every=10, halving={"first": 2, "factor": 3})) == (2, 6)
    assert rungs(make_task(max_steps=200, eval_every=10)) == ()


@st.composite
def sweeps(draw):
    factor = draw(st.integers(2, 4))
    total = draw(st.integers(2, 12))
    evaluations = draw(st.integers(2, 9))
    levels = [[float(draw(st.integers(0, 5))) for _ in range(evaluations)] for _ in range(total)]
    of_rungs = tuple(factor**k for k in range(4) if factor**k < evaluations)
    return levels, of_rungs, factor, draw(st.integers(1, total))


def run(levels, of_rungs, factor, slots):
    """A sweep run to its end, an evaluation a round; who was judged out, and how full each round was."""
    trials = [SweepTrial((), "waiting") for _ in levels]
    out, rounds = set(), []
    while True:
        judged = verdicts(trials, of_rungs, factor)
        assert set(judged) == {place for place, trial in enumerate(trials) if trial.status == "paused"}
        for place in [place for place, verdict in judged.items() if verdict == "out"]:
            trials[place] = replace(trials[place], status="ended")
            out.add(place)
        wanting = [place for place, verdict in judged.items() if verdict == "go on"]
        wanting += [place for place, trial in enumerate(trials) if trial.status == "waiting"]
        free = slots - sum(trial.status == "live" for trial in trials)
        for place in wanting[:free]:
            trials[place] = replace(trials[place], status="live")
        live = [place for place, trial in enumerate(trials) if trial.status == "live"]
        if not live:
            return trials, out
        rounds.append(len(live))
        assert len(live) == slots or not wanting[free:], "a slot is free while a trial could run"
        for place in live:
            scores = tuple((score, 0.0) for score in levels[place][: len(trials[place].scores) + 1])
            status = "ended" if len(scores) == len(levels[place]) else "paused" if len(scores) in of_rungs else "live"
            trials[place] = SweepTrial(scores, status)


@given(sweeps())
def test_a_sweep_always_comes_to_an_end_and_at_least_one_trial_to_its_last_step(sweep):
    levels, of_rungs, factor, slots = sweep
    trials, out = run(levels, of_rungs, factor, slots)
    assert all(trial.status == "ended" for trial in trials)
    whole = {place for place, trial in enumerate(trials) if len(trial.scores) == len(levels[place])}
    assert whole and not whole & out and len(whole) + len(out) == len(levels)


@given(sweeps())
def test_with_a_slot_for_every_trial_it_is_synchronous_halving(sweep):
    levels, of_rungs, factor, _ = sweep
    trials, _ = run(levels, of_rungs, factor, len(levels))
    left = list(range(len(levels)))
    for rung in of_rungs:
        assert [p for p, trial in enumerate(trials) if len(trial.scores) >= rung] == sorted(left)
        left = sorted(sorted(left), key=lambda place: -max(levels[place][:rung]))[: max(1, len(left) // factor)]


@given(sweeps())
def test_the_best_of_a_rung_goes_on_however_few_slots_there_are(sweep):
    levels, of_rungs, factor, slots = sweep
    trials, out = run(levels, of_rungs, factor, slots)
    for rung in of_rungs:
        reached = [place for place, trial in enumerate(trials) if len(trial.scores) >= rung]
        first = max(reached, key=lambda place: (max(levels[place][:rung]), -place))
        assert first not in out or len(trials[first].scores) > rung


def test_equal_scores_fall_to_the_earlier_trial():
    paused = [SweepTrial(((0.5, -1.0),), "paused")] * 3
    assert verdicts(paused, (1,), 3) == {0: "go on", 1: "out", 2: "out"}


def test_a_decision_waits_as_long_as_a_trial_may_still_come():
    scores = [((0.9, 0.0),), ((0.8, 0.0),)]
    paused = [SweepTrial(own, "paused") for own in scores]
    assert verdicts([*paused, SweepTrial((), "waiting")], (1,), 3) == {0: "wait", 1: "wait"}
    assert verdicts([*paused, SweepTrial(((0.1, 0.0),), "paused"), SweepTrial((), "live")], (1,), 3)[0] == "go on"
    assert verdicts([*paused, SweepTrial((), "ended")], (1,), 3) == {0: "go on", 1: "out"}, "one failed before the rung"
