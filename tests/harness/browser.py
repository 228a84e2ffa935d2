"""A real Chromium, that pages are tested in."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
SECONDS = 30  # what takes longer hangs


def chromium() -> str:
    """$ZIP_RC_CHROMIUM, or the Chromium of this machine. Without one the test is skipped: a browser
    is much to ask for, and CI has one."""
    found = os.environ.get("ZIP_RC_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium; apt-get install chromium, or set ZIP_RC_CHROMIUM")
    return found


@contextlib.contextmanager
def browser() -> Iterator[object]:
    """A browser of Playwright, without a window and with a profile of its own."""
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield launched
        finally:
            launched.close()


@contextlib.contextmanager
def page_of(launched, url, *, width=1280, height=900, scheme="light", offline=True, may_fail=None):
    """A page that has drawn itself. Leaving it checks that nothing failed on it, and that it asked
    nobody for anything but its own address.

    Args:
      offline: whether it is a file, which may fetch nothing at all.
      may_fail: words of an error that is meant to be on its console.
    """
    context = launched.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, offline=offline
    )
    page = context.new_page()
    page.set_default_timeout(1000 * SECONDS)
    asked, failures = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: failures.append(str(error)))
    page.on("console", lambda said: failures.append(said.text) if said.type == "error" else None)
    try:
        page.goto(url)
        page.wait_for_selector("html[data-ready]")
        yield page
        page.wait_for_timeout(50)
    finally:
        context.close()
    failures = [x for x in failures if may_fail is None or may_fail not in x]
    assert not failures, failures
    own = url.partition("#")[0]
    others = [x for x in asked if not x.startswith((own, "data:", "blob:"))]
    assert not others, others


def settled(page) -> None:
    """Waits until what was done last is drawn."""
    frames = "requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(go)))"
    page.evaluate(f"() => new Promise(go => {frames})")
