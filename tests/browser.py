"""Headless Chromium for tests of pages; they are skipped where there is none."""

import shutil
from contextlib import contextmanager

import pytest

_ARGUMENTS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


def chromium() -> str | None:
    return next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )


needs_browser = pytest.mark.skipif(chromium() is None, reason="no Chromium here")


@contextmanager
def page_of(url, *, width=1280, height=800, scheme="light", scripts=True):
    """An open page and the list its console's messages go to."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=_ARGUMENTS)
        page = browser.new_page(
            viewport={"width": width, "height": height},
            color_scheme=scheme,
            java_script_enabled=scripts,
        )
        said = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))

        def failed(request):
            if request.failure != "net::ERR_ABORTED":  # by the page itself
                said.append(f"failed: {request.url}")

        page.on("requestfailed", failed)
        try:
            page.goto(url)
            yield page, said
        finally:
            browser.close()
