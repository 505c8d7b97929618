"""The report: one file without outside resources, with the spread of every mean and the name of every seed."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from pipeline.lab.comparison.page import heat, plots
from pipeline.lab.comparison.page.markdown import to_markdown
from pipeline.lab.comparison.page.render import method_lines, render_comparison, seeds
from pipeline.lab.comparison.results import Mean, PromptSimilarity, read_results, with_spread, write_results
from tests.lab.comparison.found import METRICS, TASKS, candidates, results
from tests.reporting.html.browser import FOUND, Browser


@pytest.fixture(scope="module")
def found():
    return results()


def test_the_page_asks_for_nothing_and_runs_no_script(found):
    page = render_comparison(found)
    assert not re.search(r"https?://(?!www\.w3\.org)", page) and "<script" not in page
    assert " style=" not in page, "the page's own policy would forbid it"
    assert "a task with &lt;a long&gt; name" in page and "<a long>" not in page


def test_the_page_is_well_formed(found):
    open_tags: list[str] = []
    void = {"meta", "link", "br", "input", "rect", "path"}

    class Tags(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in void:
                open_tags.append(tag)

        def handle_endtag(self, tag):
            if tag not in void:
                assert open_tags.pop() == tag

    Tags().feed(render_comparison(found))
    assert open_tags == []


def test_every_number_of_the_results_is_on_the_page_with_its_seed(found, tmp_path):
    write_results(tmp_path / "results.json", found)
    plain = json.loads((tmp_path / "results.json").read_text())
    assert plain["format"] == 1 and {**read_results(tmp_path / "results.json"), "sha256": plain["sha256"]} == plain
    assert len(plain["numbers"]) == len(candidates())
    page = render_comparison(found)
    for number in plain["numbers"]:
        assert f"{number['dev']:.3f}" in page and f"{number['test']:.3f}" in page
    assert {number["seed"] for number in plain["numbers"]} == {None, 0, 1, 2}
    assert page.count("seeds 0, 1, 2") > 10


def test_the_best_choice_by_dev_is_the_one_that_is_shown_with_its_test_metric(found):
    shown = {line.method: line for line in method_lines(found)}
    for cell in shown["prompt tuning"].cells:
        rows = [row for row in found.rows if (row.method, row.task) == ("prompt tuning", cell.task)]
        assert cell.dev.mean == max(row.dev.mean for row in rows) and cell.test is not None
    assert shown["transferred prompt"].cells[0] is None and shown["transferred prompt"].mean is None


def test_plots_show_mean_spread_and_every_seed(found):
    drawing = plots.method_plot(found, "trec")
    kinds = [mark.kind.partition(" ")[0] for mark in drawing.marks]
    assert kinds.count("mean") == 4 and kinds.count("seed") == 12
    assert sum(line.kind.startswith("whisker") for line in drawing.lines) == 4
    assert "LoRA" in drawing.title and "±" in drawing.title
    for panel in found.panels:
        drawing = plots.panel_plot(panel, "sst2", found)
        assert sum(mark.kind.startswith("seed") for mark in drawing.marks) == 6
        assert any(line.kind.startswith("through") for line in drawing.lines) == (panel.key == "prompt.length")


def test_methods_are_told_apart_by_shape_as_well_as_by_colour(found):
    looks = {(plots.method_class(line.method), plots.method_shape(line.method)) for line in method_lines(found)}
    assert len({kind for kind, _ in looks}) == len({shape for _, shape in looks}) == len(looks)


def test_everything_lies_within_its_drawing(found):
    drawings = [plots.method_plot(found, task) for task in TASKS]
    drawings += [plots.panel_plot(panel, task, found) for panel in found.panels for task in TASKS]
    drawings += [heat.transfer_map(found.transfer, METRICS)]
    drawings += [heat.similarity_map(found.likeness, lambda pair: pair.mean_token, "")]
    for drawing in drawings:
        for label in drawing.labels:
            assert 0 <= label.x <= drawing.width and 0 <= label.y <= drawing.height
        for cell in drawing.cells:
            assert cell.x + cell.width <= drawing.width and cell.y + cell.height <= drawing.height
            assert 0 <= cell.strength <= 1


def test_likeness_tells_directions_that_part_by_another_colour():
    drawing = heat.similarity_map([PromptSimilarity("a", "b", -0.5, 0.2)], lambda pair: pair.mean_token, "")
    assert {cell.kind for cell in drawing.cells} == {"same", "less"}


def test_markdown_has_every_table_and_no_broken_row(found):
    text = to_markdown(found)
    for head in ("## Methods", "## What it costs", "## prompt.length", "## Ensembles", "## Trained on sst2"):
        assert head in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_comparison_of_nothing_but_prompts_without_test_rows_still_has_its_page():
    own = [one for one in candidates() if one.candidate.method == "prompt tuning"]
    found = replace(results(own), shifts=(), transfer=(), likeness=(), starts=(), panels=(), ensembles=(), left_out={})
    rows = tuple(replace(row, test=None) for row in found.rows)
    numbers = tuple(replace(number, test=None, test_loss=None) for number in found.numbers)
    found = replace(found, rows=rows, numbers=numbers)
    page = render_comparison(found)
    assert "dev accuracy of sst2" in page and "Transfer" not in page and to_markdown(found)


def test_words_for_means_and_seeds():
    assert with_spread(Mean(0.5, 0.125, (0, 1))) == "0.500 ± 0.125" and with_spread(None) == "–"
    assert seeds(Mean(0.5, None, (None,))) == "no seed" and seeds(Mean(0.5, None, (3,))) == "seed 3"


@pytest.mark.skipif(FOUND is None, reason="no Chromium here")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.processes
def test_a_browser_shows_it_without_a_complaint_or_a_sideways_scroll(found, tmp_path, width, dark):
    path = tmp_path / "report.html"
    path.write_text(render_comparison(found))
    with Browser(tmp_path / "profile") as browser:
        browser.open(path, width, dark=dark)
        assert browser.complaints == []
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
