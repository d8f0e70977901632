"""Tests of the list of results in a browser: films, timelines, scrubbing, endless scrolling."""

import re
import time
from urllib.parse import parse_qs, urlsplit

import pytest
from browsing import (
    PHONE,
    SIZES,
    address,
    cards,
    chromium,
    console,
    expect,
    index,
    is_wider_than_window,
    many,
    many_address,
    marks,
    page,
    pictures,
    save_screenshot,
    search,
    serving,
    wait_until,
)
from fake_index import FakeIndex, segment

__all__ = ["address", "chromium", "console", "index", "many", "many_address", "page"]  # fixtures


def share(page, mark, side):
    """Returns the place of a mark's side on its timeline."""
    read = """(mark, side) => {
      const [box, line] = [mark, mark.parentElement].map((e) => e.getBoundingClientRect());
      return (box[side] - line.left) / line.width;
    }"""
    return mark.evaluate(read, side)


def test_what_is_typed_while_the_page_loads_stays(page, address):
    requests = []
    page.route("**/api/index", lambda request: requests.append(request))
    page.goto(address)
    page.get_by_role("searchbox").fill("dog")
    wait_until(page, lambda: requests)
    requests[0].continue_()
    expect(page.locator("#facts")).to_contain_text("segments")
    expect(page.get_by_role("searchbox")).to_have_value("dog")
    page.get_by_role("button", name="Search", exact=True).click()
    expect(page.locator("#status")).to_contain_text("5 moments")


def test_search_while_the_page_loads_is_answered(page, address):
    requests = []
    page.route("**/api/index", lambda request: requests.append(request))
    page.goto(address)
    page.get_by_role("searchbox").fill("dog")
    page.get_by_role("searchbox").press("Enter")
    wait_until(page, lambda: requests)
    requests[0].continue_()
    expect(page.locator("#status")).to_contain_text("5 moments")
    expect(page.get_by_role("searchbox")).to_have_value("dog")


@SIZES
def test_moments_are_grouped_by_film(page, address, size):
    page.set_viewport_size(size)
    page.goto(address + "#q=dog")
    expect(page.locator("#status")).to_have_text("5 moments in 3 films a note")
    first = cards(page).first
    expect(first).to_contain_text("3 moments · film of 1:00")
    moments = first.locator(".moment")
    expect(moments).to_have_count(2)
    expect(moments.first).to_contain_text("seen")
    expect(moments.first).to_contain_text("said")
    expect(first.locator(".quote").first).to_contain_text("we say word 1")
    first.get_by_role("button", name="Show 1 more moment").click()
    expect(moments).to_have_count(3)
    first.get_by_role("button", name="Show fewer moments").click()
    expect(moments).to_have_count(2)
    assert not is_wider_than_window(page)
    moments.nth(1).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#best")).to_have_text("Best second, 0:02")


def test_timeline_shows_each_moment_and_opens_it(page, address):
    page.goto(address + "#q=dog")
    expect(marks(page)).to_have_count(3)
    best = page.get_by_role("link", name="0:08 – 0:16, result 1")
    assert share(page, best, "left") == pytest.approx(8 / 60, abs=0.01)
    assert share(page, best, "right") == pytest.approx(16 / 60, abs=0.01)
    marks(page).nth(0).hover()  # its picture is shown
    expect(pictures(page).first.locator(".time")).to_have_text("0:02")
    still = re.compile(r"second=2\.000$")
    expect(pictures(page).first.locator("img")).to_have_attribute("src", still)
    marks(page).nth(0).click()
    expect(page.locator("#best")).to_have_text("Best second, 0:02")


def test_weak_matches_are_named_in_words(page, many_address):
    page.goto(many_address + "#q=dog")
    expect(cards(page)).to_have_count(20)
    page.get_by_role("button", name="Show more", exact=True).click()
    mark = page.get_by_role("link", name=re.compile("result 31, weak match"))
    expect(mark).to_have_count(1)
    last = cards(page).nth(10)
    last.get_by_role("button", name=re.compile("more moment")).click()
    expect(last.get_by_text("weak match").first).to_be_visible()


def test_search_with_weak_matches_only_says_so(page, index, address, monkeypatch):
    query = index.query

    def weak(text, k=10, **options):
        answer = query(text, k, **options)
        hits = [type(hit)(**{**vars(hit), "weak": True}) for hit in answer]
        return type(answer)(hits, answer.seconds, answer.searched, None)

    monkeypatch.setattr(index, "query", weak)
    page.goto(address + "#q=dog")
    expect(page.locator("#status")).to_have_text("5 moments in 3 films, all of them weak matches")


def test_pointer_and_arrow_keys_scrub_through_a_film(page, address):
    stills = []
    page.goto(address + "#q=dog")
    page.wait_for_load_state("networkidle")
    page.on("request", lambda request: "/still/" in request.url and stills.append(request.url))
    picture = pictures(page).first
    time_of, image = picture.locator(".time"), picture.locator("img")
    box = picture.bounding_box()
    for _ in range(2):
        for step in range(41):
            page.mouse.move(box["x"] + 1 + step / 41 * (box["width"] - 2), box["y"] + 50)
    expect(time_of).to_have_text("0:57")  # the middle of the last tenth of a minute
    expect(image).to_have_attribute("src", re.compile(r"second=57\.000$"))
    save_screenshot(page, "scrubbing")
    assert len({parse_qs(urlsplit(url).query)["second"][0] for url in stills}) <= 10
    assert len(stills) <= 20  # a still that is loaded comes from the cache of the browser
    page.mouse.move(1, 1)
    expect(time_of).to_have_text("0:11")
    expect(image).to_have_attribute("src", re.compile(r"second=11\.500$"))
    picture.focus()
    page.keyboard.press("ArrowRight")
    expect(time_of).to_have_text("0:15")
    page.keyboard.press("ArrowLeft")
    expect(time_of).to_have_text("0:09")
    page.keyboard.press("Enter")  # still opens the best moment
    expect(page.locator("#best")).to_have_text("Best second, 0:11")


def test_touch_does_not_scrub(chromium, address):
    context = chromium.new_context(viewport=PHONE, has_touch=True)
    page = context.new_page()
    page.goto(address + "#q=dog")
    picture = pictures(page).first
    expect(picture).to_be_visible()
    move = """(link) => {
      const { left, top, width } = link.getBoundingClientRect();
      const clientX = left + 0.9 * width;
      const options = { bubbles: true, pointerType: "touch", clientX, clientY: top };
      link.dispatchEvent(new PointerEvent("pointermove", options));
    }"""
    picture.evaluate(move)
    expect(picture.locator(".time")).to_have_text("0:11")
    picture.tap()
    expect(page.get_by_role("dialog")).to_be_visible()
    context.close()


@SIZES
def test_results_grow_at_the_end_of_the_page(page, many_address, many, size):
    page.set_viewport_size(size)
    page.goto(many_address + "#q=dog")
    expect(page.locator("#status")).to_contain_text("24 moments in 20 films, more below")
    expect(cards(page)).to_have_count(20)
    before = cards(page).evaluate_all("cards => cards.map(card => card.offsetTop)")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(page.locator("#status")).to_contain_text("48 moments in 20 films, more below")
    # The page did not grow, so that only the button continues.
    more = page.get_by_role("button", name="Show more", exact=True)
    more.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("60 moments in 20 films a note")
    expect(more).to_be_hidden()
    expect(pictures(page).last).to_be_focused()
    assert before == cards(page).evaluate_all("cards => cards.map(card => card.offsetTop)")
    expect(marks(page)).to_have_count(3)
    assert len(many.queries) >= 3
    save_screenshot(page, f"many_{size['width']}")


def test_results_end_at_a_thousand(page, tmp_path):
    index = FakeIndex([(tmp_path / f"{n}.mp4", 0.0, 8.0, 3.0) for n in range(1010)])
    with serving(index) as address:
        page.goto(address + "#q=dog")
        expect(cards(page)).to_have_count(24)
        for _ in range(150):
            if page.locator("#more").is_hidden():
                break
            page.evaluate("scrollTo(0, document.body.scrollHeight)")
            page.wait_for_timeout(50)
        expect(page.locator("#status")).to_contain_text("1,000 moments in 1,000 films a note")
        page.goto("about:blank")


def test_failed_continuation_can_be_tried_again(page, many_address, many, monkeypatch, console):
    query = many.query

    def fail(text, k=10, *, offset=0, **options):
        if offset:
            raise RuntimeError("broken")
        return query(text, k, **options)

    page.goto(many_address)
    monkeypatch.setattr(many, "query", fail)
    search(page, "dog")
    page.get_by_role("button", name="Show more", exact=True).click()
    expect(page.locator("#more-error")).to_contain_text("internal error")
    monkeypatch.setattr(many, "query", query)
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#status")).to_contain_text("48 moments")
    console.clear()


def test_back_shows_all_results_that_were_loaded(page, many_address, many):
    page.goto(many_address + "#q=dog")
    expect(page.locator("#status")).to_contain_text("24 moments")
    # Without scrolling there, which would load results as well.
    page.get_by_role("button", name="Show more", exact=True).dispatch_event("click")
    expect(page.locator("#status")).to_contain_text("48 moments")
    page.goto(many_address + "#q=cat")
    expect(page.locator("#status")).to_contain_text("24 moments")
    queries = len(many.queries)
    page.go_back()
    expect(page.locator("#status")).to_contain_text("48 moments")
    assert len(many.queries) == queries


def test_search_right_after_the_player_has_closed_is_answered(page, address):
    page.goto(address + "#q=dog")
    pictures(page).first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.evaluate("""() => {
      player.addEventListener("close", () => {
        text.value = "cat";
        form.requestSubmit();
      });
      player.close();
    }""")
    expect(page).to_have_url(re.compile("#q=cat"))
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    page.wait_for_timeout(200)
    expect(page).to_have_url(re.compile("#q=cat"))
    page.go_back()
    expect(page).to_have_url(re.compile("#q=dog$"))


@SIZES
def test_empty_page_offers_examples_and_recent_films(page, address, index, size):
    page.set_viewport_size(size)
    page.goto(address)
    recent = page.get_by_role("region", name="Recent films").get_by_role("link")
    expect(recent).to_have_count(3)
    save_screenshot(page, f"empty_{size['width']}")
    recent.nth(0).click()
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#best")).to_have_text("Start, 0:00")
    wait_until(page, lambda: page.locator("#video").evaluate("video => video.readyState > 1"))
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    page.get_by_role("link", name="two people talk").click()
    expect(cards(page)).to_have_count(3)
    expect(page.get_by_role("searchbox")).to_have_value("two people talk")
    expect(page.locator("#empty")).to_be_hidden()
    assert index.queries[-1][0] == "two people talk"


def test_screen_readers_hear_the_search_and_its_counts_once(page, address, index, monkeypatch):
    query = index.query

    def slow(text, k=10, **options):
        time.sleep(0.6 if text == "slow" else 0)
        return query(text, k, **options)

    monkeypatch.setattr(index, "query", slow)
    page.goto(address)
    listen = """() => {
      window.heard = [];
      const node = document.getElementById("status");
      const listen = () => window.heard.push(node.textContent);
      const options = { childList: true, characterData: true, subtree: true };
      new MutationObserver(listen).observe(node, options);
    }"""
    page.evaluate(listen)
    page.get_by_role("searchbox").fill("slow")
    page.keyboard.press("Enter")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#status")).to_have_text("Searching…")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "false")
    heard = [text.strip() for text in page.evaluate("window.heard")]
    assert heard == ["Searching…", "5 moments in 3 films a note"]
    page.get_by_role("searchbox").fill("fast")
    page.keyboard.press("Enter")
    page.wait_for_timeout(500)
    assert page.evaluate("window.heard.length") == 2  # the same counts, without "Searching…"
    inside = "document.getElementById('results').contains(document.getElementById('status'))"
    assert not page.evaluate(inside)  # what is busy may be silent


def test_link_to_a_hit_that_is_not_on_the_first_page_opens(page, many_address, console):
    page.goto(many_address + f"#q=dog&open={segment(55)}&at=56")
    expect(page.get_by_role("dialog")).to_be_visible()
    expect(page.locator("#why")).to_contain_text("no longer on disk")
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(cards(page)).to_have_count(20)
    assert all("404" in message for message in console)
    console.clear()
