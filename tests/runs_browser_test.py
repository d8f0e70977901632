"""Tests of the page over all runs in a browser: sorting, choice of curves, hostile names."""

import shutil

import pytest
from runs_test import write_run

from xclip_jax.runs import COLUMNS, write_runs_page

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Opens the page of four runs in Chromium, and fails at an error or a request of it."""
    folder = tmp_path_factory.mktemp("runs")
    recalls = {"a": 9.5, "b": 100.0, HOSTILE: 25.0, "unfinished": None}
    for seed, (name, recall) in enumerate(recalls.items()):
        write_run(folder / name, recall=recall, steps=3 + seed, seed=seed)
    write_runs_page(folder, folder / "index.html")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    with api.sync_playwright() as playwright:
        try:
            chromium = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        except api.Error:
            pytest.skip("no Chromium")
        page, problems = chromium.new_page(), []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("dialog", lambda dialog: problems.append(dialog.message))
        page.on("request", lambda request: problems.append(request.url))
        page.goto((folder / "index.html").as_uri())
        yield page
        assert problems == [(folder / "index.html").as_uri()]
        chromium.close()


def names(page):
    return page.locator("tbody a").all_inner_texts()


def click(page, column):
    page.locator("th[data-kind]").nth(1 + COLUMNS.index(column)).click()


def test_numbers_sort_as_numbers_and_missing_ones_are_last(page):
    assert len(page.locator("tbody tr").all()) == 4
    for expected in (["b", HOSTILE, "a"], ["a", HOSTILE, "b"], ["b", HOSTILE, "a"]):
        click(page, "R@1")
        assert names(page) == expected
        assert "unfinished" in page.locator("tbody tr").last.inner_text()
    click(page, "settings")
    assert names(page) == ["a", "b", HOSTILE]  # by seed


def test_boxes_choose_the_curves(page):
    loss = page.locator("svg[data-title=loss] g")
    assert loss.count() == 4
    page.locator("tbody input").first.uncheck()
    assert loss.count() == 3
    page.locator("#all").check()
    assert loss.count() == 4
    page.locator("#all").uncheck()
    assert loss.count() == 0
    page.locator("tbody tr", has_text=HOSTILE).locator("input").check()
    assert loss.count() == 1
    assert HOSTILE in loss.locator("title").text_content()
    page.locator("#all").check()


def test_pointing_at_a_run_singles_out_its_curve(page):
    page.locator("tbody tr", has_text=HOSTILE).hover()
    assert page.locator("svg[data-title=loss] g.dimmed").count() == 3
    page.locator("h1").hover()
    assert page.locator("g.dimmed").count() == 0
