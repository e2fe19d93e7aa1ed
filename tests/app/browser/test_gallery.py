"""The page over a folder of runs, in a browser, opened from a file: what a person does with it by mouse and keys."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from report_runs import save_results

from backsight.app.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Page

OpenPage = Callable[..., Any]
Shot = Callable[..., Path]
each_scheme = pytest.mark.parametrize("scheme", ["light", "dark"])

# What the tests of the slider compare: everything that the player shows.
STATE = """() => ({
  input: document.querySelector('#shown-input').src,
  shown: document.querySelector('#shown').src,
  difference: document.querySelector('#difference').dataset.tap,
  tap: document.querySelector('#shown-tap').textContent,
  psnr: document.querySelector('#frame-psnr').textContent,
  strip: document.querySelector('.strip.chosen h3').textContent,
  marked: document.querySelector('.strip.chosen [aria-current] code').textContent,
  slider: Number(document.querySelector('#depth').value),
  said: document.querySelector('#depth').getAttribute('aria-valuetext'),
})"""
# The least contrast of text with the ground behind it (WCAG 2.2), of all texts that can be seen.
CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length < 4 || colour[3] > 0.99) return colour;
    }
    return [255, 255, 255];
  };
  const found = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const element = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || element.closest('script, style') || !element.checkVisibility()) continue;
    if (element.closest('.skip')) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground(element))];
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), walk.currentNode.data.trim().slice(0, 40)]);
  }
  return found.sort((x, y) => x[0] - y[0])[0];
}"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = save_results(tmp_path_factory.mktemp("project"))
    write_report(results)
    return results


@pytest.fixture
def url(folder: Path) -> str:
    return (folder / "index.html").as_uri()


def state(page: "Page") -> dict[str, Any]:
    """What the player shows, once the difference is drawn."""
    page.wait_for_function(
        "() => document.querySelector('#difference').dataset.tap === document.querySelector('#shown-tap').textContent"
    )
    return page.evaluate(STATE)


def test_the_page_asks_for_its_own_files_only(open_page: OpenPage, requests: list[str], url: str, folder: Path) -> None:
    page = open_page(url)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    page.evaluate("document.querySelectorAll('img[loading]').forEach(each => { each.loading = 'eager'; })")
    page.wait_for_function("[...document.images].filter(i => i.src).every(i => i.complete && i.naturalWidth > 0)")
    assert len(requests) > 3
    for each in requests:
        assert each.startswith(("data:", folder.as_uri())), each


def test_the_slider_moves_the_picture_and_only_that(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    before = state(page)
    assert (before["slider"], before["tap"], before["marked"]) == (0, "patch_embed", "patch_embed")
    page.locator("#depth").focus()
    page.keyboard.press("ArrowRight")
    after = state(page)
    assert (after["slider"], after["tap"], after["marked"]) == (1, "blocks.0", "blocks.0")
    assert after["shown"] != before["shown"]
    assert {key for key in before if before[key] == after[key]} == {"input", "strip"}
    assert after["said"] == f"blocks.0, layer 2 of 3, PSNR {after['psnr']} dB"
    page.keyboard.press("End")
    assert state(page)["tap"] == "norm"
    page.locator(".strip.chosen button").first.click()
    assert state(page) == before


def test_the_difference_is_that_of_the_two_pictures(open_page: OpenPage, url: str) -> None:
    """The made-up reconstruction is 0.9 of the way from grey: twice a tenth of the input's distance from grey."""
    page = open_page(url)
    state(page)
    off = page.evaluate("""() => {
      const read = (picture) => {
        const canvas = document.createElement('canvas');
        canvas.width = canvas.height = 16;
        const context = canvas.getContext('2d');
        context.drawImage(picture, 0, 0);
        return context.getImageData(0, 0, 16, 16).data;
      };
      const given = read(document.querySelector('#shown-input'));
      const drawn = read(document.querySelector('#difference'));
      let worst = 0;
      given.forEach((value, at) => {
        if (at % 4 < 3) worst = Math.max(worst, Math.abs(drawn[at] - 0.2 * Math.abs(value - 127.5)));
      });
      return worst;
    }""")
    assert off <= 2  # both pictures are rounded to 8 bits, and the difference is taken twice


def test_picture_model_and_inverse_can_be_chosen(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    assert state(page)["strip"] == "chelsea: scenes-vit, modular"
    page.get_by_role("radio", name="scene 22 hue 240").check()
    assert state(page)["strip"] == "scene 22 hue 240: scenes-vit, modular"
    assert "heart recoloured" in page.locator("#shows").inner_text()
    page.keyboard.press("Tab")  # on to the models
    page.keyboard.press("ArrowRight")
    chosen = state(page)
    assert chosen["strip"] == "scene 22 hue 240: a/detr <b>, linear"  # the one family that this model has
    assert page.get_by_role("radio", name="modular").is_disabled()
    assert page.locator("#depth").get_attribute("max") == "1"
    page.get_by_role("radio", name="scenes-vit").check()
    assert state(page)["strip"] == "scene 22 hue 240: scenes-vit, linear"


def test_play_runs_to_the_deepest_layer_and_can_be_paused(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    page.get_by_role("button", name="Play").click()
    page.wait_for_function("() => document.querySelector('#depth').value === '1'")
    page.get_by_role("button", name="Pause").click()
    held = page.evaluate(STATE)["slider"]
    page.get_by_role("button", name="Play").press("Enter")
    page.wait_for_function("() => document.querySelector('#play-button').textContent === 'Play'")  # at the end it stops
    assert held < page.evaluate(STATE)["slider"] == 2 or held == 2


def test_nothing_moves_by_itself_for_those_who_ask_for_that(open_page: OpenPage, url: str) -> None:
    page = open_page(url, reduced_motion="reduce")
    button = page.locator("#play-button")
    assert button.inner_text() == "Next layer"
    for expected in ("blocks.0", "norm", "patch_embed"):
        button.click()
        assert state(page)["tap"] == expected
    page.wait_for_timeout(1200)
    assert state(page)["tap"] == "patch_embed"


def test_figures_are_enlarged_and_focus_comes_back(open_page: OpenPage, url: str, shot: Shot) -> None:
    page = open_page(url)
    papers = page.locator(".paper")
    assert papers.count() == 4
    papers.nth(1).focus()
    page.keyboard.press("Enter")
    dialog = page.locator("#enlarged")
    assert dialog.is_visible()
    assert "Figure 2 of 4" in dialog.inner_text()
    assert dialog.locator("img").get_attribute("alt") == papers.nth(1).locator("img").get_attribute("alt")
    assert page.locator("#enlarged-file").get_attribute("href") == papers.nth(1).get_attribute("href")
    shot(page, "gallery-enlarged")
    page.get_by_role("button", name="Next").click()
    assert "Figure 3 of 4" in dialog.inner_text()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # round to the last
    assert "Figure 4 of 4" in dialog.inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement === document.querySelectorAll('.paper')[1]")


def test_the_contents_mark_where_one_is(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    marked = page.locator(".contents [aria-current]")
    assert marked.all_inner_texts() == ["Layer by layer"]
    page.get_by_role("link", name="In numbers").click()
    page.wait_for_function("() => document.querySelector('.contents [aria-current]').textContent === 'In numbers'")
    page.evaluate("scrollTo({top: 1e6, behavior: 'instant'})")
    page.wait_for_function("() => document.querySelector('.contents [aria-current]').textContent === 'Runs and files'")
    assert marked.count() == 1


def test_a_keyboard_is_enough(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    reached = []
    for _ in range(8):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.name"))
    for name in ("picture", "target", "family", "depth", "play-button"):
        assert name in reached


def test_headings_come_in_order(open_page: OpenPage, url: str) -> None:
    page = open_page(url)
    levels = page.evaluate(
        "[...document.querySelectorAll('h1,h2,h3,h4')].filter(e => e.checkVisibility()).map(e => +e.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


@each_scheme
@pytest.mark.parametrize("width", [1280, 800, 400])
def test_it_is_composed_at_every_width(open_page: OpenPage, url: str, shot: Shot, width: int, scheme: str) -> None:
    page = open_page(url, width=width, scheme=scheme)
    state(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    shot(page, f"gallery-{width}-{scheme}")


@each_scheme
def test_texts_stand_out_from_their_ground(open_page: OpenPage, url: str, scheme: str) -> None:
    page = open_page(url, scheme=scheme)
    state(page)
    page.evaluate("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    least, text = page.evaluate(CONTRAST)
    assert least >= 4.5, text


def test_without_javascript_everything_is_there(open_page: OpenPage, url: str) -> None:
    page = open_page(url, java_script_enabled=False)
    assert not page.locator("#player").is_visible()
    assert page.locator(".strip img").count() == 22
    for strip in page.locator(".strip").all():
        assert strip.is_visible()
    assert page.locator("caption a").first.get_attribute("href") == "quality-vit/metrics.csv"
