"""Panels over finished comparisons: the runs' own figures, one line for each size, refused without such a panel."""

import re
from dataclasses import replace

import pytest

from pipeline.errors import SettingsError, StorageError
from pipeline.lab.comparison.joined import join_panels
from pipeline.lab.comparison.page.joined import joined_markdown, joined_plot, render_joined
from pipeline.lab.comparison.results import write_results
from pipeline.settings import JoinSettings, load_joined
from tests.lab.comparison.found import results


@pytest.fixture
def runs(tmp_path):
    for name in ("small", "base"):
        write_results(tmp_path / name / "results.json", replace(results(), run=name))
    return {name: str(tmp_path / name) for name in ("small", "base")}


def panels(runs, task="sst2"):
    by_key = {"title": "Length", "task": task, "key": "prompt.length", "runs": {n: [f] for n, f in runs.items()}}
    both = list(runs.values())
    by_run = {"title": "Steps", "task": task, "values": [1000, 0], "runs": {"one": both, "other": both[::-1]}}
    return JoinSettings.model_validate({"panels": [by_key, by_run]})


def test_a_panel_shows_what_the_comparisons_found(runs):
    length, steps = join_panels(panels(runs))
    (own,) = (panel for panel in results().panels if panel.key == "prompt.length")
    wanted = [(point.value, point.test) for point in own.points if point.task == "sst2"]
    assert length.split == "test" and set(length.lines) == {"small", "base"}
    for points in length.lines.values():
        assert [(point.value, point.test) for point in points] == wanted
    best = next(r for r in results().rows if r.chosen and (r.method, r.task) == ("prompt tuning", "sst2"))
    assert [point.value for point in steps.lines["one"]] == [1000, 0]
    assert {point.test for points in steps.lines.values() for point in points} == {best.test}


def test_lines_are_told_apart_by_colour_and_shape_and_lie_within_the_drawing(runs):
    for plot in join_panels(panels(runs)):
        drawing = joined_plot(plot)
        assert len({mark.kind for mark in drawing.marks if mark.kind.startswith("mean")}) == 2
        assert sum(mark.kind.startswith("seed") for mark in drawing.marks) == 12
        assert sum(line.kind.startswith("whisker") for line in drawing.lines) == 4
        assert all(0 <= label.x <= drawing.width and 0 <= label.y <= drawing.height for label in drawing.labels)
        ticks = [label.text for label in drawing.labels if label.anchor == "middle"]
        assert ticks in (["1", "20"], ["0", "1000"]), "numbers are in the order of their size"


def test_page_and_tables_stand_alone(runs):
    plots = join_panels(panels(runs))
    page = render_joined("Four <panels>", plots)
    assert "<script" not in page and " style=" not in page and "Four &lt;panels&gt;" in page
    assert not re.search(r"https?://", page) and "± " in joined_markdown("x", plots)


def test_what_a_run_does_not_have_is_named(runs):
    with pytest.raises(SettingsError, match=r"panel 'Length': .* has no task 'nowhere'; it has sst2, trec"):
        join_panels(panels(runs, "nowhere"))
    other = panels(runs).panels[0].model_copy(update={"key": "optimizer.lr"})
    with pytest.raises(SettingsError, match=r"has no panel of optimizer.lr for 'sst2'; sweep it there"):
        join_panels(JoinSettings(panels=[other]))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("panels: [{title: a, task: b, runs: {c: [d]}}]", "give either 'key'"),
        ("panels: [{title: a, task: b, key: seed, runs: {c: [d]}}]", "a seed is no choice"),
        ("panels: [{title: a, task: b, values: [1, 2], runs: {c: [d]}}]", "runs.c: 1 folder(s) where 2 are needed"),
        ("panels: [{titel: a, task: b, key: prompt.length, runs: {c: [d]}}]", "did you mean 'title'?"),
        ("panels: []", "at least 1"),
        ("- a list", "expected a mapping with the keys title, panels"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place(tmp_path, text, sentence):
    (tmp_path / "join.yaml").write_text(text)
    with pytest.raises(SettingsError) as caught:
        load_joined(tmp_path / "join.yaml")
    assert "join.yaml: " in str(caught.value) and sentence in str(caught.value)


def test_runs_of_another_metric_are_not_drawn_on_one_axis(runs, tmp_path):
    other = replace(results(), tasks=tuple(replace(facts, metric="exact_match") for facts in results().tasks))
    write_results(tmp_path / "base" / "results.json", other)
    with pytest.raises(SettingsError, match="measured 'sst2' by exact_match and another run by accuracy"):
        join_panels(panels(runs))


def test_what_is_no_comparisons_results_is_refused(runs, tmp_path):
    (tmp_path / "base" / "results.json").write_text('{"format": 9}')
    with pytest.raises(StorageError, match=r"is no comparison's results\.json of this version"):
        join_panels(panels(runs))
