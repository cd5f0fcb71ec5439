"""The pages in a real browser: they draw, sort, filter and fit, and nothing goes wrong on the way."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import sync_playwright
from run_folders import Invented, write_run

from ares_lightning.evaluation.report import write_leaderboard, write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
UNDRAWN = """[...document.querySelectorAll(".chart")].filter((chart) =>
  !(chart.data ?? []).some((trace) => trace.visible !== false) || !chart.querySelector(".main-svg")
).map((chart) => chart.id)"""
OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None and os.environ.get("CI"):
        pytest.fail("no Chromium is installed; CI must run the pages (apt-get install chromium)")
    if path is None:
        pytest.skip("no Chromium is installed, so that no page can be run")
    with sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield chromium
        chromium.close()


class Opened:
    """A page in the browser, and everything that it complained about."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.complaints: list[str] = []
        self.page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self._asks(request.url))
        self.page.goto(file.as_uri())

    def _asks(self, url: str) -> None:
        if not url.startswith(("file:", "data:", "blob:")):
            self.complaints.append(f"asks for {url}")

    def column(self, number: int) -> list[str]:
        """Return what stands in a column of the visible rows of the leaderboard."""
        rows = self.page.locator("#board tbody tr:visible")
        return [rows.nth(k).locator("td").nth(number).inner_text().split("\n")[0] for k in range(rows.count())]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the report of a run, that of five, and a leaderboard of 55 models and three of another set."""
    folder = tmp_path_factory.mktemp("pages")
    one = write_run(folder / "one", Invented("mine", failing=["converged"]), others=["mine", "other"])
    names = [f"model {k}" for k in range(5)]
    five = [
        write_run(folder / name, Invented(name, strength=0.4 + 0.3 * k, num_parameters=10**k), others=names)
        for k, name in enumerate(names)
    ]
    models = [Invented(f"m{k}", strength=0.3 + 0.02 * (k * 7 % 55), set="imagenet", n=80) for k in range(55)]
    models += [Invented(name, strength=2.0) for name in ("alpha", "beta", "gamma")]
    many = [write_run(folder / model.name, model, verdicts=False) for model in models]
    return {
        "one": write_report([one], folder / "one.html"),
        "five": write_report(five, folder / "five.html"),
        "many": write_report(many, folder / "many.html"),
        "board": write_leaderboard(many, folder / "board.html"),
    }


LOOKS = [(1280, "light"), (1280, "dark"), (390, "light")]


@pytest.mark.parametrize(
    ("name", "width", "scheme"),
    [(name, *look) for name in ("one", "five", "board") for look in LOOKS] + [("many", 390, "dark")],
)
def test_every_figure_is_drawn_and_nothing_sticks_out(
    browser: Any, pages: dict[str, Path], name: str, width: int, scheme: str
) -> None:
    opened = Opened(browser, pages[name], width, scheme)
    assert opened.complaints == []
    assert opened.page.evaluate(UNDRAWN) == []
    assert opened.page.locator(".chart").count() >= {"one": 9, "five": 14, "many": 12, "board": 0}[name]
    assert opened.page.evaluate(OVERFLOW) <= 0, "the page scrolls sideways"
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(20, 23, 26)" if scheme == "dark" else "rgb(255, 255, 255)")


def test_the_first_screen_says_how_robust_the_model_is_and_whether_to_believe_it(
    browser: Any, pages: dict[str, Path]
) -> None:
    page = Opened(browser, pages["one"]).page
    for text in ("worst case of all attacks", "1 not run", "Twice the steps change nothing", "could not be run"):
        place = page.get_by_text(text).first.bounding_box()
        assert place["y"] + place["height"] < 900, text


def test_a_choice_above_a_figure_shows_other_lines(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["five"])
    shown = "document.getElementById('queries').data.filter((t) => t.visible !== false).map((t) => t.meta)"
    assert set(opened.page.evaluate(shown)) == {"square"}
    opened.page.select_option("#queries-choice", "nes")
    assert set(opened.page.evaluate(shown)) == {"nes"}
    opened.page.select_option("#confusion-choice", "model 3")
    assert opened.page.evaluate("document.querySelectorAll('#confusion .heatmap-label').length") > 0
    assert opened.complaints == []


def test_the_leaderboard_sorts_by_any_column(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["board"])
    robust = [float(text) for text in opened.column(2)]
    assert len(robust) == 55
    assert robust == sorted(robust, reverse=True)
    for number, name in ((3, "clean accuracy"), (2, "robust accuracy")):
        button = opened.page.get_by_role("button", name=name)
        for reverse in (True, False):
            button.click()
            values = [float(text) for text in opened.column(number)]
            assert values == sorted(values, reverse=reverse), name
    opened.page.get_by_role("button", name="model").click()
    assert opened.column(1) == [f"m{k}" for k in range(55)]
    assert opened.page.locator("th[aria-sort=ascending]").inner_text().startswith("model")
    assert opened.complaints == []


def test_the_leaderboard_shows_one_group_at_a_time_and_finds_words(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["board"])
    opened.page.select_option(".controls select", "digits, L-inf, eps 0.1")
    assert sorted(opened.column(1)) == ["alpha", "beta", "gamma"]
    opened.page.fill("input[type=search]", "Beta curve_threat")
    assert opened.column(1) == ["beta"]
    opened.page.select_option(".controls select", "imagenet, L-inf, eps 0.1")
    assert opened.column(1) == []
    opened.page.fill("input[type=search]", "")
    assert len(opened.column(1)) == 55


def test_long_tables_are_searched(browser: Any, pages: dict[str, Path]) -> None:
    opened = Opened(browser, pages["five"])
    opened.page.fill("[data-table=results] input", "square queries 1,000")
    rows = opened.page.locator("#results tbody tr:visible")
    assert rows.count() == 5
    assert all("square" in text for text in rows.all_inner_texts())
