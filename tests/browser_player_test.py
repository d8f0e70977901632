"""Tests of the player in a browser: playing, looping, previews, stills, downloads, the heat map."""

import dataclasses
import re
import shutil
import threading

import av
import numpy as np
import pytest
from browsing import (
    NAME,
    SENTENCE,
    SIZES,
    address,
    cards,
    chromium,
    console,
    current_second,
    expect,
    index,
    marks,
    page,
    pictures,
    read_heat_map,
    save_screenshot,
    search,
    search_and_play,
    serving,
    wait_until,
    wait_until_at,
    write_video,
)
from fake_index import segment

from xclip_jax.data.container import VideoError
from xclip_jax.search import clips

__all__ = ["address", "chromium", "console", "index", "page"]  # fixtures


@SIZES
def test_search_plays_the_best_second_and_shows_the_heat_map(page, address, index, size):
    page.set_viewport_size(size)
    search_and_play(page, address, SENTENCE, NAME, 11.5)
    expected = index.heat_map(segment(1), SENTENCE)
    words, times, rows, sentence = read_heat_map(page)
    assert words == SENTENCE.split()
    assert times == pytest.approx(expected.times)
    np.testing.assert_allclose(rows, expected.words_WxF, atol=0.0051)
    np.testing.assert_allclose(sentence, expected.sentence, atol=0.0051)
    best = int(np.argmax(expected.sentence))
    head = page.locator("#heat thead th.best")
    expect(head).to_contain_text("best")
    assert (
        page.locator("#heat thead th").evaluate_all("all => all.findIndex(e => e.className)")
        == best
    )
    strengths = page.locator("#heat tbody tr:not(.whole) td").evaluate_all(
        "cells => cells.map(cell => parseFloat(cell.style.getPropertyValue('--heat')))"
    )
    low, high = expected.words_WxF.min(), expected.words_WxF.max()
    scaled = (expected.words_WxF - low) / (high - low)
    np.testing.assert_allclose(strengths, scaled.ravel(), atol=0.001)

    page.locator("#heat thead button").nth(4).click()
    wait_until_at(page, times[4])
    expect(page.locator("#heat thead .now")).to_have_attribute("data-time", re.compile("."))
    page.locator("#heat tbody tr").nth(2).locator("td").nth(1).click()
    wait_until_at(page, times[1])
    page.locator("#best").click()
    wait_until_at(page, 11.5)
    page.locator("#heat").scroll_into_view_if_needed()
    save_screenshot(page, f"heatmap_{size['width']}")


def test_model_that_compares_no_words_shows_the_sentence_only(page, address, index, monkeypatch):
    heat_map = index.heat_map

    def plain(segment_id, text):
        return dataclasses.replace(heat_map(segment_id, text), words=[], words_WxF=np.zeros((0, 6)))

    monkeypatch.setattr(index, "heat_map", plain)
    page.goto(address + "#q=dog")
    pictures(page).first.click()
    words, times, _, sentence = read_heat_map(page)
    assert (words, len(times), len(sentence)) == ([], 6, 6)


def test_sentence_without_heat_map_shows_a_note(page, address, console):
    page.goto(address)
    search(page, "no attention")
    pictures(page).first.click()
    expect(page.locator("#heat-map")).to_contain_text("no heat map")
    assert len(console) == 1
    console.clear()


@SIZES
def test_moments_of_a_film_follow_each_other(page, address, size):
    page.set_viewport_size(size)
    page.goto(address + "#q=dog")
    pictures(page).first.click()
    place, best = page.locator("#place"), page.locator("#best")
    expect(place).to_have_text("Moment 2 of 3")
    wait_until(page, lambda: current_second(page) > 11)
    page.get_by_role("button", name="Next moment").click()
    expect(place).to_have_text("Moment 3 of 3")
    expect(best).to_have_text("Best second, 0:18")
    wait_until_at(page, 18.0)
    next_moment = page.get_by_role("button", name="Next moment")
    expect(next_moment).to_have_attribute("aria-disabled", "true")
    next_moment.click(force=True)
    expect(place).to_have_text("Moment 3 of 3")
    page.get_by_role("button", name="Previous moment").click()
    page.get_by_role("button", name="Previous moment").click()
    expect(place).to_have_text("Moment 1 of 3")
    dialog = page.get_by_role("dialog")
    expect(dialog.locator(".mark[aria-current]")).to_have_attribute("title", re.compile("result 4"))
    dialog.locator(".mark").nth(1).click()
    expect(place).to_have_text("Moment 2 of 3")
    wait_until(page, lambda: current_second(page) > 11)
    page.go_back()  # leaves the player, not only the last moment
    expect(dialog).to_be_hidden()
    expect(cards(page)).to_have_count(3)


def test_moment_loops(page, address):
    page.goto(address + "#q=dog")
    cards(page).first.locator(".moment").nth(1).click()  # 0:01 - 0:04
    loop = page.get_by_role("button", name="Loop")
    loop.click()
    expect(loop).to_have_attribute("aria-pressed", "true")
    page.locator("#video").evaluate("video => { video.currentTime = 3.7 }")
    wait_until(page, lambda: current_second(page) > 3.6)
    wait_until(page, lambda: 1 <= current_second(page) < 2)
    loop.click()
    page.locator("#video").evaluate("video => { video.currentTime = 3.8 }")
    wait_until(page, lambda: current_second(page) > 4.2)


def test_timeline_of_the_player_seeks(page, address):
    page.goto(address + "#q=dog")
    pictures(page).first.click()
    wait_until(page, lambda: current_second(page) > 11)
    line = page.get_by_role("dialog").locator(".timeline")
    box = line.bounding_box()
    page.mouse.click(box["x"] + box["width"] * 6 / 60, box["y"] + box["height"] / 2)
    wait_until_at(page, 6.0)
    expect(page.locator("#film-now")).to_have_text(re.compile("0:0[5-9]"))
    expect(page.locator("#film-end")).to_have_text("1:00")


def test_quote_is_shown_and_its_time_can_be_played(page, address):
    page.goto(address + "#q=word")
    pictures(page).first.click()
    quote = page.locator("#matches .quote")
    expect(quote).to_contain_text("we say word 1")
    expect(quote.locator("mark")).to_have_text("word")
    page.get_by_role("button", name="said at 0:08").click()
    wait_until_at(page, 8.0)
    expect(page.locator("#details")).to_contain_text("29.00")


def test_jump_while_the_film_loads_is_kept(page, address):
    requests = []
    page.route("**/video/*", lambda request: requests.append(request))
    page.goto(address + "#q=word")
    pictures(page).first.click()
    page.get_by_role("button", name="said at 0:08").click()
    wait_until(page, lambda: requests)
    requests[0].continue_()
    page.unroute("**/video/*")
    expect(page.locator("#video")).to_have_js_property("seeking", False)
    wait_until_at(page, 8.0)
    wait_until(page, lambda: current_second(page) < 11)


def test_clip_and_file_are_downloaded(page, address):
    page.goto(address + "#q=dog")
    pictures(page).first.click()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the clip").click()
    assert "0m08s-0m16s" in download.value.suggested_filename
    with av.open(str(download.value.path())) as clip:
        assert 8 <= clip.duration / av.time_base < 12  # from a key frame on
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the file").click()
    assert download.value.suggested_filename.endswith(".webm")


@pytest.fixture
def fresh_address(index):
    """Serves the index from a server that has made no previews."""
    with serving(index) as address:
        yield address


@SIZES
def test_preview_of_an_unplayable_file(page, fresh_address, monkeypatch, tmp_path, size):
    page.set_viewport_size(size)
    write_video(tmp_path / "preview.webm", "libvpx", seconds=13)
    ready, asked = threading.Event(), []

    def make_preview(path, start, end, output, **_):
        asked.append((start, end))
        assert ready.wait(10)
        shutil.copy(tmp_path / "preview.webm", output)

    monkeypatch.setattr(clips, "make_preview", make_preview)
    page.goto(fresh_address + "#q=dog")
    pictures(page).nth(1).click()
    expect(page.locator("#why")).to_contain_text("Preparing a small preview")
    expect(page.locator("#picture")).to_have_attribute("src", re.compile(r"second=3\.000$"))
    save_screenshot(page, f"preparing_{size['width']}", idle=False)
    ready.set()
    expect(page.locator("#video")).to_be_visible()
    expect(page.locator("#unplayable")).to_be_hidden()
    expect(page.locator("#preview-note")).to_contain_text("Small preview of 0:00 – 0:13")
    wait_until(page, lambda: current_second(page) > 2.9)
    save_screenshot(page, f"preview_{size['width']}")
    page.locator("#heat thead button").nth(3).click()
    wait_until_at(page, 4.5)
    assert asked == [(0.0, 13.0)]
    line = page.get_by_role("dialog").locator(".timeline")
    line.click(position={"x": 0.75 * line.bounding_box()["width"], "y": 4})  # outside of it
    expect(page.locator("#preview-note")).to_contain_text(re.compile("of 0:(39|40) – 0:(49|50)"))
    wait_until(page, lambda: 4.5 < current_second(page) < 8)
    start, end = asked[-1]
    assert (start, end) == pytest.approx((40, 50), abs=0.5)


def test_real_preview_plays(page, fresh_address):
    page.goto(fresh_address + "#q=dog")
    pictures(page).nth(1).click()
    expect(page.locator("#preview-note")).to_contain_text("Small preview of 0:00 – 0:13")
    wait_until(page, lambda: current_second(page) > 3.2)
    expect(page.locator("#video")).to_be_visible()


def test_file_without_preview_shows_stills(page, fresh_address, monkeypatch, console):
    def fail(*_, **__):
        raise VideoError("its pictures are damaged")

    monkeypatch.setattr(clips, "make_preview", fail)
    page.goto(fresh_address + "#q=dog")
    pictures(page).nth(1).click()
    why = page.locator("#why")
    expect(why).to_contain_text("there is no preview: its pictures are damaged. Download it")
    page.locator("#heat thead button").nth(3).click()
    expect(page.locator("#picture")).to_have_attribute("src", re.compile(r"second=4\.500$"))
    expect(page.locator("#film-now")).to_have_text("0:04")
    expect(page.locator("#heat thead .now")).to_have_count(1)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download the file").click()
    assert download.value.suggested_filename == "old.avi"
    assert all("400" in message for message in console)
    console.clear()


def test_deleted_file_shows_a_note(page, address, console):
    page.goto(address + "#q=dog")
    pictures(page).nth(2).click()
    expect(page.locator("#unplayable")).to_contain_text("gone.mp4 is no longer on disk")
    assert all("404" in message for message in console)
    console.clear()


def test_film_plays_from_where_its_first_frame_is(page, index, monkeypatch):
    """All times count from the first frame, which players show at `offset`."""
    hits = {id: dataclasses.replace(hit, offset=0.5) for id, hit in index.hits.items()}
    monkeypatch.setattr(index, "hits", hits)
    with serving(index) as address:
        page.goto(address + "#q=dog")
        pictures(page).first.click()
        wait_until_at(page, 12.0)
        expect(page.locator("#film-now")).to_have_text(re.compile("0:1[1-5]"))
        page.goto("about:blank")


def test_reduced_motion_does_not_start_the_video(page, address):
    page.emulate_media(reduced_motion="reduce")
    page.goto(address + "#q=dog")
    pictures(page).first.click()
    wait_until(page, lambda: abs(current_second(page) - 11.5) < 0.1)
    page.wait_for_timeout(400)
    assert page.locator("#video").evaluate("video => video.paused")
    assert abs(current_second(page) - 11.5) < 0.1
    assert marks(page).count() == 3
