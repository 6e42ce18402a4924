"""The page with pictures, in a real browser: in the list, and to search by."""

import io
import re

import pytest
from browsers import SCHEMES, WIDTHS, keep, needs_chromium, violations
from made_painted import WITHOUT, jpeg, make_painted
from made_service import READ, key
from PIL import Image
from playwright.sync_api import expect
from test_page import ask, bar_widths, browser, lines, open_page, settle, titles  # noqa: F401
from waiting import LIMIT

from recbole_llm.export.writer import write_artifact

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted")
    contents, name, pictures = make_painted(folder)
    write_artifact(folder / "export", contents)
    return folder / "export", name, pictures


@pytest.fixture
def open_painted(open_page, painted):  # noqa: F811
    def begin(*arguments, **changes):
        page = open_page(*arguments, folder=painted[0], image_encoders=(painted[1],), **changes)
        expect(page.locator("#counts")).to_contain_text("40 items") if "keys" not in changes else None
        return page

    return begin


def is_drawn(image):
    expect(image).to_have_js_property("complete", True)
    assert image.evaluate("one => one.naturalWidth") == 9


def file_chooser(page, press):
    """Return the file chooser that a press opens; a browser that handles the press after 5 seconds opens none: press again."""
    opened = []
    page.on("filechooser", lambda chooser: opened.append(chooser))
    page.evaluate("() => 1")  # what listens is there before the press
    for attempt in range(10 * LIMIT):
        if attempt % 100 == 0:
            press()
        page.wait_for_timeout(100)
        if opened:
            return opened[0]
    raise AssertionError(f"no file chooser after {LIMIT} s")


def test_pictures_stand_in_boxes_of_one_size(open_painted):
    page = open_painted()
    ask(page, "u3")
    expect(lines(page)).to_have_count(10)
    boxes = [box.bounding_box() for box in page.locator("#answer .thumb").all()]
    assert len(boxes) == 10 and {(box["width"], box["height"]) for box in boxes} == {(48, 72)}
    page.get_by_role("button", name="Show more").click()
    expect(lines(page)).to_have_count(20)
    page.get_by_role("button", name="Show more").click()
    expect(page.get_by_role("button", name="Show more")).to_be_hidden()
    without = sum(title in {f"Title {at}" for at in WITHOUT} for title in titles(page))
    expect(page.locator("#answer .thumb:empty")).to_have_count(without)
    assert without > 0
    heights = {box.bounding_box()["height"] for box in page.locator("#answer .thumb").all()}
    assert heights == {72}
    first = page.locator("#answer img").first
    is_drawn(first)
    assert first.get_attribute("alt") == f"Picture of {titles(page)[0]}" and first.get_attribute("loading") == "lazy"
    assert page.errors == [] and violations(page) == []
    asked = [url for url in page.requests if url.endswith("/image")]
    assert asked and not any(f"i{at}/image" in url for url in asked for at in WITHOUT)


def test_a_picture_that_is_not_to_be_had_leaves_its_box(open_painted):
    page = open_painted()
    page.route("**/image", lambda route: route.fulfill(status=200, content_type="image/jpeg", body=b"no"))
    ask(page, "u3")
    expect(page.locator("#answer .thumb:empty")).to_have_count(10)


def test_an_export_without_pictures_shows_nothing_of_them(open_page):  # noqa: F811
    page = open_page()
    ask(page, "u3")
    expect(lines(page)).to_have_count(10)
    assert page.locator(".thumb, img").count() == 0
    expect(page.get_by_role("button", name="Search by picture")).to_be_hidden()
    page.get_by_role("button", name="Add an item").click()
    expect(page.get_by_label("Picture, if there is one")).to_be_hidden()
    assert not any("image" in url for url in page.requests)


def test_a_picture_is_searched_for_by_keyboard_drop_and_paste(open_painted, painted):
    page = open_painted()
    button = page.get_by_role("button", name="Search by picture")
    button.focus()
    file_chooser(page, lambda: page.keyboard.press("Enter")).set_files(painted[2] / "i4.png")
    expect(page.locator("#answer-title")).to_have_text("Like your picture")
    expect(page.locator("#status")).to_have_text("From your picture, the likest first.")
    expect(lines(page)).to_have_count(10)
    assert titles(page)[0] == "Title 4"
    given = page.get_by_alt_text("The picture that you gave")
    is_drawn(given)
    settle(page)
    widths = bar_widths(page)
    assert widths == sorted(widths, reverse=True) and widths[0] > 60
    lines(page).first.locator("summary").click()
    expect(lines(page).first.locator(".about")).to_contain_text("like your picture")
    assert violations(page) == []
    # filters narrow it
    page.get_by_text("Filter", exact=True).click()
    page.get_by_label("Attribute").select_option("year")
    page.get_by_label("From").fill("2000")
    page.get_by_role("button", name="Add filter").click()
    expect(page.locator("#answer .name").first).not_to_have_text("Title 4")
    assert all(int(name.split()[1]) >= 20 for name in titles(page))
    page.get_by_role("button", name="Remove the filter").click()
    # dropped anywhere, and pasted
    data = list((painted[2] / "i6.png").read_bytes())
    made = "const held = new DataTransfer(); held.items.add(new File([new Uint8Array(data)], 'x.png', {type: 'image/png'}));"
    send = "target.dispatchEvent(new DragEvent(kind, {bubbles: true, cancelable: true, dataTransfer: held}))"
    page.evaluate(f"(data) => {{ {made} const target = document.body; const kind = 'dragenter'; {send} }}", data)
    assert "dropping" in page.locator("body").get_attribute("class")
    page.evaluate(f"(data) => {{ {made} const target = document.body; const kind = 'drop'; {send} }}", data)
    expect(page.locator("#answer .name").first).to_have_text("Title 6")
    assert "dropping" not in page.locator("body").get_attribute("class")
    data = list((painted[2] / "i8.png").read_bytes())
    paste = "document.dispatchEvent(new ClipboardEvent('paste', {bubbles: true, clipboardData: held}))"
    page.evaluate(f"(data) => {{ {made} {paste} }}", data)
    expect(page.locator("#answer .name").first).to_have_text("Title 8")
    assert page.errors == []


def test_what_is_no_picture_is_told(open_painted, tmp_path):
    page = open_painted()
    (tmp_path / "page.html").write_text("<html>")
    page.set_input_files("#picture", tmp_path / "page.html")
    expect(page.locator("#status")).to_have_text("That is no picture that can be read: JPEG, PNG, WEBP or GIF.")
    (tmp_path / "big.png").write_bytes(bytes(6 << 20))
    page.set_input_files("#picture", tmp_path / "big.png")
    expect(page.locator("#status")).to_have_text("The picture is larger than 5 MB.")
    (tmp_path / "broken.png").write_bytes(b"<html>")
    page.set_input_files("#picture", tmp_path / "broken.png")
    expect(page.locator("#status")).to_contain_text("cannot be read as a picture")


def test_a_new_item_comes_with_its_picture(open_painted, tmp_path):
    page = open_painted()
    page.get_by_role("button", name="Add an item").click()
    assert violations(page) == []
    (tmp_path / "new.jpg").write_bytes(jpeg((300, 400)))
    for label, value in (("Id", "new/1"), ("Title", "Opera"), ("Text", "space opera")):
        page.get_by_label(label, exact=True).fill(value)
    page.get_by_label("Picture, if there is one").set_input_files(tmp_path / "new.jpg")
    page.get_by_role("button", name="Add and show it").click()
    expect(page.locator("#status")).to_contain_text("Added; it is")
    found = page.evaluate(
        "fetch('v1/items/new%2F1/image').then((one) => one.arrayBuffer()).then((all) => [...new Uint8Array(all)])"
    )
    assert Image.open(io.BytesIO(bytes(found))).size == (144, 192)


def test_with_a_key_pictures_come_too(open_painted):
    page = open_painted(keys=(key("read", READ),))
    page.get_by_label("API key").fill(READ)
    page.get_by_role("button", name="Use key").click()
    expect(page.locator("#counts")).to_contain_text("40 items")
    ask(page, "u3")
    expect(lines(page)).to_have_count(10)
    image = page.locator("#answer img").first
    expect(image).to_have_attribute("src", re.compile("^blob:"))
    is_drawn(image)


@pytest.mark.parametrize("color_scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_three_widths(open_painted, painted, tmp_path, width, color_scheme):
    page = open_painted(width, color_scheme)
    page.set_input_files("#picture", painted[2] / "i4.png")
    expect(lines(page)).to_have_count(10)
    lines(page).nth(1).locator("summary").click()
    assert violations(page) == []
    keep(page, tmp_path, f"page-pictures-{width}-{color_scheme}")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    settle(page)
    assert max(bar_widths(page)) > 60
    boxes = page.locator("#answer summary").evaluate_all(
        "all => all.map((one) => [...one.children].map((part) => part.getBoundingClientRect())"
        ".map(({left, right, top, bottom}) => [left, right, top, bottom]))"
    )
    for parts in boxes:  # nothing lies on anything else
        for at, (left, right, top, bottom) in enumerate(parts):
            for other in parts[at + 1 :]:
                apart = right <= other[0] + 1 or other[1] <= left + 1 or bottom <= other[2] + 1 or other[3] <= top + 1
                assert apart, (width, parts)


def test_the_page_stays_small():
    from recbole_llm.serving.app import STATIC

    assert sum(path.stat().st_size for path in STATIC.iterdir()) < 60_000
