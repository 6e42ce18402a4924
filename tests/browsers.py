"""A real browser for tests of pages, and axe-core's judgement of them."""

import os
import shutil
from contextlib import contextmanager

import pytest
from waiting import LIMIT

pytest.importorskip("playwright", reason="extra 'test': playwright")
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Error, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package chromium)")
WIDTHS = (390, 1024, 1440)
SCHEMES = ("light", "dark")


@contextmanager
def launched():
    """A browser without a window; where it does not start, the test is skipped."""
    with sync_playwright() as playwright:
        try:
            # containers have no user namespaces for a sandbox, and little shared memory
            arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=LIMIT * 1000)
        except Error as error:
            pytest.skip(f"chromium does not start here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def violations(page):
    """Of WCAG and best practice, by axe-core."""
    found = Axe().run(page).response["violations"]
    return [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]


def keep(page, folder, name):
    """A screenshot, which RECBOLE_LLM_SCREENSHOTS=folder keeps."""
    page.screenshot(path=str(folder / f"{name}.png"), full_page=True)
    kept = os.environ.get("RECBOLE_LLM_SCREENSHOTS")
    if kept:
        shutil.copy(folder / f"{name}.png", kept)
