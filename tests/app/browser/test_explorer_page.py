"""What people do on the explorer's page: controls, files, the keyboard, narrow windows, two sessions, the export."""

from __future__ import annotations

import io
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nbformat
import numpy as np
import pytest
from PIL import Image

from backsight.project import project_root

from .servers import explorer_server, lab_server

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

SLOW = 120_000  # milliseconds until a kernel has started and torch is loaded, on two cores that others use too
# One key for each of the four pictures: what their files hold.
PICTURES = """async () => {
  const found = {};
  for (const figure of document.querySelectorAll('.backsight-pictures figure')) {
    const image = figure.querySelector('img');
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    let sum = 2166136261;
    for (const byte of bytes) sum = Math.imul(sum ^ byte, 16777619);
    found[figure.querySelector('.backsight-picture-title').textContent] = sum;
  }
  return found;
}"""
# How often a picture was drawn.
VERSION = """(title) => {
  for (const figure of document.querySelectorAll('.backsight-pictures figure'))
    if (figure.querySelector('.backsight-picture-title').textContent === title)
      return Number(figure.querySelector('img').dataset.version);
}"""
ALL = {"Input", "Reconstruction", "Difference", "Error by patch"}
ONLY_MADE = ALL - {"Input"}
SCENE = "&target=scenes-vit&picture=scene+0"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with explorer_server() as found:
        yield found


def opened(open_page: Any, url: str, **options: Any) -> Page:
    page = open_page(url, **options)
    page.locator(".backsight-chart").first.wait_for(timeout=SLOW)
    settled(page)
    return page


def settled(page: Page) -> None:
    """Until the page has computed everything that it was asked for, and drawn it."""
    page.wait_for_function(
        """() => { const s = document.querySelector('.backsight-status');
          if (!s || s.classList.contains('backsight-busy')) return false;
          if (/Not computed/.test(s.textContent)) return true;
          // On a busy machine the last pictures come after the word that they are computed.
          const figures = [...document.querySelectorAll('.backsight-pictures figure')];
          return /Computed/.test(s.textContent) && figures.every((figure) => Number(figure.querySelector('img')
            .dataset.version) && figure.querySelector('.backsight-picture-title').textContent); }""",
        timeout=SLOW,
    )


def pictures(page: Page) -> dict[str, int]:
    return page.evaluate(PICTURES)


def drawn_anew(page: Page, title: str, act: Any) -> None:
    """Until the act has drawn this picture anew."""
    before = page.evaluate(VERSION, title)
    act()
    page.wait_for_function(f"([title, before]) => ({VERSION})(title) > before", arg=[title, before], timeout=SLOW)


def changed(page: Page, act: Any, expected: set[str]) -> None:
    """After the act exactly these of the four pictures have changed."""
    before = pictures(page)
    if expected:
        drawn_anew(page, "Reconstruction", act)
    else:
        act()
        page.wait_for_timeout(500)
    settled(page)
    now = pictures(page)
    assert {title for title in now if now[title] != before[title]} == expected


def slider(page: Page, label: str) -> Locator:
    return page.locator(".widget-slider", has_text=label).locator(".noUi-handle")


def choose(page: Page, label: str, value: str) -> None:
    page.locator(".widget-dropdown", has_text=label).locator("select").select_option(label=value)


def patch(page: Page, row: int, column: int) -> None:
    """Click on a patch of the input, of a grid of 8 x 8."""
    overlay = page.locator(".backsight-clickable").first
    overlay.scroll_into_view_if_needed()
    box = overlay.bounding_box()
    assert box is not None
    overlay.click(position={"x": (column + 0.5) * box["width"] / 8, "y": (row + 0.5) * box["height"] / 8})


def test_every_control_changes_the_right_pictures(open_page: Any, address: str, shot: Any) -> None:
    """Every control once, from a fresh view on: exactly the right pictures change."""
    page = opened(open_page, address + SCENE, height=1500)
    shot(page, "explorer-light-1280")

    def press(label: str, key: str = "ArrowRight") -> None:
        slider(page, label).press(key)

    changed(page, lambda: press("Depth", "End"), ONLY_MADE)
    assert page.locator(".backsight-strip [aria-pressed=true]").get_attribute("data-tap") == "norm"
    changed(page, lambda: page.locator(".backsight-strip button").nth(3).click(), ONLY_MADE)
    assert "blocks.2" in (page.locator(".backsight-tap").text_content() or "")
    changed(page, lambda: choose(page, "Inverse", "linear"), ONLY_MADE)
    changed(page, lambda: press("Hue shift"), ALL)
    changed(page, lambda: press("Saturation"), ALL)
    changed(page, lambda: page.get_by_role("button", name="image", exact=True).click(), ALL)
    changed(page, lambda: press("Noise"), ONLY_MADE)
    changed(page, lambda: choose(page, "read with", "blocks.4"), ONLY_MADE)
    changed(page, lambda: choose(page, "Picture", "chelsea"), ALL)
    changed(page, lambda: patch(page, 2, 5), ALL)
    assert page.locator(".backsight-erased").count() == 1
    page.get_by_role("button", name="shuffle").click()
    patch(page, 0, 0)
    changed(page, lambda: patch(page, 7, 7), ALL)  # one patch alone has no other to change places with
    page.get_by_role("button", name="swap", exact=True).click()
    changed(page, lambda: patch(page, 4, 4), ONLY_MADE)
    changed(page, lambda: choose(page, "swap from", "scene 3"), ONLY_MADE)
    assert page.locator(".backsight-swapped").count() == 1
    changed(page, lambda: page.get_by_role("button", name="Clear patches").click(), ALL)
    changed(page, lambda: choose(page, "Target", "scenes-deit"), ONLY_MADE)
    changed(page, lambda: page.get_by_role("button", name="Reset").click(), ALL)

    before = pictures(page)
    page.locator(".jupyter-widget-play button, .widget-play button").first.click()
    page.wait_for_function(
        "() => document.querySelector('.backsight-strip [aria-pressed=true]').dataset.tap === 'blocks.1'", timeout=SLOW
    )
    assert pictures(page)["Reconstruction"] != before["Reconstruction"]


def test_files_are_taken_or_answered_with_a_sentence(open_page: Any, address: str, tmp_path: Path) -> None:
    page = opened(open_page, address + SCENE)
    upload = page.locator(".backsight-drop input")

    def give(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        upload.set_input_files(tmp_path / name)

    message = page.locator(".backsight-message")
    before = pictures(page)
    give("notes.png", b"this is no picture")
    message.get_by_text("notes.png is no picture").wait_for()
    assert pictures(page) == before
    random = np.random.default_rng(0)
    file = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (90, 60, 3), np.uint8)).save(file, "WEBP")
    changed(page, lambda: give("small.webp", file.getvalue()), ALL)
    assert message.count() == 0
    large = io.BytesIO()
    Image.fromarray(random.integers(0, 255, (1900, 2400, 3), np.uint8)).save(large, "BMP")  # 13 MB: sent smaller
    changed(page, lambda: give("large.bmp", large.getvalue()), ALL)
    encoded = list(file.getvalue())
    drop = lambda: page.evaluate(  # noqa: E731
        """([bytes]) => { const data = new DataTransfer();
          data.items.add(new File([new Uint8Array(bytes)], 'dropped.webp', {type: 'image/webp'}));
          const zone = document.querySelector('.backsight-drop');
          for (const kind of ['dragover', 'drop'])
            zone.dispatchEvent(new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true})); }""",
        [encoded],
    )
    drawn_anew(page, "Input", drop)
    lost = open_page(f"{address}&target=scenes-vitt")
    lost.locator(".backsight-message").get_by_text("There is no target 'scenes-vitt'").wait_for(timeout=SLOW)
    assert "Traceback" not in (lost.locator("body").text_content() or "")


def test_the_keyboard_reaches_everything(open_page: Any, address: str) -> None:
    page = opened(open_page, f"{address}&target=scenes-detr&tap=decoder.layers.0&picture=scene+0")
    reached: dict[str, str] = {}
    page.locator("body").click(position={"x": 2, "y": 2})
    for _ in range(80):
        page.keyboard.press("Tab")
        name, role = page.evaluate(
            """() => { const e = document.activeElement;
              const label = e.getAttribute('aria-label') || e.labels?.[0]?.textContent || e.textContent || e.title;
              return [(label || '').trim(), e.getAttribute('role') || e.tagName]; }"""
        )
        reached.setdefault(name, role)
    said = " | ".join(reached)
    for wanted in (
        *("Target", "Inverse", "Depth", "read with", "Noise", "Picture", "Your own picture"),
        *("Hue shift", "Saturation", "object", "image", "erase", "swap", "swap from", "Clear", "Reset"),
        *("Export PNG", "Patches of the picture", "remove this object query", "backbone"),
    ):
        assert wanted in said, f"{wanted!r} is not reached by Tab: {said}"
    handle = slider(page, "Hue shift")
    assert handle.get_attribute("role") == "slider"
    overlay = page.locator(".backsight-clickable").first
    overlay.focus()

    def erase() -> None:
        for key in ("ArrowDown", "ArrowRight", "Enter"):
            page.keyboard.press(key)

    changed(page, erase, ALL)
    assert page.locator(".backsight-erased").get_attribute("data-cell") == "9"
    query = page.locator("button.backsight-label").first
    query.focus()
    changed(page, lambda: page.keyboard.press("Enter"), ONLY_MADE)
    assert page.locator("button.backsight-label[aria-pressed=true]").count() == 1


def test_narrow_dark_and_two_sessions(open_page: Any, address: str, shot: Any) -> None:
    first = opened(
        open_page,
        f"{address}&target=scenes-detr&tap=encoder.layers.2&picture=scene+0",
        width=800,
        height=1400,
        scheme="dark",
    )
    second = opened(open_page, address + SCENE, width=420, height=900)
    for page, width in ((first, 800), (second, 420)):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.locator(".backsight-page").evaluate("(e) => e.scrollWidth <= e.clientWidth + 1")
    shot(first, "explorer-dark-800")
    shot(second, "explorer-light-420")
    ground, ink = first.evaluate(
        "() => [getComputedStyle(document.body).backgroundColor, "
        "getComputedStyle(document.querySelector('.backsight-page h2')).color]"
    )
    assert luminance(ground) < 0.1
    assert luminance(ink) > 0.5
    before = pictures(second)
    changed(first, lambda: slider(first, "Depth").press("Home"), ONLY_MADE)
    assert pictures(second) == before
    # The address follows the view; opened again, it shows the same.
    assert "tap=backbone" in first.url
    assert "target=scenes-detr" in first.url


def luminance(colour: str) -> float:
    channels = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(weight * channel / 255 for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))


def test_the_exported_python_reproduces_the_exported_png(
    open_page: Any, address: str, tmp_path: Path, shot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = "&target=scenes-vit&tap=blocks.3&hue_shift=75&noise=0.5&picture=scene+4"
    patches = "&erased=10,11&shuffled=0,63&swapped=36&swap_picture=scene+3"
    page = opened(open_page, address + view + patches, height=1500)
    shot(page, "explorer-changed")
    with page.expect_download() as awaited:
        page.get_by_role("button", name="Export PNG").click()
    awaited.value.save_as(tmp_path / "exported.png")
    page.get_by_text("Python that reproduces this view").click()
    lines = page.locator(".backsight-code textarea").input_value()
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    exported, made = (Image.open(tmp_path / name) for name in ("exported.png", "view.png"))
    assert np.array_equal(np.asarray(exported), np.asarray(made))
    assert exported.text["backsight"] == made.text["backsight"]  # type: ignore[attr-defined]
    shown = pictures(page)
    assert "token" not in page.url  # of the address bar, which is a link to the same view
    again = opened(open_page, f"{address}&{page.url.partition('?')[2]}")
    assert pictures(again) == shown


def test_a_request_under_another_host_is_refused(address: str) -> None:
    """A page elsewhere whose name leads to this machine cannot read the explorer."""
    request = urllib.request.Request(address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=30)


@pytest.mark.slow
def test_the_page_in_jupyterlab(open_page: Any, tmp_path: Path, shot: Any) -> None:
    notebook = nbformat.read(project_root() / "notebooks" / "08_explorer.ipynb", as_version=4)
    last = next(
        place for place, cell in enumerate(notebook.cells) if "explore(" in cell.source and cell.cell_type == "code"
    )
    notebook.cells = notebook.cells[: last + 1]
    notebook.cells[last].source = notebook.cells[last].source.replace(
        "explore(query", f"explore({SCENE[1:]!r} or query"
    )
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    folder = tmp_path / "lab"
    folder.mkdir()
    nbformat.write(notebook, folder / "08_explorer.ipynb")
    with lab_server(folder) as address:
        page = open_page(f"{address}lab/tree/08_explorer.ipynb", height=1300)
        page.locator(".jp-Notebook").wait_for(timeout=SLOW)
        page.get_by_text("| Idle").wait_for(timeout=SLOW)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.locator(".backsight-chart").first.wait_for(timeout=SLOW)
        settled(page)
        # One control of each kind: they are the widgets of the page alone, where every one is used.
        changed(page, lambda: slider(page, "Depth").press("End"), ONLY_MADE)
        changed(page, lambda: choose(page, "Inverse", "linear"), ONLY_MADE)
        changed(page, lambda: patch(page, 2, 5), ALL)
        changed(page, lambda: page.get_by_role("button", name="Reset").click(), ALL)
        changed(page, lambda: slider(page, "Hue shift").press("ArrowRight"), ALL)
        (tmp_path / "notes.png").write_bytes(b"this is no picture")
        page.locator(".backsight-drop input").set_input_files(tmp_path / "notes.png")
        page.locator(".backsight-message").get_by_text("notes.png is no picture").wait_for()
        page.locator(".backsight-page").scroll_into_view_if_needed()
        shot(page, "explorer-lab")
