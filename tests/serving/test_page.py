"""The page in a real browser."""

import json
import re
import threading

import numpy as np
import pytest
from browsers import SCHEMES, WIDTHS, keep, launched, needs_chromium, violations
from made_export import PATIENT, WordEncoder, make_contents
from made_search import make_shop
from waiting import LIMIT, happens, join, wait_until

pytest.importorskip("fastapi", reason="extra 'serve'")
pytest.importorskip("orjson", reason="extra 'serve'")
pytest.importorskip("uvicorn", reason="extra 'serve'")
import uvicorn
from playwright.sync_api import expect

from recbole_llm.export.writer import write_artifact
from recbole_llm.serving.app import create_app
from recbole_llm.serving.settings import Key, Settings

pytestmark = needs_chromium
KEY = "k" * 20
expect.set_options(timeout=LIMIT * 1000)


@pytest.fixture(scope="module")
def browser():
    with launched() as started:
        yield started


def start(shared_folder, make=WordEncoder, **changes):
    app = create_app(Settings(export=str(shared_folder), limits=PATIENT, **changes), lambda folder, manifest: make())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    ready = "ready" if make is WordEncoder else "loading"
    wait_until(lambda: server.started and app.state.service.text.state == ready, "the server answers")
    return server, thread, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


@pytest.fixture(scope="module")
def shop_folder(tmp_path_factory):
    """An export that searches texts by likeness, words and taste."""
    folder = tmp_path_factory.mktemp("shop") / "export"
    write_artifact(folder, make_shop())
    return folder


@pytest.fixture
def open_page(shared_folder, browser):
    opened = []

    def begin(width=1024, color_scheme="light", folder=shared_folder, touch=False, **changes):
        server, thread, url = start(folder, **changes)
        context = browser.new_context(
            color_scheme=color_scheme, viewport={"width": width, "height": 900}, has_touch=touch
        )
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


def settle(page):
    """Wait until what moves has come to rest, however long the machine takes to draw it."""
    frames = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))))"
    page.evaluate(f"() => {frames}.then(() => Promise.allSettled(document.getAnimations().map((one) => one.finished)))")


def bar_widths(page):
    return page.locator("#answer .bar span").evaluate_all(
        "bars => bars.map((bar) => bar.getBoundingClientRect().width)"
    )


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
    settle(page)
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
    # what is like an item is filtered too
    lines(page).first.locator("summary").click()
    lines(page).first.get_by_role("button", name="Similar items").click()
    expect(page.locator("#status")).to_have_text("The likest first. The filters leave no more.")
    first = f"i{years[0] - 1980}"
    alike = answer_of(page, item=first, filter={"year": {"gte": 1985, "lte": 1987}})["items"]
    expect_titles(page, [item["title"] for item in alike])
    assert len(alike) == 2 and first not in [item["id"] for item in alike]
    ask(page, "u3")
    expect(page.locator("#status")).to_contain_text("From this customer's history")
    page.get_by_text("Filter", exact=True).click()
    page.get_by_label("Attribute").select_option("kind")
    page.get_by_label("Value").fill("no such kind")
    page.get_by_role("button", name="Add filter").click()
    expect(page.locator("#status")).to_have_text("Nothing is left to show. Take a filter away.")
    for name in ("kind: no such kind", "year 1985 to 1987"):
        page.get_by_role("button", name=f"Remove the filter {name}").click()
    expect(lines(page)).to_have_count(10)
    assert page.errors == []


def answer_of(page, **body):
    """What the service answers to a body, asked beside the page."""
    body = {"k": 10, "explain": 3, **body}
    asked = "body => fetch('v1/recommend', {method: 'POST', headers: {'content-type': 'application/json'}, body})"
    return page.evaluate(f"{asked}.then((answer) => answer.json())", json.dumps(body))


def titles(page):
    return page.locator("#answer .name").all_text_contents()


def expect_titles(page, wanted):
    """Wait for a list: a slider that moves asks more than once."""
    expect(page.locator("#answer .name")).to_have_text(wanted)


def test_variety_by_keyboard(open_page):
    page = open_page()
    slider = page.get_by_role("slider", name="Variety")
    expect(slider).to_have_attribute("aria-valuetext", "none")
    ask(page, "u3")
    expect(lines(page)).to_have_count(10)
    plain = titles(page)
    slider.focus()
    for _ in range(7):
        page.keyboard.press("ArrowRight")
    expect(slider).to_have_attribute("aria-valuetext", "7 of 10")
    expect(page.locator("#status")).to_have_text("From this customer's history, with variety.")
    given = answer_of(page, user="u3", fallback="popular", diversity={"weight": 0.7})["items"]
    varied = [item["title"] for item in given]
    expect_titles(page, varied)
    assert varied != plain and varied[0] == plain[0]  # the best item stays first
    # what variety did to an item is among its details
    moved = next(at for at, item in enumerate(given) if item.get("rules"))
    lines(page).nth(moved).locator("summary").click()
    place = given[moved]["rules"][0]["place"]
    expect(lines(page).nth(moved)).to_contain_text(f"Variety: by score alone it would be number {place}.")
    # with more of them, for words, and for similar items
    page.get_by_role("button", name="Show more").click()
    expect(lines(page)).to_have_count(20)
    ask(page, "space story")
    expect(page.locator("#status")).to_have_text("From your words, with variety.")
    asked = answer_of(page, text="space story", diversity={"weight": 0.7})["items"]
    expect_titles(page, [item["title"] for item in asked])
    lines(page).first.locator("summary").click()
    lines(page).first.get_by_role("button", name="Similar items").click()
    expect(page.locator("#status")).to_have_text("The likest first, with variety.")
    alike = answer_of(page, item=asked[0]["id"], diversity={"weight": 0.7})["items"]
    expect_titles(page, [item["title"] for item in alike])
    assert [item["id"] for item in alike] != [item["id"] for item in answer_of(page, item=asked[0]["id"])["items"]]
    # and back
    ask(page, "u3")
    slider.focus()
    page.keyboard.press("Home")
    expect(page.locator("#status")).to_have_text("From this customer's history, best first.")
    expect_titles(page, plain)
    assert page.errors == []


def test_variety_by_touch_on_a_phone(open_page, tmp_path):
    page = open_page(390, touch=True)
    ask(page, "u3")
    expect(lines(page)).to_have_count(10)
    slider = page.get_by_role("slider", name="Variety")
    box = slider.bounding_box()
    assert box["height"] >= 24 and box["width"] >= 100 and box["x"] >= 0 and box["x"] + box["width"] <= 390
    page.touchscreen.tap(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    expect(slider).to_have_attribute("aria-valuetext", "10 of 10")
    expect(page.locator("#variety-value")).to_have_text("10 of 10")
    expect(page.locator("#status")).to_contain_text("with variety")
    assert violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    keep(page, tmp_path, "page-variety-390")


def test_the_search_box_answers_by_likeness_words_and_taste(open_page, tmp_path, shop_folder):
    page = open_page(folder=shop_folder)
    ask(page, "Iron mat")
    expect(page.locator("#status")).to_have_text("From your words, best first.")
    given = answer_of(page, text="Iron mat")["items"]
    expect_titles(page, [item["title"] for item in given])
    assert given[0]["title"].startswith("Iron mat") and given[0]["parts"]["likeness"] > 0
    first = lines(page).first
    expect(first.locator(".why")).to_have_text(re.compile("words"))
    first.locator("summary").click()
    for part in ("like it in meaning", "the same words", "bought with its like"):
        expect(first.locator(".about")).to_contain_text(part)
    settle(page)
    widths = page.locator("#answer summary .bar span").evaluate_all("all => all.map((bar) => bar.offsetWidth)")
    assert len(widths) == 10 and widths == sorted(widths, reverse=True) and widths[-1] < widths[0]
    assert violations(page) == [] and page.errors == []
    keep(page, tmp_path, "page-search")
    ask(page, "qqq zzz")
    expect(page.locator("#status")).to_have_text("From your words, best first. No item here has these words.")


@pytest.mark.parametrize("color_scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_three_widths(open_page, tmp_path, width, color_scheme):
    page = open_page(width, color_scheme)
    expect(page.locator("#counts")).to_contain_text("40 items")
    assert violations(page) == []
    sizes = np.diff(make_contents().history_offsets)
    ask(page, f"u{sizes.argmax()}")  # on a phone the history scrolls sideways
    expect(lines(page)).to_have_count(10)
    lines(page).nth(1).locator("summary").click()
    expect(lines(page).nth(1).locator("dl")).to_contain_text("genre")
    assert violations(page) == []
    keep(page, tmp_path, f"page-{width}-{color_scheme}")
    scrolls = page.evaluate(
        "document.querySelector('#history').scrollWidth > document.querySelector('#history').clientWidth"
    )
    assert scrolls == (width == 390) == (page.locator("#history").get_attribute("tabindex") == "0")
    # nothing is cut off at the side, ten lines are no taller than two screens, and bars can be seen
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    lines(page).nth(1).locator("summary").click()
    assert page.locator("#answer").bounding_box()["height"] < 1000
    settle(page)
    assert max(bar_widths(page)) > 60
    page.get_by_role("button", name="Add an item").click()
    assert violations(page) == []


def test_an_answer_comes_as_soon_as_texts_can_be_read(open_page):
    may_load = threading.Event()

    def slow():
        happens(may_load, "the encoder may load")
        return WordEncoder()

    page = open_page(make=slow)
    ask(page, "space story")
    expect(page.locator("#status")).to_have_text("The encoder is still loading. The answer comes as soon as it can.")
    expect(page.locator("#results")).to_have_attribute("aria-busy", "true")
    may_load.set()
    expect(lines(page)).to_have_count(10)
    expect(page.locator("#status")).to_have_text("From your words, best first.")
    # who asks something else meanwhile is not overtaken
    assert page.evaluate("document.querySelector('#results').hasAttribute('aria-busy')") is False


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
