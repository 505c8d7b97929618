"""The page where people see it. The browser is no dependency: where there is none, this is skipped."""

from dataclasses import replace

import pytest

from pipeline.reporting.html import render
from tests.reporting.html.browser import FOUND, Browser
from tests.reporting.html.nights import night, task
from tests.reporting.html.test_page import poisoned

pytestmark = pytest.mark.processes

WIDER = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
SHOWN = "[...document.querySelectorAll('.filtered tbody tr')].filter((row) => !row.hidden)"
SEARCH = """(() => {
  const field = document.querySelector('.filter input');
  field.value = 'team-3';
  field.dispatchEvent(new Event('input', {bubbles: true}));
  const change = [...document.querySelectorAll('.tasks thead button')].find((b) => b.textContent === 'Change');
  change.click();
  change.click();
})()"""


@pytest.mark.skipif(FOUND is None, reason="there is no Chromium (Debian: apt-get install chromium)")
def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_browser_has_no_complaint(tmp_path):
    long = "a-task-with-a-name-of-128-letters-" + "x" * 94
    reports = {"3": night(3), "300": night(300), "evil": poisoned(night(3))}
    reports["long"] = replace(night(3), tasks=[task(long, "warm"), task(long[:-1], "carried")], run=long, title=long)
    with Browser(tmp_path / "profile") as browser:
        for name, report in reports.items():
            (tmp_path / f"{name}.html").write_text(render(report))
            for width in (390, 1280):
                for dark in (False, True):
                    browser.open(tmp_path / f"{name}.html", width, dark=dark)
                    browser.evaluate("document.querySelectorAll('details').forEach((fold) => { fold.open = true })")
                    assert (browser.evaluate(WIDER), browser.complaints) == (0, []), (name, width, dark)
        browser.open(tmp_path / "300.html", 1280)
        browser.evaluate(SEARCH)
        found = browser.evaluate(f"{SHOWN}.map((row) => row.querySelector('th').textContent)")
        assert len(found) == 43 and all("team-3" in text for text in found)
        gains = browser.evaluate(f"{SHOWN}.map((row) => row.cells[5].dataset.key).filter(Boolean).map(Number)")
        assert gains == sorted(gains, reverse=True) and len(gains) >= 3
