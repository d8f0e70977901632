"""Tests of the search page in a browser.

XCLIP_JAX_SCREENSHOTS=FOLDER saves screenshots there.
"""

import contextlib
import os
import re
import shutil
import socket
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import uvicorn
from serve_test import FakeIndex, jpeg

from xclip_jax.search import serve

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = api.expect

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
SECONDS, RATE = 20, 10
SENTENCE = "a yellow bar moves to the right"
NAME = 'bar <img src=x onerror="alert(1)">.webm'  # untrusted, and a playable file


@contextlib.contextmanager
def serving(index):
    """Serves the page from a thread and yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        config = uvicorn.Config(serve.make_app(index), log_level="critical")
        config.timeout_graceful_shutdown = 1
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            server.should_exit = True
            thread.join()


def write_video(path, codec):
    """Writes a video of a bar that moves from left to right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"g": "20", "b": "300k"})
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for number in range(SECONDS * RATE):
            picture = np.full((180, 320, 3), (30, 50, 70), np.uint8)
            left = int(290 * number / (SECONDS * RATE))
            picture[40:140, left : left + 30] = (230, 190, 40)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / NAME, "libvpx")  # every Chromium plays it, even without H.264
    write_video(folder / "old.avi", "mpeg4")  # no Chromium does
    files = [folder / NAME, folder / "old.avi", folder / "gone.mp4"]
    times = [(8.0, 16.0, 11.5), (0.0, 8.0, 3.0), (0.0, 8.0, 1.0)]
    return FakeIndex([(file, *when) for file, when in zip(files, times, strict=True)])


@pytest.fixture(scope="module")
def address(index):
    with serving(index) as address:
        yield address


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip(f"no browser in PATH: none of {', '.join(BROWSERS)}")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def console():
    """Collects errors on the console. A test that expects some removes them."""
    return []


@pytest.fixture
def page(chromium, console, address):
    """Opens an empty window, fails on requests to other servers and on console errors."""
    page = chromium.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(10_000)
    urls = []
    page.on("console", lambda message: message.type == "error" and console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    yield page
    page.close()
    assert console == []
    elsewhere = [url for url in urls if not url.startswith((address, "data:", "blob:"))]
    assert elsewhere == []


def save_screenshot(page, name):
    folder = os.environ.get("XCLIP_JAX_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.wait_for_load_state("networkidle")
        page.screenshot(path=Path(folder, f"{name}.png"))


def search(page, sentence):
    page.get_by_role("searchbox").fill(sentence)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#main")).to_have_attribute("aria-busy", "false")


def current_second(page):
    return page.locator("#video").evaluate("video => video.currentTime")


def wait_until(page, condition):
    """Polls in Python, because the page's content security policy forbids wait_for_function."""
    for _ in range(200):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"the video stays at {current_second(page)} s")


def wait_until_at(page, second):
    page.locator("#video").evaluate("video => video.pause()")
    wait_until(page, lambda: abs(current_second(page) - second) < 0.3)


def search_and_play(page, address, sentence, name, second):
    """Opens the page, searches and plays the first result from its best second."""
    page.goto(address)
    expect(page.locator("#facts")).to_contain_text("segments of")
    save_screenshot(page, "search")
    search(page, sentence)
    expect(page.locator("#status")).to_contain_text("segments in")
    first = page.locator("#hits a").first
    expect(first.locator("b")).to_have_text(name)
    save_screenshot(page, "results")
    first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#player-name")).to_have_text(name)
    video = page.locator("#video")
    wait_until(page, lambda: second <= current_second(page) + 0.1 < second + 3)  # it plays
    video.evaluate("video => video.pause()")
    save_screenshot(page, "player")
    before = current_second(page)
    video.evaluate("video => { video.play() }")
    wait_until(page, lambda: before + 0.2 < current_second(page))


def read_heat_map(page):
    """Returns (words, times, strengths W x F) of the heat map on the page."""
    table = page.locator("#heat table")
    table.wait_for()
    words = table.locator("tbody th span").all_inner_texts()
    times = [float(one.get_attribute("data-time")) for one in table.locator("thead button").all()]
    read = "cells => cells.map(cell => parseFloat(cell.style.getPropertyValue('--heat')))"
    strengths = table.locator("tbody td").evaluate_all(read)
    return words, times, np.reshape(strengths, (len(words), len(times)))


def test_search_plays_the_best_second_and_shows_the_heat_map(page, address, index):
    search_and_play(page, address, SENTENCE, NAME, 11.5)
    expected = index.attention(f"{1:016x}", SENTENCE)
    words, times, strengths = read_heat_map(page)
    assert words == SENTENCE.split()
    assert times == pytest.approx(expected.times)
    weights_WxF = expected.weights_WxF
    np.testing.assert_allclose(strengths, 100 * weights_WxF / weights_WxF.max(), atol=0.1)

    page.locator("#heat thead button").nth(4).click()
    wait_until_at(page, times[4])
    expect(page.locator("#heat thead .now")).to_have_attribute("data-time", re.compile("."))
    page.locator("#heat tbody tr").nth(2).locator("td").nth(1).click()
    wait_until_at(page, times[1])
    page.get_by_role("button", name="Best second").click()
    wait_until_at(page, 11.5)
    page.locator("#heat").scroll_into_view_if_needed()
    save_screenshot(page, "heatmap")


def test_names_are_shown_as_text_with_their_paths(page, address, index):
    page.goto(address + "#q=dog")
    first = page.locator("#hits a").first
    expect(first).to_have_attribute("title", index.hits[f"{1:016x}"].path)
    expect(first).to_contain_text("0:08 – 0:16")
    expect(first).to_contain_text("0:11")
    expect(first).to_contain_text("29.00")
    expect(page.locator("#status")).to_contain_text("a note")
    assert page.locator("img[src=x]").count() == 0


def test_escape_and_back_follow_the_address(page, address):
    page.goto(address)
    search(page, "first")
    search(page, "second & more")
    page.locator("#hits a").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    opened = page.url
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page).to_have_url(re.compile(r"#q=second\+%26\+more$"))
    assert page.locator("#video").get_attribute("src") is None
    page.go_back()
    expect(page.get_by_role("searchbox")).to_have_value("first")
    expect(page.locator("#hits li")).to_have_count(3)
    page.go_back()
    expect(page.locator("#hits li")).to_have_count(0)
    expect(page.locator("#empty")).to_contain_text("Find the moment")

    page.goto("about:blank")
    page.goto(opened)  # as a shared link
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#hits li")).to_have_count(3)


def test_page_works_by_keyboard(page, address):
    page.goto(address)
    page.keyboard.type("a dog")  # the box has the focus
    page.keyboard.press("Enter")
    expect(page.locator("#hits li")).to_have_count(3)
    page.locator("#hits a").first.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#hits a").first).to_be_focused()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()


def test_filters_are_sent_and_stay_in_the_address(page, address, index):
    page.goto(address)
    page.get_by_text("Filters").click()
    for label, value in (("File name", "*.webm"), ("From second", "2"), ("Results", "2")):
        page.get_by_label(label).fill(value)
    search(page, "a dog")
    assert index.queries[-1] == ("a dog", "*.webm", 2.0, None)
    expect(page.locator("#hits li")).to_have_count(2)
    page.reload()
    expect(page.locator("#hits li")).to_have_count(2)
    expect(page.get_by_label("File name")).to_have_value("*.webm")


def test_search_by_a_result(page, address, index):
    page.goto(address + "#q=dog")
    page.locator("#hits a").nth(1).click()
    page.get_by_role("link", name="More like this").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#example")).to_contain_text("Similar to old.avi")
    assert index.queries[-1] == (f"{2:016x}", None, None, None)
    page.locator("#hits a").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#attention")).to_be_hidden()  # there is no sentence


def test_examples_can_be_chosen_and_dropped(page, address, index, tmp_path):
    picture = tmp_path / "dog & cat.jpg"
    picture.write_bytes(jpeg("blue"))
    page.goto(address)
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Search by example").click()
    chooser.value.set_files(picture)
    expect(page.locator("#hits li")).to_have_count(3)
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
    expect(page.get_by_role("alert")).to_contain_text("choose the example again")


def test_errors_are_shown_and_the_page_still_works(page, address, console):
    page.goto(address)
    search(page, "  ")
    expect(page.get_by_role("alert")).to_have_text("Type a few words that describe the video.")
    search(page, "break")
    expect(page.get_by_role("alert")).to_contain_text("internal error")
    save_screenshot(page, "error")
    page.goto(address + "#q=dog&k=500")
    expect(page.get_by_role("alert")).to_contain_text("between 1 and 100")
    page.goto(address + "#like=nothing")
    expect(page.get_by_role("alert")).to_contain_text("not in the index")
    assert [re.search(r"\d{3}", message)[0] for message in console] == ["500", "400", "404"]
    console.clear()
    page.goto(address)
    search(page, "a dog")
    expect(page.locator("#hits li")).to_have_count(3)
    expect(page.get_by_role("alert")).to_be_hidden()


def test_model_without_attention_shows_a_note(page, address, console):
    page.goto(address)
    search(page, "no attention")
    page.locator("#hits a").first.click()
    expect(page.locator("#attention")).to_contain_text("no heat map")
    assert len(console) == 1
    console.clear()


def test_unplayable_and_deleted_files_show_a_note(page, address, console):
    page.goto(address)
    search(page, "a dog")
    page.locator("#hits a").nth(1).click()
    expect(page.locator("#unplayable")).to_contain_text("cannot play old.avi")
    link = page.get_by_role("link", name="Download")
    with page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == "old.avi"
    page.locator("#heat thead button").nth(3).click()
    expect(page.locator("#picture")).to_have_attribute("src", re.compile(r"second=4\.500$"))
    page.keyboard.press("Escape")
    page.locator("#hits a").nth(2).click()
    expect(page.locator("#unplayable")).to_contain_text("gone.mp4 is no longer on disk")
    assert all("404" in message for message in console)
    console.clear()


def test_stopped_server_is_an_error(chromium, index):
    page = chromium.new_page()
    with serving(index) as address:
        page.goto(address)
        expect(page.locator("#facts")).to_contain_text("segments")
    search(page, "a dog")
    expect(page.get_by_role("alert")).to_contain_text("The server does not respond")
    page.close()


def test_slow_answer_does_not_replace_a_later_one(page, address, index, monkeypatch):
    def query(text, k=10, **_):
        time.sleep(0.5 if text == "slow" else 0)
        return index.answer(1 if text == "slow" else 2, text)

    monkeypatch.setattr(index, "query", query)
    page.goto(address + "#q=slow")
    page.goto(address + "#q=fast")
    expect(page.locator("#hits li")).to_have_count(2)
    page.wait_for_timeout(700)
    expect(page.locator("#hits li")).to_have_count(2)


def test_page_fits_a_narrow_window(page, address):
    page.set_viewport_size({"width": 375, "height": 740})
    page.goto(address)
    search(page, SENTENCE)
    expect(page.locator("#hits li")).to_have_count(3)
    save_screenshot(page, "narrow")
    wide = "document.scrollingElement.scrollWidth"
    assert page.evaluate(wide) <= 375
    page.locator("#hits a").first.click()
    read_heat_map(page)
    assert page.evaluate(wide) <= 375
    sizes = "e => [e.clientWidth, e.scrollWidth]"
    width, content = page.locator("#player").evaluate(sizes)
    assert content <= width
    assert width >= 360
    width, content = page.locator("#heat").evaluate(sizes)
    assert content > width  # it scrolls separately
    save_screenshot(page, "narrow_player")
