"""The page in a real browser: whole, quiet, in both schemes, on a phone and on paper."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from mistral_trt.validate.report.page import render_html
from tests.browser import CHROMIUM, Browser, open_browser
from tests.reports import full_report, layer_findings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed, so no page was opened in one"),
]

BOXES = """[...document.querySelectorAll('figure svg')].map(
    s => [s.getBoundingClientRect().width, s.getBBox().width])"""
OVERFLOWING = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll') &&
    e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
    ).map(e => e.outerHTML.slice(0, 90))"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with open_browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render_html(full_report(layers=layer_findings(wrong=7))), encoding="utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_the_page_is_whole_in_every_window(browser: Browser, page: Path, width: int, scheme: str) -> None:
    browser.show(page, width=width, scheme=scheme)
    assert browser.errors == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width
    assert browser.evaluate(OVERFLOWING) == []
    boxes = browser.evaluate(BOXES)
    assert len(boxes) == 7
    assert all(shown > 300 and drawn > 300 for shown, drawn in boxes)


def test_pictures_take_the_colours_of_the_scheme(browser: Browser, page: Path) -> None:
    ink = "getComputedStyle(document.querySelector('figure svg text')).fill"
    paper = "getComputedStyle(document.body).backgroundColor"
    found = {}
    for scheme in ("light", "dark"):
        browser.show(page, width=1280, scheme=scheme)
        found[scheme] = (browser.evaluate(ink), browser.evaluate(paper))
    assert found["light"][0] != found["dark"][0]
    assert found["light"][1] != found["dark"][1]


def test_the_browser_tells_what_is_wrong(browser: Browser, page: Path, tmp_path: Path) -> None:
    """A table outside its frame and a picture that the page's policy forbids."""
    broken = tmp_path / "broken.html"
    wide = '<p style="width: 900px">wide</p><img src="https://example.org/x.png" alt="">'
    broken.write_text(page.read_text().replace("<h2>Gates</h2>", wide))
    browser.show(broken, width=375, scheme="light")
    assert browser.errors
    assert browser.evaluate(OVERFLOWING)


def test_on_paper_nothing_is_cut(browser: Browser, page: Path) -> None:
    """As wide as the printable part of a sheet of A4."""
    browser.show(page, width=700, scheme="dark")
    browser.ask("Emulation.setEmulatedMedia", media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    cut = "[...document.querySelectorAll('svg, table')].filter(e => e.getBoundingClientRect().right > 700)"
    assert browser.evaluate(f"{cut}.map(e => e.outerHTML.slice(0, 200))") == []
    assert browser.ask("Page.printToPDF")["data"]
