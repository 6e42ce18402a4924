"""Small pictures in an export: what is made of a file, and what a reader refuses."""

import io
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from made_painted import WITHOUT, jpeg, make_painted
from PIL import Image
from safetensors.numpy import load_file, save_file

from recbole_llm.content.images.reading import open_picture
from recbole_llm.content.images.thumbnails import thumbnail, thumbnails_of
from recbole_llm.export.errors import ExportError
from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.item_pictures import pictures_of, small_pictures
from recbole_llm.export.item_records import item_records
from recbole_llm.export.reader import load_export
from recbole_llm.export.thumbnails import MAX_BYTES, SIDE, Thumbnails, jpeg_size
from recbole_llm.export.writer import write_artifact


@pytest.fixture(scope="module")
def painted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("painted")
    contents, _, _ = make_painted(folder)
    write_artifact(folder / "export", contents)
    return contents, folder / "export"


def test_an_export_holds_them_and_reads_them_back(painted):
    contents, folder = painted
    for export in (load_export(folder), load_export(folder, mapped=True), export_in_memory(contents)):
        assert export.thumbnails.count == 38
        for row in range(40):
            assert export.thumbnails.has(row) == (row not in WITHOUT)
            assert export.thumbnails.of(row) == contents.thumbnails.of(row)
        shown = Image.open(io.BytesIO(export.thumbnails.of(0)))
        assert shown.format == "JPEG" and shown.size == (9, 12) == jpeg_size(export.thumbnails.of(0))
        for name in ("center", "vector", "source", "bias", "support"):
            np.testing.assert_array_equal(getattr(export.picture_map, name), getattr(contents.picture_map, name))
    manifest = load_export(folder).manifest
    assert manifest.schema == manifest.min_reader == 6 and manifest.picture_map == {"kind": "rbf", "normalize": True}


def test_an_export_without_pictures_is_the_one_it_was(painted, tmp_path):
    contents, _ = painted
    bare = replace(contents, picture_map=None, thumbnails=None)
    assert write_artifact(tmp_path / "search", bare).min_reader == 5
    manifest = write_artifact(tmp_path / "plain", replace(bare, pictures=None, search=None))
    assert manifest.min_reader == 2 and "picture_map" not in manifest.to_json()
    assert load_export(tmp_path / "plain").thumbnails is None


def test_a_small_copy_is_bounded_upright_and_says_nothing_else():
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[:, :200] = (250, 10, 10)  # red on the left
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "secret place"  # turned by a quarter; a description
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "JPEG", exif=exif, comment=b"secret word", icc_profile=b"secret profile" * 20)
    small = thumbnail(open_picture(written.getvalue(), SIDE), SIDE, MAX_BYTES)
    assert jpeg_size(small) == (144, 192) and b"secret" not in small and b"Exif" not in small
    shown = np.asarray(Image.open(io.BytesIO(small)).convert("RGB")).astype(int)
    assert shown[10, 70, 0] > 200 > 100 > shown[-10, 70, 0], "the left of the file is the top"
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (500, 500, 3), np.uint8))
    assert len(thumbnail(noise, SIDE, MAX_BYTES)) <= MAX_BYTES
    assert len(thumbnail(noise, SIDE, 6000)) <= 6000, "quality gives way"
    assert jpeg_size(thumbnail(Image.new("RGB", (1, 40)), SIDE, MAX_BYTES)) == (1, 40)
    transparent = io.BytesIO()
    Image.new("RGBA", (20, 20), (255, 0, 0, 0)).save(transparent, "PNG")
    small = thumbnail(open_picture(transparent.getvalue(), SIDE), SIDE, MAX_BYTES)
    assert min(np.asarray(Image.open(io.BytesIO(small))).ravel()) > 240, "white under what is transparent"


def test_items_get_the_first_picture_that_can_be_read_and_no_placeholder(tmp_path):
    from tests.made_pictures import write_picture

    files = [tmp_path / f"{at}.png" for at in range(14)]
    for at, file in enumerate(files):
        write_picture(file, 7 if at >= 3 else at)  # eleven of the same bytes
    (tmp_path / "broken.png").write_bytes(b"<html>")
    broken, none = tmp_path / "broken.png", tmp_path / "none.png"
    paths = [[], [broken, files[0]], [files[1], files[2]], [none], *([file] for file in files[3:])]
    found, counts = thumbnails_of(paths, SIDE, MAX_BYTES)
    assert [small is not None for small in found] == [False, True, True] + [False] * 12
    assert (counts.items, counts.made, counts.placeholders) == (15, 2, {"3.png": 11})
    assert counts.unreadable == {"none of JPEG, PNG, WEBP, GIF": ["broken.png"], "no such file": ["none.png"]}


def spoilt():
    """Name to bytes that are no small picture."""
    good = jpeg()
    exif = Image.Exif()
    exif[0x010E] = "where it was taken"
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    frame = good.index(b"\xff\xc0")
    return {
        "png": png.getvalue(),
        "exif": jpeg(exif=exif),
        "comment": jpeg(comment=b"hello"),
        "profile": jpeg(icc_profile=b"x" * 50),
        "progressive": jpeg(progressive=True),
        "cut off": good[:-7],
        "cut within the header": good[:30],
        "more behind it": good + b"<script>",
        "another behind it": good + good,
        "too wide": jpeg((SIDE + 1, 10)),
        "too large": jpeg((SIDE, SIDE), quality=100, subsampling=0) + b"",
        "no pixels": good[: frame + 5] + b"\x00\x00" + good[frame + 7 :],
        "two frames": good[:frame] + good[frame : frame + 19] + good[frame:],
        "no frame": good[:frame] + good[frame + 19 :],
        "a segment without an end": good[:2] + b"\xff\xdb\xff\xff" + good[4:],
        "a segment of no length": good[:2] + b"\xff\xe0\x00\x01" + good[4:],
        "html": b"<html><script>1</script></html>",
        "a byte": b"\xff",
    }


@pytest.mark.parametrize("name", spoilt())
def test_whatever_is_no_small_jpeg_is_refused(painted, tmp_path, name):
    data = spoilt()[name]
    with pytest.raises(ValueError, match="a picture"):
        jpeg_size(data)
    contents, _ = painted
    pictures = [contents.thumbnails.of(row) for row in range(40)]
    pictures[5] = data
    tensors = {
        "offsets": np.concatenate([[0], np.cumsum([len(one or b"") for one in pictures])]).astype(np.int64),
        "bytes": np.frombuffer(b"".join(one or b"" for one in pictures), np.uint8),
    }
    refused(painted, tmp_path, tensors, r"thumbnails.safetensors: a picture")


def refused(painted, tmp_path, tensors, message, file="thumbnails.safetensors"):
    """Sign an export with other tensors, and see it refused."""
    import json

    from tests.fuzz.exports import sign

    copy = tmp_path / "copy"
    shutil.copytree(painted[1], copy)
    save_file(tensors, copy / file)
    sign(copy, json.loads((copy / "manifest.json").read_text()))
    with pytest.raises(ExportError, match=message):
        load_export(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "offsets": t["offsets"][:-1]}, "expected int64 .41."),
        (lambda t: {**t, "offsets": t["offsets"].astype(np.int32)}, "expected int64"),
        (lambda t: {**t, "offsets": t["offsets"][::-1].copy()}, "do not rise"),
        (lambda t: {**t, "offsets": t["offsets"] + 1}, "do not rise"),
        (lambda t: {**t, "bytes": t["bytes"][:-1]}, "do not rise"),
        (lambda t: {**t, "bytes": t["bytes"].astype(np.float32)}, "expected uint8"),
        (lambda t: {**t, "x": t["bytes"]}, "do not belong there: x"),
        (lambda t: {"bytes": t["bytes"]}, "lacks the tensor 'offsets'"),
    ],
)
def test_a_file_of_another_form_is_refused(painted, tmp_path, change, message):
    refused(painted, tmp_path, change(load_file(painted[1] / "thumbnails.safetensors")), message)


def test_a_map_of_other_pictures_is_refused(painted, tmp_path):
    tensors = load_file(painted[1] / "picture_map.safetensors")
    narrow = {**tensors, "center": tensors["center"][:-1], "support": tensors["support"][:, :-1].copy()}
    refused(painted, tmp_path, narrow, "picture_map.safetensors maps vectors of 47", "picture_map.safetensors")


def test_joined_pictures_and_rows_without_one():
    one, two = jpeg((3, 4)), jpeg((5, 6))
    table = Thumbnails.join([None, one, None, two])
    assert [table.of(row) for row in range(4)] == [None, one, None, two] and table.count == 2
    assert Thumbnails.join([]).count == Thumbnails.join([None, None]).count == 0


def test_a_catalogue_without_a_picture_that_can_be_read_says_what_to_do(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"<html>")
    for paths in (((), ()), ((), (tmp_path / "broken.png",))):
        dataset = SimpleNamespace(picture_files=lambda paths=paths: SimpleNamespace(paths=paths))
        with pytest.raises(ValueError, match="not one of 1 items has a picture.*images/"):
            small_pictures(dataset)
        assert pictures_of(dataset, [1], 96, 8192) == {}
    assert pictures_of(SimpleNamespace(), [1], 96, 8192) == {}, "a dataset of RecBole's own"


def test_a_column_that_names_files_is_no_attribute(tmp_path):
    rows = ["item_id:token\ttitle:token_seq\tcover:token\tkind:token", "a\tOne\timages/1.jpg\tfilm", "b\tTwo\t\tshow"]
    (tmp_path / "toy.item").write_text("\n".join(rows) + "\n")
    form = {"field_separator": "\t", "seq_separator": " ", "encoding": None}
    dataset = SimpleNamespace(dataset_path=str(tmp_path), dataset_name="toy", iid_field="item_id", config=form)
    image = {"image": SimpleNamespace(column="cover")}
    for modalities, asked, kinds in (
        (image, None, {"kind": "token"}),
        (None, None, {"kind": "token", "cover": "token"}),
        (image, ["cover"], {"cover": "token"}),
    ):
        options = SimpleNamespace(text_encoder=False, item_modalities=modalities)
        found = item_records(options, dataset, ["a", "b"], asked, False)
        assert found.kinds == kinds
        assert [set(record.attributes) for record in found.records] == [set(kinds), set(kinds) - {"cover"}]
