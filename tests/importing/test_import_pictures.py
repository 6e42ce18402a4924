"""``recbole-llm import --images``: pictures copied by name or by a column, every file accounted for, nothing from outside."""

import json
from pathlib import Path

import pytest
import yaml

pytest.importorskip("pyarrow")
from PIL import Image

from recbole_llm import cli
from recbole_llm.content.images.files import find_pictures
from recbole_llm.importer import import_dataset

ITEMS = ("a", "b/c", "50%", "d", "e")


@pytest.fixture
def tables(tmp_path):
    """Interactions of five items, their file, and a folder of pictures."""
    rows = [f"u{user},{item},5" for user in range(4) for item in ITEMS]
    (tmp_path / "events.csv").write_text("user,item,rating\n" + "\n".join(rows) + "\n")
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    return tmp_path, folder


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 5), (shade, 0, 0)).save(path)


def items_file(folder, cells=None):
    rows = [
        f"{item},A story of {item * 3} and more,{cell}" for item, cell in zip(ITEMS, cells or [""] * 5, strict=True)
    ]
    (folder / "items.csv").write_text("item,title,photo\n" + "\n".join(rows) + "\n")
    return folder / "items.csv"


def imported(folder, **more):
    return import_dataset(folder / "events.csv", "shop", data_path=folder / "out", **more)


def test_pictures_are_matched_by_the_name_of_the_item(tables):
    root, folder = tables
    for at, name in enumerate(("a.jpg", "b%2Fc.PNG", "50%.webp", "d.png", "stranger.jpg", "more/e.jpg")):
        picture(folder / name, at)
    picture(folder / "a.png", 99)
    (folder / "d.png").write_bytes(b"<html>")
    (folder / "notes.txt").touch()
    report = imported(root, images=folder)
    pictures = report.pictures
    assert (pictures.items, pictures.matched, pictures.files, pictures.copied) == (5, 3, 7, 3)
    assert {reason: names for reason, names in pictures.refused.items()} == {
        "a second picture of an item": ["a.png"],
        "none of JPEG, PNG, WEBP, GIF": ["d.png"],
    }
    out = root / "out" / "shop"
    assert sorted(path.name for path in (out / "images").iterdir()) == ["50%25.webp", "a.jpg", "b%2Fc.png"]
    found = find_pictures(out, list(ITEMS))
    assert [len(paths) for paths in found.paths] == [1, 1, 1, 0, 0]
    assert (out / "images" / "a.jpg").read_bytes() == (folder / "a.jpg").read_bytes()
    said = "\n".join(report.lines())
    assert (
        "photos: 7 pictures; 3 of 5 items have one (by the file's name), 2 have none; 4 files belong to no item" in said
    )
    assert "left out 1: none of JPEG, PNG, WEBP, GIF ('d.png')" in said
    assert json.loads((out / "import_report.json").read_text())["pictures"]["matched"] == 3


def test_pictures_are_matched_by_a_column(tables):
    root, folder = tables
    picture(folder / "x.jpg", 1)
    picture(folder / "more" / "y.png", 2)
    picture(root / "secret.jpg", 3)
    (folder / "link.jpg").symlink_to(root / "secret.jpg")
    cells = ["x.jpg|more/y.png", "more/y.png", "../secret.jpg", "https://example.org/z.jpg", "link.jpg|absent.jpg"]
    report = imported(root, items=items_file(root, cells), images=folder, image_column="photo")
    pictures = report.pictures
    assert (pictures.matched, pictures.files, pictures.copied, pictures.column) == (2, 3, 2, "photo")
    assert pictures.refused == {
        "a path that leads out of the folder": ["50%", "e"],
        "an address, and nothing is fetched": ["d"],
        "no such file": ["absent.jpg"],
    }
    out = root / "out" / "shop"
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.suffix in (".jpg", ".png")) == [
        "more/y.png",
        "x.jpg",
    ]
    assert (out / "x.jpg").read_bytes() == (folder / "x.jpg").read_bytes()
    assert "# item_modalities: {image: {column: photo, encoder: google/siglip2" in (out / "shop.yaml").read_text()


def test_the_yaml_names_the_encoder(tables):
    root, folder = tables
    picture(folder / "a.jpg")
    report = imported(root, images=folder, image_encoder="onnx:m.onnx")
    settings = yaml.safe_load(Path(report.config_file).read_text())
    assert settings["item_modalities"] == {"image": {"encoder": "onnx:m.onnx"}}
    assert not [note for note in report.notes if "pictures take part" in note]
    report = imported(root, images=folder, overwrite=True)
    assert "item_modalities" not in yaml.safe_load(Path(report.config_file).read_text())
    assert [note for note in report.notes if "pictures take part once an encoder is named" in note]
    report = imported(root, images=folder, image_encoder="mine:encode", overwrite=True)  # a file names no function
    assert "item_modalities" not in yaml.safe_load(Path(report.config_file).read_text())


def test_without_pictures_an_import_is_what_it_was(tables):
    root, _ = tables
    report = imported(root, items=items_file(root))
    assert report.pictures is None and "item_modalities" not in Path(report.config_file).read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"images": "nowhere"}, "images: 'nowhere' is no folder"),
        ({"image_column": "photo"}, "belong to images"),
        ({"image_encoder": "x"}, "belong to images"),
        ({"images": ".", "image_column": "photo"}, "items was not given"),
    ],
)
def test_mistakes_name_the_argument(tables, more, words):
    with pytest.raises(ValueError, match=words):
        imported(tables[0], **more)


def test_a_column_that_was_not_imported_is_an_error(tables):
    root, folder = tables
    with pytest.raises(ValueError, match="image_column names 'photo', which was not imported"):
        imported(root, items=items_file(root), images=folder, image_column="photo")
    with pytest.raises(ValueError, match="image_column names 'cover', which is no column"):
        imported(root, items=items_file(root, ["x"] * 5), images=folder, image_column="cover")
    assert not (root / "out" / "shop").exists()


def test_the_command(tables, capsys):
    root, folder = tables
    picture(folder / "a.jpg")
    given = ["import", str(root / "events.csv"), "--dataset", "shop", "--data-path", str(root / "out"), "--quiet"]
    assert cli.main([*given, "--images", str(folder), "--image-encoder", "onnx:m.onnx"]) == 0
    assert "photos: 1 pictures; 1 of 5 items have one" in capsys.readouterr().out
