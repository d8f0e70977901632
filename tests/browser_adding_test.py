"""Tests of adding files on the search page: drop targets, progress, the queue and errors."""

import re

import pytest
from browsing import (
    SIZES,
    address,
    cards,
    chromium,
    console,
    expect,
    index,
    is_wider_than_window,
    page,
    save_screenshot,
    serving,
)
from fake_index import FakeIndex, jpeg

from xclip_jax.search import bodies

__all__ = ["address", "chromium", "console", "index", "page"]  # fixtures

# Dispatches drag events, with files of [name, type, bytes], to the element that is found last.
DRAG = """([files, steps]) => {
  const data = new DataTransfer();
  for (const [name, type, bytes] of files) {
    data.items.add(new File([new Uint8Array(bytes)], name, { type }));
  }
  for (const [kind, selector] of steps) {
    const options = { dataTransfer: data, bubbles: true, cancelable: true };
    document.querySelector(selector).dispatchEvent(new DragEvent(kind, options));
  }
}"""


@pytest.fixture
def library(tmp_path):
    (tmp_path / "films").mkdir()
    return FakeIndex([(tmp_path / "films" / "old.mp4", 0.0, 8.0, 3.0)])


@pytest.fixture
def open_address(library, tmp_path):
    """Serves a library to which files can be added."""
    with serving(library, allow_add=tmp_path / "films") as address:
        yield address


def video(name, content=b"moving pictures"):
    return [name, "video/mp4", list(content)]


def choose(page, *files):
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add videos").click()
    chooser.value.set_files(
        [{"name": name, "mimeType": kind, "buffer": bytes(data)} for name, kind, data in files]
    )


def row(page, name):
    return page.locator("#adding-list li", has_text=name)


@SIZES
def test_dropped_files_are_added(page, open_address, library, size):
    page.set_viewport_size(size)
    page.goto(open_address)
    expect(page.get_by_role("button", name="Add videos")).to_be_visible()
    library.may_add.clear()
    files = [video("first.mp4"), video("second.mp4"), video("شاطئ.mp4")]
    page.evaluate(DRAG, [files, [["dragover", "body"], ["dragover", "#drop-add"]]])
    expect(page.get_by_text("Search by this")).to_be_visible()
    expect(page.get_by_text("Add to the library")).to_be_visible()
    expect(page.locator("#drop-add")).to_have_class(re.compile("over"))
    save_screenshot(page, f"drop_{size['width']}")
    page.evaluate(DRAG, [files, [["drop", "#drop-add"]]])
    expect(page.get_by_text("Add to the library")).to_be_hidden()
    expect(row(page, "first.mp4")).to_contain_text("Indexing")
    expect(row(page, "second.mp4")).to_contain_text("Waits to be indexed")
    expect(page.locator("#adding-status")).to_have_text("0 of 3 files added")
    save_screenshot(page, f"adding_{size['width']}")
    assert not is_wider_than_window(page)
    library.may_add.set()
    expect(page.locator("#adding-status")).to_have_text("3 of 3 files added", timeout=15_000)
    expect(row(page, "شاطئ.mp4")).to_contain_text("Added")
    assert [path.rpartition("/")[2] for path in library.added] == [name for name, *_ in files]
    page.get_by_role("button", name="Hide the list").click()
    expect(page.locator("#adding")).to_be_hidden()
    expect(page.get_by_role("button", name="Add videos")).to_be_focused()


def test_dropped_file_is_searched_by(page, open_address, library):
    page.goto(open_address)
    picture = [["dog.png", "image/png", list(jpeg("red"))]]
    page.evaluate(DRAG, [picture, [["dragover", "body"], ["drop", "#drop-search"]]])
    expect(page.locator("#example")).to_contain_text("Similar to dog.png")
    expect(cards(page)).to_have_count(1)
    assert library.added == []


def test_leaving_the_window_hides_the_targets(page, open_address):
    page.goto(open_address)
    expect(page.get_by_role("button", name="Add videos")).to_be_visible()
    page.evaluate(DRAG, [[video("a.mp4")], [["dragover", "body"]]])
    expect(page.locator("#drop")).to_be_visible()
    page.evaluate(DRAG, [[video("a.mp4")], [["dragleave", "#drop"]]])
    expect(page.locator("#drop")).to_be_hidden()


def test_server_that_takes_no_files_offers_only_the_search(page, address):
    page.goto(address)
    expect(page.locator("#facts")).to_contain_text("segments")
    expect(page.get_by_role("button", name="Add videos")).to_be_hidden()
    page.evaluate(DRAG, [[video("a.mp4")], [["dragover", "body"]]])
    expect(page.get_by_text("Search by this")).to_be_visible()
    expect(page.get_by_text("Add to the library")).to_be_hidden()


def test_chosen_files_that_fail_say_why(page, open_address, library, monkeypatch, console):
    monkeypatch.setattr(bodies, "MAX_UPLOAD_BYTES", 2**20)
    page.goto(open_address)
    files = [video("bad.mp4", b"bad"), video("notes.txt"), video("huge.mp4", bytes(2**20 + 1))]
    choose(page, *files, video("good.mp4"))
    status = page.locator("#adding-status")
    expect(status).to_have_text("1 of 4 files added, 3 failed", timeout=15_000)
    expect(row(page, "bad.mp4")).to_contain_text("Failed: cannot be decoded")
    expect(row(page, "notes.txt")).to_contain_text("the suffix of a video")
    expect(row(page, "huge.mp4")).to_contain_text("huge.mp4 is larger than 1 MB")
    expect(row(page, "good.mp4")).to_contain_text("Added")
    save_screenshot(page, "adding_failed")
    assert len(console) == 1
    console.clear()


def test_queue_is_shown_again_after_a_reload(page, open_address, library):
    page.goto(open_address)
    library.may_add.clear()
    choose(page, video("first.mp4"), video("second.mp4"))
    expect(row(page, "second.mp4")).to_contain_text("Waits to be indexed")
    page.reload()
    expect(row(page, "first.mp4")).to_contain_text("Indexing")
    expect(row(page, "second.mp4")).to_contain_text("Waits to be indexed")
    library.may_add.set()
    expect(page.locator("#adding-status")).to_have_text("2 of 2 files added", timeout=15_000)


def test_upload_shows_its_progress(page, open_address):
    page.goto(open_address)
    expect(page.get_by_role("button", name="Add videos")).to_be_visible()
    page.route("**/api/add?*", lambda route: None)  # never answered
    choose(page, video("long.mp4", bytes(2**20)))
    expect(row(page, "long.mp4")).to_contain_text("Uploading")
    expect(row(page, "long.mp4").get_by_role("progressbar")).to_be_visible()
    page.unroute_all(behavior="ignoreErrors")
