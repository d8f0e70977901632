"""Fixtures and steps of the tests that use the search page in a browser.

XCLIP_JAX_SCREENSHOTS=FOLDER saves screenshots there.
"""

import contextlib
import os
import shutil
from fractions import Fraction
from pathlib import Path

import av
import fake_index
import numpy as np
import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
TIMEOUT = 30  # seconds, also enough on a busy machine
expect = api.expect
expect.set_options(timeout=1000 * TIMEOUT)

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
SECONDS, RATE = 20, 10
SENTENCE = "a yellow bar moves to the right"
NAME = 'bar <img src=x onerror="alert(1)">.webm'  # untrusted, and a playable file
NOTE_JUMPS = """
addEventListener("seeking", ({ target }) => { target.dataset.jump = target.currentTime }, true);
"""
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 375, "height": 740}
SIZES = pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])


@contextlib.contextmanager
def serving(index, **options):
    """Serves the page from a thread and yields its address."""
    with fake_index.serving(index, **options) as (host, port):
        yield f"http://{host}:{port}/"


def write_video(path, codec, seconds=SECONDS):
    """Writes a video of a bar that moves from left to right."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, options={"g": "20", "b": "300k"})
        stream.width, stream.height, stream.pix_fmt = 320, 180, "yuv420p"
        for number in range(seconds * RATE):
            picture = np.full((180, 320, 3), (30, 50, 70), np.uint8)
            left = int(290 * number / (seconds * RATE))
            picture[40:140, left : left + 30] = (230, 190, 40)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    """Makes an index of three films, one of which has three moments."""
    folder = tmp_path_factory.mktemp("videos")
    write_video(folder / NAME, "libvpx")  # every Chromium plays it, even without H.264
    write_video(folder / "old.avi", "mpeg4")  # no Chromium does
    moments = [(NAME, 8.0, 16.0, 11.5), ("old.avi", 0.0, 8.0, 3.0), ("gone.mp4", 0.0, 8.0, 1.0)]
    moments += [(NAME, 1.0, 4.0, 2.0), (NAME, 17.0, 19.0, 18.0)]
    return fake_index.FakeIndex([(folder / name, *times) for name, *times in moments])


@pytest.fixture(scope="module")
def address(index):
    with serving(index) as address:
        yield address


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Makes an index of 60 moments in 20 films, whose later moments are in the first films too."""
    folder = tmp_path_factory.mktemp("many")
    names = [f"film {n}" if n % 7 else "סרט ארוך מאוד" + f" {n} " + "מאוד " * 20 for n in range(20)]
    return fake_index.FakeIndex(
        [(folder / f"{names[n % 20]}.mp4", n, n + 4.0, n + 2.0) for n in range(60)]
    )


@pytest.fixture(scope="module")
def many_address(many):
    with serving(many) as address:
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
def page(chromium, console):
    """Opens an empty window, fails on requests to other servers and on console errors."""
    page = chromium.new_page(viewport=DESKTOP)
    page.set_default_timeout(1000 * TIMEOUT)
    page.add_init_script(NOTE_JUMPS)
    urls = []
    page.on("console", lambda message: message.type == "error" and console.append(message.text))
    page.on("pageerror", lambda error: console.append(str(error)))
    page.on("request", lambda request: urls.append(request.url))
    yield page
    page.close()
    assert console == []
    own = ("http://127.0.0.1:", "data:", "blob:")
    assert [url for url in urls if not url.startswith(own)] == []


def save_screenshot(page, name, *, idle=True):
    """Saves a screenshot if the folder is set.

    `idle`: True to wait until the server has answered everything.
    """
    folder = os.environ.get("XCLIP_JAX_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if idle:
            page.wait_for_load_state("networkidle")
        page.screenshot(path=Path(folder, f"{name}.png"))


def search(page, sentence):
    page.get_by_role("searchbox").fill(sentence)
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")


def cards(page):
    return page.locator("#hits > li")


def pictures(page):
    """Returns the links that open the best moment of a film."""
    return page.locator("#hits > li > .picture")


def marks(page, film=0):
    return cards(page).nth(film).locator(".mark")


def current_second(page):
    return page.locator("#video").evaluate("video => video.currentTime")


def wait_until(page, condition):
    """Polls in Python, because the page's content security policy forbids wait_for_function."""
    for _ in range(20 * TIMEOUT):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never so; the video is at {current_second(page)} s")


def wait_until_at(page, second):
    """Stops the video and waits until the last jump in it has been to this second."""
    video = page.locator("#video")
    video.evaluate("video => video.pause()")
    # Not the current second: a video has played on before a busy machine stops it.
    wait_until(page, lambda: abs(float(video.get_attribute("data-jump") or -1) - second) < 0.1)


def is_wider_than_window(page):
    return page.evaluate("document.scrollingElement.scrollWidth > innerWidth")


def search_and_play(page, address, sentence, name, second):
    """Opens the page, searches and plays the first result from its best second."""
    page.goto(address)
    expect(page.locator("#facts")).to_contain_text("of")
    save_screenshot(page, "search")
    search(page, sentence)
    expect(page.locator("#status")).to_contain_text("moment")
    expect(page.locator("#cost")).to_contain_text(" in ")
    expect(cards(page).first.locator("h2")).to_have_text(name)
    save_screenshot(page, "results")
    pictures(page).first.click()
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
    """Returns (words, times, values W x F, of the sentence F) of the heat map on the page."""
    table = page.locator("#heat table")
    table.wait_for()
    words = table.locator("tbody th span").all_inner_texts()
    times = [float(one.get_attribute("data-time")) for one in table.locator("thead button").all()]
    values = table.locator("tbody td").all_inner_texts()
    sentence, *rows = np.reshape([float(value) for value in values], (len(words), len(times)))
    assert words[0] == "sentence"
    return words[1:], times, np.array(rows), sentence
