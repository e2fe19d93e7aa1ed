"""A browser for the tests of pages: found on this machine, watched for requests, its screenshots kept.

    def test_something(open_page, shot):
        page = open_page(path.as_uri(), width=800, scheme="dark")
        page.get_by_role("button", name="Play").click()
        shot(page, "something-dark")

A test fails at its end where a page asked another host for anything (websockets too) or left a JavaScript exception
uncaught. Where no browser is found the tests are skipped, with words on how to get one; under CI they fail instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import pytest

from backsight.project import results_root

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

VARIABLE = "BACKSIGHT_CHROMIUM"
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No sandbox: in containers there is none to be had. The rest keeps the browser itself from calling home.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)
OWN_HOSTS = ("127.0.0.1", "localhost", "::1")
OWN_SCHEMES = ("file", "data", "blob", "about", "chrome-error")
PATIENCE = 15_000  # milliseconds that an action waits at most: the cores may be busy with other tests

OpenPage = Callable[..., "Page"]
Shot = Callable[..., Path]


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser for the tests of this folder, in every test process.

    Not for the whole session: while playwright's synchronous interface is open, its event loop counts as running, and
    notebooks that the same process runs afterwards need one of their own.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _do_without("the package playwright is not installed: `pip install playwright`, or `make install`")
    with sync_playwright() as started:
        program = find_browser(started.chromium.executable_path)
        if program is None:
            _do_without(
                f"no browser: install Chromium (`apt install chromium`, or `python -m playwright install chromium`), "
                f"or name one in {VARIABLE}"
            )
        opened = started.chromium.launch(executable_path=program, args=list(ARGUMENTS))
        yield opened
        opened.close()


def find_browser(downloaded: str) -> str | None:
    """The program to start: the one that BACKSIGHT_CHROMIUM names, one on PATH, or playwright's own download."""
    if named := os.environ.get(VARIABLE):
        found = shutil.which(named)
        if found is None:
            pytest.fail(f"{VARIABLE} is {named!r}, which is no program: name the browser's file, or unset it")
        return found
    on_path = (found for name in PROGRAMS if (found := shutil.which(name)))
    return next(on_path, downloaded if Path(downloaded).is_file() else None)


def _do_without(reason: str) -> None:
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{reason} (CI is set: pages must be tested there)")
    pytest.skip(reason)


@pytest.fixture
def requests() -> list[str]:
    """The URLs that the pages of this test have asked for, in order."""
    return []


@pytest.fixture
def open_page(browser: Browser, requests: list[str]) -> Iterator[OpenPage]:
    """open_page(url, width=1280, height=900, scheme="light", **options) -> Page, in a fresh context, loaded.

    options: of playwright's new_context, such as reduced_motion="reduce" or java_script_enabled=False.
    """
    contexts, errors, foreign = [], [], []

    def watch(url: str) -> None:
        requests.append(url)
        parts = urlsplit(url)
        if parts.scheme not in OWN_SCHEMES and parts.hostname not in OWN_HOSTS:
            foreign.append(url)

    def open_one(
        url: str, width: int = 1280, height: int = 900, scheme: Literal["light", "dark"] = "light", **options: Any
    ) -> Page:
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, **options)
        contexts.append(context)
        context.set_default_timeout(PATIENCE)
        page = context.new_page()
        page.on("request", lambda request: watch(request.url))
        page.on("websocket", lambda socket: watch(socket.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url, wait_until="load", timeout=4 * PATIENCE)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert not foreign, f"asked another host: {foreign[:5]}"
    assert not errors, f"JavaScript exceptions: {errors[:5]}"


@pytest.fixture(scope="session")
def screenshots() -> Path:
    """Where screenshots are kept to be looked at: results/test/browser under `make test`, ignored by git."""
    folder = results_root() / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def shot(screenshots: Path) -> Shot:
    """shot(page, name, full_page=False) -> the PNG that it wrote."""

    def take(page: Page, name: str, full_page: bool = False) -> Path:
        path = screenshots / f"{name}.png"
        page.screenshot(path=path, full_page=full_page, animations="disabled")
        return path

    return take
