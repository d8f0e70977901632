"""Tests that everybody can use the search page: axe-core, the keyboard alone, contrast, motion.

axe-core is fetched from the npm registry, and its test is skipped where that cannot be reached.
"""

import re
import shutil
import subprocess
import tarfile

import pytest
from browsing import (
    DESKTOP,
    PHONE,
    SENTENCE,
    address,
    cards,
    chromium,
    console,
    current_second,
    expect,
    index,
    many,
    many_address,
    page,
    pictures,
    save_screenshot,
    serving,
    wait_until,
)

__all__ = ["address", "chromium", "console", "index", "many", "many_address", "page"]  # fixtures

AXE = "axe-core@4.14.1"
RUN = """async () => {
  const { violations } = await axe.run(document, { rules: { "target-size": { enabled: true } } });
  return violations.map(({ id, impact, nodes }) => [id, impact, nodes.map(({ html }) => html)]);
}"""


@pytest.fixture(scope="module")
def axe(tmp_path_factory):
    """Returns the source of axe-core."""
    npm, folder = shutil.which("npm"), tmp_path_factory.mktemp("axe")
    if not npm:
        pytest.skip("npm is not installed")
    command = [npm, "pack", AXE, "--silent", "--fetch-retries=1", "--cache", folder / "cache"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=60)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
        pytest.skip(f"the npm registry has no {AXE}, or cannot be reached")
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as files:
        return files.extractfile("package/axe.min.js").read().decode()


def check(page, axe, state):
    """Fails if axe-core finds a serious or critical fault of the page."""
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(300)  # transitions
    if not page.evaluate("'axe' in window"):
        page.evaluate(axe)
    faults = page.evaluate(RUN)
    save_screenshot(page, state)
    assert [fault for fault in faults if fault[1] in ("serious", "critical")] == [], state


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_axe_finds_no_serious_fault(chromium, axe, index, tmp_path, scheme, size):
    context = chromium.new_context(bypass_csp=True, viewport=size, color_scheme=scheme)
    page = context.new_page()

    def check_state(state):
        check(page, axe, f"axe_{state}_{scheme}_{size['width']}")

    with serving(index, allow_add=tmp_path) as address:
        page.goto(address)
        expect(page.get_by_text("Recent films")).to_be_visible()
        check_state("empty")
        page.get_by_text("Filters").click()
        page.get_by_label("fold near-duplicates").check()
        check_state("filters")
        page.get_by_role("searchbox").fill(SENTENCE)
        page.keyboard.press("Enter")
        cards(page).first.get_by_text("near-duplicate").click()
        check_state("results")
        pictures(page).first.click()
        page.locator("#heat table").wait_for()
        page.locator("#video").evaluate("video => video.pause()")
        check_state("player")
        page.locator("#player").evaluate("dialog => dialog.scrollTo(0, dialog.scrollHeight)")
        check_state("heatmap")
        page.keyboard.press("Escape")
        page.get_by_role("searchbox").fill("break")
        page.keyboard.press("Enter")
        expect(page.locator("#error")).to_contain_text("internal error")
        check_state("error")
        with page.expect_file_chooser() as chooser:
            page.get_by_role("button", name="Add videos").click()
        chooser.value.set_files({"name": "a.txt", "mimeType": "video/mp4", "buffer": b"bad"})
        expect(page.locator("#adding")).to_contain_text("Failed")
        check_state("adding")
        context.close()


def focused(page):
    """Returns a name of the element that has the focus, None for none."""
    read = """() => {
      const element = document.activeElement;
      if (element === document.body) return null;
      const name = element.id || element.className.split(" ")[0] || element.tagName;
      return element.dataset.time ? "frame" : name;
    }"""
    return page.evaluate(read)


def walk(page, most=60):
    """Presses Tab until the focus has left the page, and returns where it was."""
    names = []
    for _ in range(most):
        page.keyboard.press("Tab")
        name = focused(page)
        if name in (None, "text", "close"):
            break
        names.append(name)
    return names


def test_everything_is_reached_with_tab(page, address):
    page.goto(address)
    page.keyboard.type("a dog")  # the box has the focus
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(3)
    names = walk(page)
    assert names[:6] == ["go", "choose", "SUMMARY", "picture", "mark", "moment"]
    assert names.count("picture") == names.count("mark") == 3  # arrow keys go to further marks
    assert "quiet" in names  # more moments of the first film
    pictures(page).first.focus()
    page.keyboard.press("Enter")
    page.locator("#heat table").wait_for()
    page.locator("#close").focus()
    names = walk(page)
    expected = ["video", "mark", "previous", "next", "loop", "best"]
    expected += ["quiet", "similar", "clip", "download", "heat", "frame"]
    assert [name for name in dict.fromkeys(names) if name in expected] == expected
    assert not {"text", "go", "picture"} & set(names)  # the focus stays in the dialog


def test_keyboard_alone_uses_the_results_and_the_player(page, address):
    page.goto(address)
    page.keyboard.press("Tab")
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("a dog")
    page.keyboard.press("Enter")
    expect(cards(page)).to_have_count(3)
    for _ in range(5):
        page.keyboard.press("Tab")  # search, example, filters, picture, timeline
    mark = page.locator(".mark:focus")
    expect(mark).to_have_attribute("title", "0:01 – 0:04, result 4")
    page.keyboard.press("End")
    expect(mark).to_have_attribute("title", "0:17 – 0:19, result 5")
    page.keyboard.press("ArrowLeft")
    expect(mark).to_have_attribute("title", "0:08 – 0:16, result 1")
    expect(pictures(page).first.locator(".time")).to_have_text("0:11")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("button", name="Next moment").focus()
    page.keyboard.press("Enter")
    expect(page.locator("#place")).to_have_text("Moment 3 of 3")
    expect(page.get_by_role("button", name="Next moment")).to_be_focused()
    page.locator("#loop").focus()
    page.keyboard.press("Space")
    expect(page.locator("#loop")).to_have_attribute("aria-pressed", "true")
    page.locator("#heat table").wait_for()
    page.locator("#heat thead button").nth(1).focus()
    page.locator("#loop").press("Space")
    page.locator("#heat thead button").nth(1).press("Enter")
    wait_until(page, lambda: 17 <= current_second(page) < 19)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.locator(".mark:focus")).to_have_count(1)
    expect(page).to_have_url(re.compile(r"#q=a\+dog$"))


def test_focus_is_visible(page, address):
    page.goto(address + "#q=dog")
    expect(cards(page)).to_have_count(3)
    read = "() => getComputedStyle(document.activeElement).outlineStyle"
    for _ in range(12):
        page.keyboard.press("Tab")
        assert page.evaluate(read) == "solid", focused(page)


def test_nothing_moves_where_motion_is_reduced(page, address):
    page.emulate_media(reduced_motion="reduce")
    page.goto(address + "#q=dog")
    expect(cards(page)).to_have_count(3)
    read = """() => [...document.querySelectorAll("*")].filter((element) => {
      const { transitionDuration, animationName } = getComputedStyle(element);
      return parseFloat(transitionDuration) > 0 || animationName !== "none";
    }).length"""
    assert page.evaluate(read) == 0


def test_names_have_the_direction_of_their_script(page, many_address):
    page.goto(many_address + "#q=dog")
    name = cards(page).first.locator("h2 a")
    assert name.evaluate("link => getComputedStyle(link).direction") == "rtl"
    name = cards(page).nth(1).locator("h2 a")
    assert name.evaluate("link => getComputedStyle(link).direction") == "ltr"
