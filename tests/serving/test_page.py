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
from axe_playwright_python.sync_playwright import Axe
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

    def begin(width=1024, color_scheme="light", **changes):
        server, thread, url = start(shared_folder, **changes)
        context = browser.new_context(color_scheme=color_scheme, viewport={"width": width, "height": 900})
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


def ask(page, text):
    page.get_by_label("Words, a title").fill(text)
    page.get_by_role("button", name="Search", exact=True).click()


def lines(page):
    return page.locator("#answer > li")


def bar_widths(page):
    return page.locator("#answer .bar span").evaluate_all(
        "bars => bars.map((bar) => bar.getBoundingClientRect().width)"
    )


def violations(page):
    """Of WCAG and best practice, by axe-core."""
    found = Axe().run(page).response["violations"]
    return [(one["id"], [node["html"][:120] for node in one["nodes"]]) for one in found]


def keep(page, tmp_path, name):
    """A screenshot, which RECBOLE_LLM_SCREENSHOTS=folder keeps."""
    page.screenshot(path=str(tmp_path / f"{name}.png"), full_page=True)
    folder = os.environ.get("RECBOLE_LLM_SCREENSHOTS")
    if folder:
        shutil.copy(tmp_path / f"{name}.png", folder)


def test_a_visit(open_page, tmp_path):
    page = open_page()
    expect(page.locator("#counts")).to_contain_text("40 items · 12 customers")
    # a title, by keyboard alone
    page.keyboard.press("/")
    page.keyboard.type("title 1")
    expect(page.locator("#options > li")).to_have_count(8)
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Remove Title 10")).to_be_visible()
    expect(lines(page)).to_have_count(10)
    expect(page.locator("#status")).to_have_text("From the items you like, best first.")
    expect(lines(page).first.locator(".why")).to_contain_text("because of Title 10")
    # details on click, by keyboard; then along the list
    lines(page).first.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(lines(page).first.locator("dl")).to_contain_text("year")
    page.keyboard.press("ArrowDown")
    expect(lines(page).nth(1).locator("summary")).to_be_focused()
    # words
    ask(page, "space story")
    expect(page.locator("#status")).to_have_text("From your words, best first.")
    expect(lines(page)).to_have_count(10)
    expect(page.locator("#subject")).to_be_hidden()
    # a customer, with the history beside the list
    ask(page, "u3")
    expect(page.locator("#answer-title")).to_have_text("For customer u3")
    expect(page.locator("#status")).to_have_text("From this customer's history, best first.")
    held = page.evaluate("fetch('v1/users?id=u3').then((answer) => answer.json())")["users"][0]["items"]
    assert page.locator("#history li").all_text_contents() == [item["title"] for item in held] != []
    page.get_by_role("button", name="Show more").click()
    expect(lines(page)).to_have_count(20)
    # similar items
    lines(page).first.locator("summary").click()
    lines(page).first.get_by_role("button", name="Similar items").click()
    expect(page.locator("#status")).to_have_text("The likest first.")
    # what is liked
    lines(page).first.locator("summary").click()
    lines(page).first.get_by_role("button", name="I like this").click()
    expect(page.locator("#answer-title")).to_have_text("For what you like")
    assert page.errors == []
    assert all(url.startswith(page.url_of_server) for url in page.requests)  # nothing from anywhere else


def test_a_new_item_is_shown_at_once_and_its_title_is_text(open_page):
    page = open_page()
    page.get_by_role("button", name="Add an item").click()
    title = "<img src=x onerror=alert(1)> Opera"
    page.get_by_label("Id", exact=True).fill("new/1")
    page.get_by_label("Title", exact=True).fill(title)
    page.get_by_label("Text", exact=True).fill("space opera")
    page.get_by_role("button", name="Add and show it").click()
    expect(page.locator("#status")).to_contain_text("Added; it is")
    page.get_by_label("Words, a title").fill("opera")
    page.get_by_role("option", name=title).click()
    expect(page.get_by_role("button", name=f"Remove {title}")).to_be_visible()
    assert page.locator("img").count() == 0
    assert page.errors == []


@pytest.mark.parametrize("asked", ["u3", "space story", "nobody at all", "Title 10"])
def test_the_best_item_has_the_longest_bar(open_page, asked):
    page = open_page()
    if asked == "Title 10":
        page.get_by_label("Words, a title").fill(asked)
        page.get_by_role("option", name=asked).click()
    else:
        ask(page, asked)
    expect(lines(page)).to_have_count(10)
    page.wait_for_timeout(400)  # the bars' transition
    widths = bar_widths(page)
    assert widths == sorted(widths, reverse=True)
    whole = page.locator("#answer .bar").first.evaluate("bar => bar.getBoundingClientRect().width")
    assert widths[0] == pytest.approx(whole) and whole > 0
    assert widths[-1] < widths[0]


def test_filters_narrow_the_list_and_are_taken_away(open_page):
    page = open_page()
    ask(page, "u3")
    expect(lines(page)).to_have_count(10)
    page.get_by_text("Filter", exact=True).click()
    page.get_by_label("Attribute").select_option("year")
    page.get_by_label("From").fill("1985")
    page.get_by_label("to", exact=True).fill("1987")
    page.get_by_role("button", name="Add filter").click()
    expect(page.locator("#status")).to_contain_text("The filters leave no more.")
    years = [int(name.split()[1]) + 1980 for name in page.locator("#answer .name").all_text_contents()]
    assert years and all(1985 <= year <= 1987 for year in years)
    page.get_by_text("Filter", exact=True).click()
    page.get_by_label("Attribute").select_option("kind")
    page.get_by_label("Value").fill("no such kind")
    page.get_by_role("button", name="Add filter").click()
    expect(page.locator("#status")).to_have_text("Nothing is left to show. Take a filter away.")
    for name in ("kind: no such kind", "year 1985 to 1987"):
        page.get_by_role("button", name=f"Remove the filter {name}").click()
    expect(lines(page)).to_have_count(10)
    assert page.errors == []


@pytest.mark.parametrize("color_scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1024, 1440])
def test_three_widths(open_page, tmp_path, width, color_scheme):
    page = open_page(width, color_scheme)
    expect(page.locator("#counts")).to_contain_text("40 items")
    assert violations(page) == []
    ask(page, "u3")
    expect(lines(page)).to_have_count(10)
    lines(page).nth(1).locator("summary").click()
    expect(lines(page).nth(1).locator("dl")).to_contain_text("genre")
    assert violations(page) == []
    keep(page, tmp_path, f"page-{width}-{color_scheme}")
    # nothing is cut off at the side, ten lines are no taller than two screens, and bars can be seen
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    lines(page).nth(1).locator("summary").click()
    assert page.locator("#answer").bounding_box()["height"] < 1000
    page.wait_for_timeout(400)
    assert max(bar_widths(page)) > 60
    page.get_by_role("button", name="Add an item").click()
    assert violations(page) == []


def test_the_page_is_small():
    from recbole_llm.serving.app import STATIC

    assert sum(path.stat().st_size for path in STATIC.iterdir()) < 60_000


def test_the_page_asks_for_a_key_and_shows_errors(open_page):
    import hashlib

    page = open_page(keys=(Key("read", hashlib.sha256(KEY.encode()).hexdigest()),))
    expect(page.locator("#status")).to_contain_text("A valid key is needed")
    page.get_by_label("API key").fill(KEY)
    page.keyboard.press("Enter")
    expect(page.locator("#counts")).to_contain_text("40 items")
    page.get_by_role("button", name="Add an item").click()
    page.get_by_label("Id", exact=True).fill("a")
    page.get_by_label("Title", exact=True).fill("a")
    page.get_by_label("Text", exact=True).fill("a")
    page.get_by_role("button", name="Add and show it").click()
    expect(page.locator("#add-status")).to_have_text("This key may read only.")
