"""Which picture is whose: the column before the folder, and nothing outside the dataset's folder."""

import pytest

from recbole_llm.content.images.files import find_pictures
from recbole_llm.content.media.files import file_stem


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "shop"
    (root / "images").mkdir(parents=True)
    for name in ("1.jpg", "2.PNG", "2.webp", "a%2Fb.jpg", "%2E.png", "notes.txt"):
        (root / "images" / name).touch()
    (root / "other.jpg").touch()
    (tmp_path / "secret.jpg").touch()
    return root


def names(found):
    return [[path.name for path in paths] for paths in found.paths]


def test_files_are_found_by_the_item_id(folder):
    found = find_pictures(folder, [None, "1", "2", "3", "a/b", ".", "notes"])
    assert names(found) == [[], ["1.jpg"], ["2.PNG"], [], ["a%2Fb.jpg"], ["%2E.png"], []]
    assert (found.report.n, found.report.by_folder, found.report.by_column) == (6, 4, 0)
    assert "4 of 6 items name one (4 by a file images/ITEM_ID.*); 2 without" in found.report.lines()[0]


@pytest.mark.parametrize("item", ["1", "a/b", "..", ".", "50%", "a b", " a ", "x|y", "ü", 'C:\\"<>?*', "CON", "a.b"])
def test_the_name_of_an_items_file_leads_back_to_the_item(folder, item):
    stem = file_stem(item)
    assert not set(stem) & set('/\\:*?"<>|') and "." not in stem
    (folder / "images" / f"{stem}.gif").touch()
    found = find_pictures(folder, [item])
    assert len(found.paths[0]) == 1 and found.report.by_folder == 1


def test_the_column_goes_before_the_folder_item_by_item(folder):
    cells = {"1": "other.jpg", "2": "", "3": "images/1.jpg|other.jpg"}
    found = find_pictures(folder, [None, "1", "2", "3"], cells, "image")
    assert names(found) == [[], ["other.jpg"], ["2.PNG"], ["1.jpg", "other.jpg"]]
    assert (found.report.by_column, found.report.by_folder) == (2, 1)
    assert "2 by the column 'image', 1 by a file" in found.report.lines()[0]


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("../secret.jpg", "lead out"),
        ("/etc/passwd", "lead out"),
        ("images/link.jpg", "lead out"),
        ("images/linked/secret.jpg", "lead out"),
        ("images/circle.jpg", "lead out|no such file"),
        ("images/absent.jpg", "no such file"),
        ("images", "no such file"),
        ("https://example.org/1.jpg", "nothing is fetched"),
        ("data:image/png;base64,AAAA", "nothing is fetched"),
        ("file:///etc/passwd", "nothing is fetched"),
        ("a\0b.jpg", "lead out|no such file"),
    ],
)
def test_what_is_not_read_is_counted_with_its_reason(folder, cell, reason):
    import re

    (folder / "images" / "link.jpg").symlink_to(folder.parent / "secret.jpg")
    (folder / "images" / "linked").symlink_to(folder.parent)
    (folder / "images" / "circle.jpg").symlink_to(folder / "images" / "circle.jpg")
    found = find_pictures(folder, [None, "1"], {"1": cell}, "image")
    assert names(found) == [[], []]  # and the folder's 1.jpg is not taken instead of what the column says
    ((said, items),) = found.report.refused.items()
    assert re.search(reason, said) and items == ["1"]
    assert any("'1'" in line for line in found.report.lines())


def test_a_link_in_the_folder_that_leads_out_is_refused(folder):
    (folder / "images" / "9.jpg").symlink_to(folder.parent / "secret.jpg")
    found = find_pictures(folder, ["9"])
    assert found.paths == ((),) and sum(map(len, found.report.refused.values())) == 1


def test_a_dataset_without_pictures(tmp_path):
    found = find_pictures(tmp_path, [None, "1"])
    assert found.paths == ((), ()) and found.report.lines()[0].startswith("Pictures: 0 of 1 items name one")
