"""The page of ``fwpkm inspect`` as a headless browser shows it: on a phone and a desk, light and dark, by keyboard.

``make test-page`` runs this: it needs a browser, which pip does not install.
"""

import json

import pytest
from browser import Browser
from recordings import CFG, HOSTILE, record

from fwpkm.diagnostics.page import write_page

pytestmark = pytest.mark.browser
WIDTHS = (375, 1280)
LOUD = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled", "Page.javascriptDialogOpening")

OUTSIDE = """
[...document.querySelectorAll("body *:not(.table *)")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.tagName + e.id)"""
"""What is cut off, or pushes the page wider; a table scrolls inside its own box."""

CONTRAST = """
(() => {
  const channels = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((c) => (c /= 255) <= .03928 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = channels(getComputedStyle(node).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
  };
  return Math.min(...[...document.querySelectorAll("body *")].filter((node) => node.checkVisibility()
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())).map((node) => {
      const svg = node instanceof SVGElement, style = getComputedStyle(node);
      const colour = channels(svg ? style.fill : style.color);
      const [a, b] = [luminance(colour), luminance(behind(node))].sort((x, y) => y - x);
      return (a + .05) / (b + .05);
    }));
})()"""
"""The least contrast of visible text with what is behind it (WCAG's ratio; 4.5 is its AA)."""


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    record(folder / "reading")
    return write_page(folder / "reading", folder)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_is_legible_and_quiet(browser, page, width, dark):
    browser.open(page, width, dark)
    assert browser.evaluate("innerWidth") == width
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert browser.evaluate(OUTSIDE) == []
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 20, 19)" if dark else "rgb(251, 251, 249)"
    )
    painted = "[...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    written = browser.evaluate("data.memories[0].slots.length")
    assert browser.evaluate(f"{painted}.filter((x, i) => i % 4 === 3 && x === 255).length") == written > 20
    small = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
    assert min(browser.evaluate(small)) >= 10
    assert [event for event in browser.events if event["method"] in LOUD] == []
    sent = [event["params"] for event in browser.events if event["method"] == "Network.requestWillBeSent"]
    assert [request["request"]["url"] for request in sent] == [page.as_uri()]


def focused(browser):
    return browser.evaluate(
        "document.activeElement.id || document.activeElement.textContent || document.activeElement.value"
    )


def test_everything_is_reached_by_the_keyboard(browser, page):
    browser.open(page, 375, False)
    reached = []
    for _ in range(40):
        browser.press("Tab")
        reached.append(focused(browser))
    for name in ("memory", "writers", "canvas", "first", "second", "As a table"):
        assert name in reached
    assert sum(str(name).startswith("Slot ") for name in reached) >= 3
    browser.evaluate("canvas.focus(), choose(0)")
    for key, slot in (("ArrowRight", 1), ("ArrowDown", 9), ("ArrowLeft", 8), ("ArrowLeft", 8)):
        browser.press(key)
        assert browser.evaluate("chosen") == slot
    written = browser.evaluate("data.memories[0].slots")
    browser.press("PageDown")
    assert browser.evaluate("chosen") == min(slot for slot in written if slot > 8)
    browser.evaluate(f"choose({written[3]})")
    browser.press("PageUp")
    assert browser.evaluate("chosen") == written[2]
    assert browser.evaluate("getComputedStyle(canvas).outlineStyle") == "solid"


def test_a_slot_tells_who_wrote_it_in_their_own_words(browser, page):
    """Tags, emoji and words from right to left are text, and nothing else."""
    browser.open(page, 1280, False)
    data = json.loads(browser.evaluate("document.getElementById('data').textContent"))
    number = data["rows"][0]["text"].index(HOSTILE[0])
    memory = data["memories"][0]
    slot = next(s for s, found in zip(memory["slots"], memory["recent"]) if any(w[:2] == [0, number] for w in found))
    browser.evaluate(f"choose({slot})")
    marked = browser.evaluate("[...document.querySelectorAll('#writers mark')].map(m => m.textContent)")
    assert HOSTILE[0] in marked
    said = browser.evaluate("[...document.querySelectorAll('#writers p')].map(p => p.textContent).join('')")
    for word in HOSTILE[:6]:
        assert word in said
    assert browser.evaluate("document.scripts.length") == 2
    assert browser.evaluate("document.images.length") == 0
    about = browser.evaluate("document.getElementById('about').textContent")
    n = memory["slots"].index(slot)
    assert f"Slot {slot} (sub-keys {slot // CFG.num_subkeys} and {slot % CFG.num_subkeys})" in about
    assert str(memory["writers"][n]) in about
    assert [event for event in browser.events if event["method"] in LOUD] == []


def test_the_pointer_the_views_and_the_memories(browser, page):
    browser.open(page, 1280, True)
    data = json.loads(browser.evaluate("document.getElementById('data').textContent"))
    slot = data["memories"][0]["slots"][5]
    box = browser.evaluate("(b => [b.left, b.top, b.width])(canvas.getBoundingClientRect())")
    cell = box[2] / CFG.num_subkeys
    x, y = box[0] + (slot % 8 + 0.5) * cell, box[1] + (slot // 8 + 0.5) * cell
    browser.mouse("mouseMoved", x, y)
    assert f"Slot {slot} " in browser.evaluate("document.getElementById('tip').textContent")
    assert browser.evaluate("document.querySelector('#tip mark').textContent.length") > 0
    for kind in ("mousePressed", "mouseReleased"):
        browser.mouse(kind, x, y)
    assert browser.evaluate("chosen") == slot
    shown = {}
    for view in ("writers", "last", "norm"):
        browser.evaluate(f"document.querySelector('input[value={view}]').click()")
        shown[view] = browser.evaluate("canvas.toDataURL() + document.getElementById('most').textContent")
    assert len(set(shown.values())) == 3
    browser.evaluate("document.getElementById('contested').querySelector('button').click()")
    most = max(data["memories"][0]["writers"])
    assert f"{most} writers" in browser.evaluate("document.getElementById('about').textContent")
    browser.evaluate("memory.value = 1, memory.dispatchEvent(new Event('change'))")
    assert browser.evaluate("shown === data.memories[1]")
    browser.evaluate("first.value = 99, first.dispatchEvent(new Event('change'))")
    assert browser.evaluate("Math.floor(chosen / side)") == 7
