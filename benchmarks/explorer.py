"""How long after a control's change the new picture is there: in the kernel, and in a browser's page (voila).

Three minutes on two cores. The baseline is the goal: 200 ms, 400 ms of pictures of 224 pixels. Without a Chromium on
PATH only the kernel is measured.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from table import Row, compare, write

from backsight.app.explorer.page import Page
from backsight.app.explorer.view import View
from backsight.targets import SHIPPED
from backsight.targets.wheels import WHEELS

GOALS = dict.fromkeys(SHIPPED, 0.2) | dict.fromkeys(WHEELS, 0.4)  # seconds; these are drawn at 224 pixels
REPEATS = 9
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync", "--no-first-run"]
# Presses a key on a slider and resolves, in milliseconds, when the reconstruction that it leads to has been decoded.
LATENCY = """async ([label, key]) => {
  const slider = [...document.querySelectorAll('.widget-slider')].find((s) => s.textContent.includes(label));
  const handle = slider.querySelector('.noUi-handle');
  const image = document.querySelectorAll('.backsight-pictures img')[1];
  const version = image.dataset.version;
  const start = performance.now();
  handle.dispatchEvent(new KeyboardEvent('keydown', { key, bubbles: true, cancelable: true }));
  while (image.dataset.version === version) {
    if (performance.now() - start > 30000) throw new Error('no new picture');
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
  await image.decode();
  return performance.now() - start;
}"""


def in_the_kernel(target: str) -> list[Row]:
    """From the control's new value to the reconstruction's new file, and to the whole page."""
    page = Page()
    page.look(View(target))
    taps, depth = len(page.workbench.bench(target).taps), page.controls["tap"]
    changes: dict[str, Callable[[int], Any]] = {
        "depth": lambda turn: setattr(depth, "index", (depth.index + 1) % taps),
        "hue shift": lambda turn: setattr(page.controls["hue_shift"], "value", 15 * (turn + 1) * (-1) ** turn),
        "noise": lambda turn: setattr(page.controls["noise"], "value", 0.1 * (turn + 1)),
        "erased patch": lambda turn: page._heard(None, {"kind": "patch", "patch": turn, "on": True}, []),
    }

    async def timed(change: Callable[[int], Any]) -> tuple[list[float], list[float]]:
        first, whole = [], []
        for turn in range(REPEATS + 1):
            start = time.perf_counter()
            change(turn)
            first.append(time.perf_counter() - start)
            if page._rest is not None:
                await page._rest
            whole.append(time.perf_counter() - start)
        return first[1:], whole[1:]

    rows = []
    for name, change in changes.items():
        first, whole = asyncio.run(timed(change))
        rows.append(_row(target, f"{name}, kernel", "new picture", first, "<= 1"))
        rows.append(_row(target, f"{name}, kernel", "strip of all depths and curve of hues too", whole, "stated"))
    return rows


def _row(target: str, case: str, measure: str, seconds: list[float], goal: str) -> Row:
    return compare("explorer", f"{target}, {case}", measure, statistics.median(seconds), "s", GOALS[target], goal)


def in_the_browser() -> list[Row]:
    """From a key on a slider to the decoded picture, in headless Chromium on the same two cores."""
    program = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if program is None:
        print("No Chromium on PATH: the page itself is not measured.", file=sys.stderr)
        return []
    from playwright.sync_api import sync_playwright

    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "app"))
    from browser.servers import explorer_server

    rows = []
    with explorer_server() as address, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=ARGUMENTS)
        for target in GOALS:
            page = browser.new_page()
            page.goto(f"{address}&target={target}", timeout=300_000)
            page.locator(".backsight-chart").first.wait_for(timeout=300_000)
            for label, keys in (("Depth", ("ArrowRight", "ArrowLeft")), ("Hue shift", ("ArrowRight",))):
                seconds = []
                for turn in range(REPEATS + 1):
                    page.wait_for_function("() => !document.querySelector('.backsight-busy')", timeout=60_000)
                    seconds.append(page.evaluate(LATENCY, [label, keys[turn % len(keys)]]) / 1000)
                rows.append(_row(target, f"{label}, page", "new picture decoded", seconds[1:], "<= 1"))
            page.close()
        browser.close()
    return rows


if __name__ == "__main__":
    measured = [row for target in GOALS for row in in_the_kernel(target)]
    write("explorer", measured + in_the_browser())
