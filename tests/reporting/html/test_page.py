"""The page of a night: whole, escaped, readable by everybody, and in need of nothing from elsewhere."""

import fnmatch
import re
import tomllib
from collections import Counter
from dataclasses import fields, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

from pipeline.reporting.html import (
    Condition,
    Curve,
    Decision,
    Fault,
    NightReport,
    PastVersion,
    Stage,
    TaskNight,
    render,
)
from tests.reporting.html.nights import curve, night, task

ROOT = Path(__file__).resolve().parents[3]
PACKAGE = ROOT / "pipeline" / "reporting" / "html"
VOID = {"meta", "link", "input", "br"}
EVIL = "\"'><script>alert(1)</script><svg onload=alert(1)>&{{ 7*7 }}</title></style>"


class Page(HTMLParser):
    """Elements and the texts directly within them; fails on one that is not closed."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.stack: list[str] = []
        self.feed(source)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.stack[-1] if self.stack else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(data for tag, data in self.texts if tag not in ("script", "style")).split())


def every_kind() -> NightReport:
    kinds = [task(decision, decision, seed) for seed, decision in enumerate(get_args(Decision))]
    swept = replace(kinds[2], curves=[curve("a.lr-1"), *(curve(f"a.lr-{n}", 40, n, False) for n in range(2, 40))])
    return replace(night(), tasks=[*kinds[:2], swept, *kinds[3:]])


PAGES = {"3": night(3), "300": night(300), "none": replace(night(), tasks=[]), "every kind": every_kind()}


@pytest.fixture(params=PAGES, ids=str)
def report(request):
    return PAGES[request.param]


def test_nothing_comes_from_elsewhere_and_no_script_but_the_pages_own_may_run(report):
    source = render(report)
    page = Page(source)
    assert len(page.all("script")) == 1 and page.all("script") == [{}]
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "style")]
        assert attributes.get("href", "#").startswith(("#", "data:"))
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy


def poisoned(report: NightReport) -> NightReport:
    """The same with every text replaced."""
    one = TaskNight(
        EVIL, "kept", EVIL, EVIL, 0.5, 0.4, 0.5, 0.1, 0.4, 0.3, 10, True,
        [PastVersion(1, 0.5, EVIL), PastVersion(2, 0.6, EVIL)],
        [Curve(EVIL, [(1, 2.0), (2, 1.0)], [(0, 0.1), (2, 0.2)], True, EVIL, EVIL), Curve(EVIL, [(1, 2.0)])],
        {EVIL: {"ok": 1, EVIL: 2}},
    )  # fmt: skip
    return replace(
        report, title=EVIL, run=EVIL, outcome=EVIL, bank=EVIL, alias=EVIL, facts={EVIL: EVIL},
        tasks=[one, replace(one, decision="failed"), replace(one, decision="carried")],
        conditions=[Condition(EVIL, False, EVIL), Condition(EVIL, True, EVIL)],
        faults=[Fault(1.0, EVIL)], stages=[Stage(EVIL, 1.0)],
    )  # fmt: skip


def test_texts_of_tasks_are_data_and_never_markup():
    report = poisoned(night())
    texts = {field.name for field in fields(report) if isinstance(getattr(report, field.name), str)} - {"verdict"}
    assert all(getattr(report, name) == EVIL for name in texts), "a new text is not in this test"
    page, plain = Page(render(report)), Page(render(night()))
    assert len(page.all("script")) == 1 and set(Counter(tag for tag, _ in page.elements)) <= set(
        tag for tag, _ in plain.elements
    )
    assert not [attributes for _, attributes in page.elements if any(name.startswith("on") for name in attributes)]
    assert page.text.count("alert(1)") > 30 and "49" not in page.text.replace("0.49", "")


def test_every_task_its_decision_and_its_reason_can_be_read(report):
    text = Page(render(report)).text
    for one in report.tasks:
        assert one.name in text and one.why in text
    for condition in report.conditions:
        assert condition.found in text
    for fault in report.faults:
        assert fault.what in text
    assert report.outcome in text


def test_figures_stand_in_the_tables():
    warm = task("film", "warm", incumbent=0.8, tuned=0.875, p_value=0.031, metric="accuracy")
    worse = task("book", "kept", incumbent=1.25, tuned=1.5, metric="loss", p_value=None)
    text = Page(render(replace(night(), tasks=[warm, worse]))).text
    assert "0.800 0.875 +0.075 p = 0.031" in text
    assert "1.250 1.500 −0.250" in text, "more loss is worse"
    assert "3,634 rank-seconds (1.01 rank-hours); at 2.10 per rank-hour that is 2.12" in text
    assert "2.70 GiB" in text and "30 min 04 s" in text


def test_no_money_is_told_without_a_price():
    assert "per rank-hour" not in Page(render(replace(night(), price_per_rank_hour=None))).text


def test_rows_are_counted_by_status_and_split():
    rows = {"train": {"ok": 1990, "null": 7, "empty": 0, "target_long": 3}, "dev": {"ok": 100, "null": 0}}
    text = Page(render(replace(night(), tasks=[task("film", "warm", rows=rows)]))).text
    assert "All tasks usable null target long left out train 1,990 7 3 0.5 % dev 100 0 0 0 %" in text


def test_tables_have_heads_plots_have_titles_and_headings_are_in_order(report):
    page = Page(render(report))
    assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for plot in page.all("svg"):
        assert plot.get("aria-hidden") == "true" or (plot["role"] == "img" and plot["aria-label"])
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in page.all("a"):
        assert (link["href"] or "")[1:] in ids


def test_no_decision_is_told_by_colour_alone():
    text = Page(render(every_kind())).text
    for word in ("✕ failed", "… pending", "− removed", "↺ kept", "● cold start", "▲ warm start", "= carried"):
        assert word in text


def test_many_tasks_are_folded_and_few_are_open():
    few, many = Page(render(night(3))), Page(render(night(300)))
    assert all("open" in details for details in few.all("details") if details.get("class") == "card")
    assert not [details for details in many.all("details") if "open" in details]
    order = [task.name for task in sorted(night(300).tasks, key=lambda t: get_args(Decision).index(t.decision))]
    assert many.text.index(order[0]) < many.text.index(order[-1]), "what failed comes first"


def test_a_long_night_stays_a_small_page():
    long = [task(f"t{n}", "warm", n, curves=[curve(f"t{n}", 3000, n)]) for n in range(100)]
    assert len(render(replace(night(), tasks=long))) < 1_500_000
    swept = [curve(f"s{n}", 500, n, n == 0) for n in range(256)]
    one = render(replace(night(), tasks=[task("film", "cold", curves=swept)]))
    assert len(one) < 150_000 and "256 trials of a sweep (231 not drawn)" in Page(one).text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    bright, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_and_lines_have_the_contrast_of_wcag_aa(scheme):
    style = (PACKAGE / "templates" / "night.css").read_text()
    light, dark = (dict(re.findall(r"--([\w-]+): (#\w{6});", part)) for part in style.split("@media")[:2])
    assert set(dark) == set(light)
    colours = dark if scheme == "dark" else light
    texts = [(text, back) for text in ("text", "quiet", "link") for back in ("page", "raised")]
    texts += [("quiet", "idle-back"), *((kind, f"{kind}-back") for kind in ("good", "new", "warn", "bad"))]
    for text, back in texts:
        assert contrast(colours[text], colours[back]) >= 4.5, (text, back)
    for line in ("loss", "metric", "incumbent"):
        assert contrast(colours[line], colours["raised"]) >= 3, line


def test_templates_are_installed_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    files = [file for file in PACKAGE.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")]
    # Only folders with an __init__.py are packages; data below one is matched by its path from there.
    assert len(files) >= 6
    assert [file.name for file in files if not any(fnmatch.fnmatch(file.name, p) for p in patterns)] == []
