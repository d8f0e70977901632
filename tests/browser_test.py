"""Tests of the search page in a browser: queries, filters, examples, errors and the address."""

import re
import time

import pytest
from browsing import (
    PHONE,
    SENTENCE,
    address,
    cards,
    chromium,
    console,
    expect,
    index,
    is_wider_than_window,
    page,
    pictures,
    save_screenshot,
    search,
    serving,
)
from fake_index import SEARCHED, FakeIndex, jpeg, segment

__all__ = ["address", "chromium", "console", "index", "page"]  # fixtures


def test_names_are_shown_as_text_with_their_paths(page, address, index):
    page.goto(address + "#q=dog")
    first = cards(page).first
    expect(first.locator("h2 a")).to_have_attribute("title", index.hits[segment(1)].path)
    expect(first).to_contain_text("0:08 – 0:16")
    expect(first).to_contain_text("0:11")
    expect(first).to_contain_text("29.00")
    expect(page.locator("#status")).to_contain_text("a note")
    expect(page.locator("#cost")).to_contain_text(f"{SEARCHED:,} segments")
    assert page.locator("img[src=x]").count() == 0


def test_escape_and_back_follow_the_address(page, address):
    page.goto(address)
    search(page, "first")
    search(page, "second & more")
    pictures(page).first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    opened = page.url
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page).to_have_url(re.compile(r"#q=second\+%26\+more$"))
    assert page.locator("#video").get_attribute("src") is None
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("first")
    expect(cards(page)).to_have_count(3)
    page.go_back()
    expect(cards(page)).to_have_count(0)
    expect(page.locator("#empty")).to_contain_text("Find the moment")

    page.goto("about:blank")
    page.goto(opened)  # as a shared link
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(cards(page)).to_have_count(3)


def test_filters_are_sent_and_stay_in_the_address(page, address, index):
    page.goto(address)
    page.get_by_text("Filters").click()
    expect(page.locator("#tip")).to_contain_text("must be said or written")
    for label, value in (("File name", "*.webm"), ("From second", "2")):
        page.get_by_label(label).fill(value)
    search(page, "a dog")
    expect(cards(page)).to_have_count(3)
    assert index.queries[-1] == ("a dog", "*.webm", 2.0, None)
    expect(cards(page).first.locator(".score").first).to_have_text("29.00")
    page.get_by_label("seen").uncheck()  # searches again at once
    expect(page).to_have_url(re.compile("in=speech%2Ctext"))
    expect(page.locator("#status")).to_contain_text("3 moments in 2 films")
    expect(cards(page).first.locator(".score")).to_have_count(0)  # it is that of the pictures
    page.reload()
    expect(page.locator("#status")).to_contain_text("3 moments in 2 films")
    expect(page.get_by_label("File name")).to_have_value("*.webm")
    expect(page.get_by_label("seen")).not_to_be_checked()
    expect(page.locator("#filters-count")).to_have_text("3 on")
    page.get_by_label("said").uncheck()
    page.get_by_label("written").uncheck()
    expect(page.get_by_role("alert").first).to_contain_text("at least one of seen, said")


def test_folding_near_duplicates_is_sent_and_they_expand(page, address):
    page.goto(address + "#q=dog")
    page.get_by_text("Filters").click()
    page.get_by_label("fold near-duplicates").check()
    expect(page.locator("#status")).to_contain_text("3 moments in 2 films")
    folded = cards(page).first.get_by_text("1 near-duplicate")
    folded.click()
    page.get_by_role("link", name=re.compile(r"old\.avi 0:00")).click()
    expect(page.locator("#player-name")).to_have_text("old.avi")
    page.keyboard.press("Escape")
    expect(page).to_have_url(re.compile("#q=dog&dedupe=1$"))
    page.reload()
    expect(page.get_by_label("fold near-duplicates")).to_be_checked()


def test_index_of_pictures_only_has_no_filter_of_sources(page, tmp_path):
    index = FakeIndex([(tmp_path / "a.mp4", 0.0, 8.0, 3.0)], sources=("picture",))
    with serving(index, dedupe=True) as address:
        page.goto(address + "#q=dog")
        page.get_by_text("Filters").click()
        expect(page.get_by_label("fold near-duplicates")).to_be_checked()  # as the server folds
        expect(page.get_by_label("seen")).to_be_hidden()
        expect(page.locator("#tip")).to_be_hidden()
        expect(page.get_by_text("seen", exact=True).first).to_be_hidden()
        page.goto("about:blank")


def test_filters_without_results_can_be_cleared(page, address, index, monkeypatch):
    query = index.query

    def filtered(text, k=10, *, path=None, **options):
        return query(text, 0 if path else k, path=path, **options)

    monkeypatch.setattr(index, "query", filtered)
    page.goto(address + "#q=dog&path=nothing")
    expect(page.locator("#empty")).to_contain_text("No moment passes the filters")
    expect(page.locator("#status")).to_contain_text("No results")
    page.get_by_role("button", name="Clear the filters").click()
    expect(cards(page)).to_have_count(3)
    expect(page).to_have_url(re.compile("#q=dog$"))


def test_search_by_a_result(page, address, index):
    page.goto(address + "#q=dog")
    pictures(page).nth(1).click()
    page.get_by_role("link", name="More like this").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#example")).to_contain_text("Similar to old.avi")
    assert index.queries[-1] == (segment(2), None, None, None)
    pictures(page).first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#heat-map")).to_be_hidden()  # there is no sentence


def test_examples_can_be_chosen_and_dropped(page, address, index, tmp_path):
    picture = tmp_path / "dog & cat.jpg"
    picture.write_bytes(jpeg("blue"))
    page.goto(address)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Search by example").click()
    chooser.value.set_files(picture)
    expect(cards(page)).to_have_count(3)
    expect(page.locator("#example")).to_contain_text("Similar to dog & cat.jpg")
    assert index.queries[-1][0].endswith(".jpg")
    drop = """bytes => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], "dropped.png", { type: "image/png" }));
      document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: data, bubbles: true }));
    }"""
    page.evaluate(drop, list(jpeg("red")))
    expect(page.locator("#example")).to_contain_text("Similar to dropped.png")
    page.go_back()
    expect(page.locator("#example")).to_contain_text("Similar to dog & cat.jpg")
    page.reload()
    expect(page.get_by_role("alert").first).to_contain_text("choose the example again")


def test_errors_are_shown_and_the_page_still_works(page, address, console):
    page.goto(address)
    search(page, "  ")
    alert = page.locator("#error")
    expect(alert).to_have_text("Type a few words that describe the video.")
    search(page, "break")
    expect(alert).to_contain_text("internal error")
    save_screenshot(page, "error")
    page.goto(address + "#q=dog&start=soon")
    expect(alert).to_contain_text("start must be a number")
    page.goto(address + "#like=nothing")
    expect(alert).to_contain_text("not in the index")
    page.goto(address + "#q=dog&open=nothing")
    expect(cards(page)).to_have_count(3)
    expect(alert).to_contain_text("not in the index")
    found = [re.search(r"\d{3}", message)[0] for message in console]
    assert found == ["500", "400", "404", "404"]
    console.clear()
    page.goto(address)
    search(page, "a dog")
    expect(cards(page)).to_have_count(3)
    expect(alert).to_be_hidden()


def test_stopped_server_is_an_error(chromium, index):
    page = chromium.new_page()
    with serving(index) as address:
        page.goto(address)
        expect(page.locator("#facts")).to_contain_text("segments")
    search(page, "a dog")
    expect(page.locator("#error")).to_contain_text("The server does not respond")
    page.close()


def test_slow_answer_does_not_replace_a_later_one(page, address, index, monkeypatch):
    def query(text, k=10, **_):
        time.sleep(0.5 if text == "slow" else 0)
        return index.answer(1 if text == "slow" else 2, text)

    monkeypatch.setattr(index, "query", query)
    page.goto(address + "#q=slow")
    page.goto(address + "#q=fast")
    expect(cards(page)).to_have_count(2)
    page.wait_for_timeout(700)
    expect(cards(page)).to_have_count(2)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_narrow_window(page, address, scheme):
    page.set_viewport_size(PHONE if scheme == "light" else {"width": 320, "height": 640})
    page.emulate_media(color_scheme=scheme)
    page.goto(address)
    expect(page.get_by_text("Recent films")).to_be_visible()
    save_screenshot(page, f"narrow_empty_{scheme}")
    assert not is_wider_than_window(page)
    search(page, SENTENCE)
    expect(cards(page)).to_have_count(3)
    page.get_by_text("Filters").click()
    save_screenshot(page, f"narrow_{scheme}")
    assert not is_wider_than_window(page)
    pictures(page).first.click()
    page.locator("#heat table").wait_for()
    assert not is_wider_than_window(page)
    sizes = "e => [e.clientWidth, e.scrollWidth]"
    width, content = page.locator("#player").evaluate(sizes)
    assert content <= width
    assert width >= page.viewport_size["width"] - 15
    width, content = page.locator("#heat").evaluate(sizes)
    assert content > width  # it scrolls separately
    save_screenshot(page, f"narrow_player_{scheme}")
