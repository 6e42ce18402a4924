"""``recommend --image`` and ``similar --image``: of a checkpoint and of an export, ranked by an oracle's likeness."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from toy_data import config_of_media

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
from pathlib import Path

from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.export.errors import ExportError
from recbole_llm.export.reader import load_export
from recbole_llm.pictures import recommend_picture, vector_of_picture
from recbole_llm.recommend import open_model
from tests.made_pictures import write_onnx, write_picture

pytestmark = pytest.mark.filterwarnings("ignore")
WITHOUT = (3, 9)
PICTURES = 46  # of 48 items; the last four have no interaction


@pytest.fixture(scope="module")
def shop(toy_path, tmp_path_factory):
    """A trained model of the toy data with pictures, the options that read it, and its export."""
    folder = tmp_path_factory.mktemp("shop")
    data = folder / "data" / "toy"
    shutil.copytree(toy_path / "toy", data)
    (data / "images").mkdir()
    for at in range(PICTURES):
        if at not in WITHOUT:
            write_picture(data / "images" / f"i{at}.png", at)
    encoder = write_onnx(folder / "flat.onnx")
    config = config_of_media(folder, "image", encoder)
    run_recbole("LLMTwoTower", "toy", config_dict=dict(config))
    given = {key: config[key] for key in ("data_path", "feature_cache_dir", "item_modalities")}
    (file,) = [path for path in (folder / "saved").glob("*.pth") if "-last" not in path.name]
    options = [
        f"--{key.replace('_', '-')}={value}"
        for key, value in (given | {"item_modalities": f"{{image: '{encoder}'}}"}).items()
    ]
    output = folder / "export"
    assert cli.main(["export", str(file), "--output", str(output), "--images", "thumbs", *options]) == 0
    return file, given, options, output, data


def oracle(data):
    """Directions of the items' pictures, and of the picture of item 40 with other noise, in float64."""

    def flat(path):
        values = np.asarray(Image.open(path).convert("RGB").resize((4, 4), 2), np.float64) / 255
        return ((values - 0.5) / 0.25).transpose(2, 0, 1).reshape(-1)

    ids = [f"i{at}" for at in range(PICTURES) if at not in WITHOUT]
    raw = np.stack([flat(data / "images" / f"{item}.png") for item in ids])
    centre = raw.mean(0)
    unit = lambda rows: rows / np.linalg.norm(rows, axis=-1, keepdims=True)  # noqa: E731
    return ids, unit(raw - centre), lambda path: unit(flat(path) - centre)


@pytest.fixture
def photo(tmp_path):
    """A picture of the colour of item 8, which no item has."""
    at = 8
    from tests.made_pictures import colour_of

    noise = np.random.default_rng(1000).integers(-20, 20, (30, 25, 3))
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.clip(np.array(colour_of(at)) + noise, 0, 255).astype(np.uint8)).save(path, quality=95)
    return path


def test_items_are_ranked_by_the_likeness_of_their_pictures(shop, photo):
    file, given, _, output, data = shop
    ids, directions, direction_of = oracle(data)
    order = np.argsort(-(directions @ direction_of(photo)), kind="stable")
    expected = [ids[at] for at in order[:6]]
    model = open_model(file, **given, texts=False, pictures=True)
    answer = recommend_picture(model, photo, k=6, by="likeness")
    assert [item.id for item in answer.items] == expected and answer.source == "picture"
    exported = open_model(output, item_modalities=given["item_modalities"])
    again = recommend_picture(exported, photo, k=6, by="likeness")
    assert [item.id for item in again.items] == expected
    np.testing.assert_allclose([item.score for item in again.items], [item.score for item in answer.items], rtol=1e-5)
    for one in ("i0", "i20"):  # an item's own picture finds the item, or its twin in another file
        own = recommend_picture(model, data / "images" / f"{one}.png", k=1, by="likeness")
        assert own.items[0].id == one
    everything = recommend_picture(model, photo, k=44, by="likeness")
    place = {item.id: at for at, item in enumerate(everything.items)}
    cosines = dict(zip(ids, directions @ direction_of(photo), strict=True))
    for item in ("i3", "i9"):  # without a picture: as like as two pictures drawn at random, whose cosine is 0
        assert all((place[other] < place[item]) == (cosine > 0) for other, cosine in cosines.items() if other in place)
    chance = recommend_picture(model, photo, k=6, by="chance")
    assert [item.id for item in chance.items] != expected


def test_the_commands_answer_alike(shop, photo, capsys):
    file, _, options, output, data = shop
    ids, directions, direction_of = oracle(data)
    best = ids[int(np.argmax(directions @ direction_of(photo)))]
    capsys.readouterr()
    seen = []
    for command in (["recommend", str(file)], ["similar", str(file)], ["similar", str(output)]):
        more = options if command[1] == str(file) else [option for option in options if "modalities" in option]
        assert cli.main([*command, "--image", str(photo), "--k", "4", "--by", "likeness", *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        seen.append([line.split()[-1] for line in lines[1:]])
    assert seen[0] == seen[1] == seen[2] and len(seen[0]) == 4 and seen[0][0].startswith(best)


def test_mistakes_say_what_to_do(shop, photo, tmp_path, capsys):
    file, given, options, output, _ = shop
    (tmp_path / "page.png").write_bytes(b"<html>")
    model = open_model(file, **given, texts=False, pictures=True)
    with pytest.raises(ValueError, match="cannot be read as a picture: none of JPEG"):
        vector_of_picture(model, tmp_path / "page.png")
    with pytest.raises(ValueError, match="no such file"):
        vector_of_picture(model, tmp_path / "none.png")
    with pytest.raises(ValueError, match="nothing is loaded because a file names it.*--item-modalities"):
        recommend_picture(open_model(output), photo)
    other = write_onnx(tmp_path / "other.onnx")
    settings = json.loads(Path(tmp_path / "other.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(settings | {"image_mean": [0, 0, 0]}))
    with pytest.raises(ValueError, match="another one than the model was trained with"):
        recommend_picture(open_model(output, item_modalities={"image": other}), photo)
    plain = open_model(file, **given, texts=False)
    with pytest.raises(ValueError, match="no pictures, or none can be asked for"):
        recommend_picture(plain, photo)
    for wrong in (["--image", str(photo), "--users", "u1"], ["--users", "u1", "--by", "likeness"]):
        with pytest.raises(SystemExit) if "--image" in wrong else pytest.MonkeyPatch.context():
            assert cli.main(["recommend", str(file), *wrong, *options]) == 2
    capsys.readouterr()


def test_an_export_with_pictures_says_so_and_is_checked(shop):
    *_, output, _ = shop
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["schema"] == manifest["min_reader"] == 6
    assert manifest["pictures"]["feature_dim"] == 48 and manifest["pictures"]["bundled"] is False
    export = load_export(output)
    assert export.search.picture_space.dim == export.content["image"].shape[1] == 48
    assert export.picture_encoders == () and export.picture_map.feature_dim == 48
    has = [export.thumbnails.has(row) for row in range(len(export.item_ids))]
    assert {item for item, one in zip(export.item_ids, has, strict=True) if one} == set(oracle(shop[-1])[0])


def test_a_picture_space_of_other_vectors_is_refused(shop, tmp_path):
    from safetensors.numpy import load_file, save_file

    *_, output, _ = shop
    copy = tmp_path / "copy"
    shutil.copytree(output, copy)
    tensors = load_file(copy / "search.safetensors")
    tensors["picture.center"] = tensors["picture.center"][:-1]
    save_file(tensors, copy / "search.safetensors")
    with pytest.raises(ExportError):
        load_export(copy, verify=False)


def test_a_put_picture_places_an_item_where_the_offline_cold_map_does(shop, tmp_path):
    """A hidden item's picture is put under another id: its vectors and its rank are those that the model gave the item."""
    pytest.importorskip("fastapi", reason="extra 'serve'")
    pytest.importorskip("httpx", reason="extra 'test'")
    from starlette.testclient import TestClient

    from recbole_llm.serving.app import create_app
    from recbole_llm.serving.settings import Limits, Settings

    _, given, _, output, data = shop
    export = load_export(output)
    names = (given["item_modalities"]["image"]["encoder"],)
    limits = Limits(request_seconds=60, body_seconds=60)
    settings = Settings(str(output), image_encoders=names, allowed_hosts=("testserver",), limits=limits)
    with TestClient(create_app(settings)) as client:
        assert client.app.state.service.pictures.wait(60)
        catalog = client.app.state.service.recommender.catalog
        for hidden in ("i44", "i45"):
            row = export.item_ids.index(hidden)
            assert not export.trained[row] and export.listed[row]
            sent = (data / "images" / f"{hidden}.png").read_bytes()
            answer = client.put(f"/v1/items/twin-{hidden}/image", content=sent, headers={"content-type": "image/png"})
            assert answer.json()["cold"] is True
            rows = np.array([catalog.row(f"twin-{hidden}")])
            np.testing.assert_allclose(catalog.vector(rows)[0], export.vector[row], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(catalog.source(rows)[0], export.source[row], rtol=1e-3, atol=1e-4)
            np.testing.assert_allclose(catalog.bias(rows)[0], export.bias[row], rtol=1e-3, atol=1e-4)
            for user in export.user_ids[:10]:
                body = {"user": user, "k": 50, "exclude_seen": False}
                items = client.post("/v1/recommend", json=body).json()["items"]
                score = {item["id"]: item["score"] for item in items}
                assert score[f"twin-{hidden}"] == pytest.approx(score[hidden], rel=1e-3, abs=1e-4)
                others = [item["score"] for item in items if hidden not in item["id"]]
                ranks = [sum(other > score[one] for other in others) for one in (hidden, f"twin-{hidden}")]
                assert ranks[0] == ranks[1]
            shown = client.get(f"/v1/items/twin-{hidden}/image")
            assert shown.content == export.thumbnails.of(row)


def test_a_report_shows_pictures_of_the_items(shop, tmp_path):
    pytest.importorskip("matplotlib", reason="extra 'report'")
    from recbole_llm.reporting import customers

    file, _, options, _, _ = shop
    target = tmp_path / "report.html"
    assert cli.main(["report", str(file), "--output", str(target), "--customers", "4", *options]) == 0
    text = target.read_text()
    shown = text.count('<img class="item" alt="" src="data:image/jpeg;base64,/9j/')
    assert 20 < shown <= 40 and "http" not in text.split("</style>")[1].replace("http://www.w3.org", "")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:  # no more than fit
        patch.setattr(customers, "ALL_PICTURES", 3000)
        assert cli.main(["report", str(file), "--output", str(target), "--customers", "4", *options]) == 0
    assert 0 < target.read_text().count('<img class="item"') < shown
    assert cli.main(["report", str(file), "--output", str(target), "--no-customers", *options]) == 0
    assert "<img" not in target.read_text()
