"""The page in a real browser."""

import os
import shutil
import threading

import pytest
from made_export import PATIENT, WordEncoder
from waiting import LIMIT, join, wait_until

pytest.importorskip("fastapi", reason="extra 'serve'")
pytest.importorskip("orjson", reason="extra 'serve'")
pytest.importorskip("uvicorn", reason="extra 'serve'")
pytest.importorskip("playwright", reason="extra 'test': playwright")
import uvicorn
from playwright.sync_api import Error, expect, sync_playwright

from recbole_llm.serving.app import create_app
from recbole_llm.serving.settings import Key, Settings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (Debian package chromium)")
KEY = "k" * 20
expect.set_options(timeout=LIMIT * 1000)


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        try:
            # containers have no user namespaces for a sandbox, and little shared memory
            arguments = ["--no-sandbox", "--disable-dev-shm-usage"]
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments, timeout=LIMIT * 1000)
        except Error as error:
            pytest.skip(f"chromium does not start here: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


def start(shared_folder, **changes):
    app = create_app(
        Settings(export=str(shared_folder), limits=PATIENT, **changes), lambda folder, manifest: WordEncoder()
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started and app.state.service.text.state == "ready", "the server answers")
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture
def open_page(shared_folder, browser):
    opened = []

    def begin(**changes):
        server, thread, url = start(shared_folder, **changes)
        context = browser.new_context(**({"color_scheme": "dark"} if os.environ.get("RECBOLE_LLM_DARK") else {}))
        context.set_default_timeout(LIMIT * 1000)
        page = context.new_page()
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text) if message.type == "error" else None)
        opened.append((server, thread, context))
        page.goto(url)
        page.url_of_server = url
        return page

    yield begin
    for server, thread, context in opened:
        context.close()
        server.should_exit = True
        join(thread)


def test_a_visit(open_page, tmp_path):
    page = open_page()
    expect(page.locator("#model")).to_contain_text("40 items")
    # items, by keyboard alone
    page.get_by_label("Or items you like").focus()
    page.keyboard.type("title 1")
    expect(page.get_by_role("option")).to_have_count(8)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Remove Title 10")).to_be_visible()
    cards = page.locator("#answer > li")
    expect(cards).to_have_count(10)
    expect(page.locator("#status")).to_have_text("From the items chosen.")
    expect(cards.first.locator(".attributes")).to_contain_text("year:")
    expect(cards.first).to_contain_text("everything else")
    first = cards.first.locator("strong").text_content()
    # words
    page.get_by_label("In words").fill("space story")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("From the words.")
    expect(cards).to_have_count(10)
    # a user
    page.get_by_label("Or a known user's id").fill("u3")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("From this user's history.")
    cards.first.get_by_role("button", name="Similar items").click()
    expect(page.locator("#status")).to_have_text("By likeness of the items.")
    # a new item, recommended at once; what it is called is text, not markup
    page.get_by_text("Add a new item").click()
    title = "<img src=x onerror=alert(1)> Opera"
    page.get_by_label("Id", exact=True).fill("new/1")
    page.get_by_label("Title", exact=True).fill(title)
    page.get_by_label("Text", exact=True).fill("space opera")
    page.get_by_role("button", name="Add, and recommend").click()
    expect(page.locator("#status")).to_contain_text("Added; it is")
    page.get_by_label("Or items you like").fill("opera")
    page.get_by_role("option", name=title).click()
    expect(page.get_by_role("button", name=f"Remove {title}")).to_be_visible()
    assert page.locator("img").count() == 0
    page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
    if os.environ.get("RECBOLE_LLM_SCREENSHOT"):
        shutil.copy(tmp_path / "page.png", os.environ["RECBOLE_LLM_SCREENSHOT"])
    assert first and all(url.startswith(page.url_of_server) for url in page.requests)  # nothing from anywhere else
    assert page.errors == []


def test_the_page_asks_for_a_key_and_shows_errors(open_page):
    import hashlib

    page = open_page(keys=(Key("read", hashlib.sha256(KEY.encode()).hexdigest()),))
    expect(page.locator("#status")).to_contain_text("A valid key is needed")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#model")).to_contain_text("40 items")
    page.get_by_label("Or a known user's id").fill("nobody")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_contain_text("what most people chose")
    page.get_by_text("Add a new item").click()
    page.get_by_label("Id", exact=True).fill("a")
    page.get_by_label("Title", exact=True).fill("a")
    page.get_by_label("Text", exact=True).fill("a")
    page.get_by_role("button", name="Add, and recommend").click()
    expect(page.locator("#status")).to_have_text("This key may read only.")
