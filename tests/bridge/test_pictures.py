"""A dataset with pictures: found, encoded, in the model beside the texts, and in its checkpoints."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
from recbole.config import Config
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.bridge.checkpoint import read_checkpoint, settings_for_resume
from recbole_llm.bridge.dataset import LLMTwoTowerDataset
from recbole_llm.bridge.option_values import ModalitySource, files, modalities
from recbole_llm.bridge.options import Options
from recbole_llm.checkpoints import load_trained
from tests.made_pictures import write_onnx, write_picture

pytestmark = pytest.mark.filterwarnings("ignore")
WITHOUT = (3, 9)  # items of the toy data without a picture


@pytest.fixture
def shop(run_config, toy_path, tmp_path):
    """The toy data with pictures in a folder of their own, and a configuration that names them."""
    folder = tmp_path / "data" / "toy"
    shutil.copytree(toy_path / "toy", folder)
    (folder / "images").mkdir()
    for at in range(44):
        if at not in WITHOUT:
            write_picture(folder / "images" / f"i{at}.png", at)
    encoder = write_onnx(tmp_path / "flat.onnx")
    config = run_config | {"data_path": str(tmp_path / "data"), "item_modalities": {"image": {"encoder": encoder}}}
    return config, folder


def dataset_of(config):
    return LLMTwoTowerDataset(Config("LLMTwoTower", "toy", config_dict=dict(config)))


def test_pictures_stand_beside_the_texts_and_what_lacks_one_is_masked(shop, caplog):
    config, folder = shop
    (folder / "images" / "i5.png").write_bytes(b"<html>")
    with caplog.at_level(logging.INFO):
        dataset = dataset_of(config)
        content = dataset.item_features
    assert list(content) == ["text", "image"]
    image = content["image"]
    tokens = dataset.field2id_token["item_id"]
    absent = {token for token, has in zip(tokens[1:], image.present[1:].tolist(), strict=True) if not has}
    assert absent == {"i3", "i5", "i9"} & set(tokens) and not bool(image.present[0])
    assert image.dim == 48 and not image.vectors[~image.present].any()
    torch.testing.assert_close(image.vectors[image.present].mean(0), torch.zeros(48), atol=1e-5, rtol=0)  # centred
    assert "items name one (" in caplog.text and "1 pictures count as missing, none of JPEG" in caplog.text
    with caplog.at_level(logging.INFO):
        other = dataset_of(config).item_features["image"]
    assert torch.equal(other.vectors, image.vectors)
    assert "distinct pictures that can be read came from the store" in caplog.text


def test_the_column_names_files_inside_the_folder(shop):
    config, folder = shop
    lines = (folder / "toy.item").read_text().splitlines()
    cells = ["cover:token", *(f"images/i{(at + 1) % 44}.png" for at in range(len(lines) - 1))]
    (folder / "toy.item").write_text("".join(f"{a}\t{b}\n" for a, b in zip(lines, cells, strict=True)))
    by_name = dataset_of(config).item_features["image"]
    config["item_modalities"]["image"]["column"] = "cover"
    dataset = dataset_of(config)
    by_column = dataset.item_features["image"]
    at = {token: row for row, token in enumerate(dataset.field2id_token["item_id"])}
    raw = by_name.vectors[at["i2"]] - by_column.vectors[at["i1"]]  # both centred, each by its own mean
    other = by_name.vectors[at["i5"]] - by_column.vectors[at["i4"]]
    torch.testing.assert_close(raw, other, atol=1e-5, rtol=0)
    assert not bool(by_column.present[at["i2"]]), "i3 has no file"
    config["item_modalities"]["image"]["column"] = "photo"
    with pytest.raises(ValueError, match="column names 'photo', and toy.item has the columns"):
        _ = dataset_of(config).item_features


def test_a_run_with_pictures_is_another_than_one_without_and_comes_back(shop, paths):
    config, _ = shop
    quick = config | {"epochs": 1, "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]}}
    run_recbole("LLMTwoTower", "toy", config_dict=dict(quick))
    (file,) = [path for path in Path(config["checkpoint_dir"]).glob("*.pth") if "-last" not in path.name]
    encoder = config["item_modalities"]["image"]["encoder"]
    again = {"data_path": config["data_path"], "encoder": config["encoder"]}
    again |= {"feature_cache_dir": config["feature_cache_dir"]}
    with pytest.raises(ValueError, match="--item-modalities="):
        load_trained(file, **again)
    scores = []
    for given in (config["item_modalities"], json.dumps(config["item_modalities"]), f"{{image: '{encoder}'}}"):
        model, dataset = load_trained(file, **again, item_modalities=given)
        assert list(model.training_data().content) == ["text", "image"]
        scores.append(model.scores(torch.arange(1, 5)))
        assert torch.equal(scores[-1], scores[0])
    kernels = [kernel["modality"] for kernel in read_checkpoint(file)["other_parameter"]["setting"]["kernels"]]
    assert "image" in kernels or "text" in kernels


def test_vectors_by_modality_of_files_are_asked_for_again(shop, tmp_path):
    """A mapping of files was dropped in silence, so that the checkpoint was read as a model of texts alone."""
    config, _ = shop
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", rng.standard_normal((44, 6)).astype(np.float32))
        (tmp_path / f"{name}.ids.txt").write_text("".join(f"i{at}\n" for at in range(44)))
    named = {"text": str(tmp_path / "a.npy"), "image": str(tmp_path / "b.npy")}
    quick = config | {"epochs": 1, "encoder": "", "item_modalities": None, "item_features_file": named}
    run_recbole("LLMTwoTower", "toy", config_dict=dict(quick))
    (file,) = [path for path in Path(config["checkpoint_dir"]).glob("*.pth") if "-last" not in path.name]
    with pytest.raises(ValueError, match=r"--item-features-file='\{\"text\":"):
        load_trained(file, data_path=config["data_path"])
    model, _ = load_trained(file, data_path=config["data_path"], item_features_file=json.dumps(named))
    assert list(model.training_data().content) == ["text", "image"]


def test_a_file_names_no_function_that_would_run(shop, tmp_path):
    config, _ = shop
    (tmp_path / "mine.py").write_text(
        "import pathlib\npathlib.Path('ran').touch()\ndef encode(pictures):\n    return [[1]]\n"
    )
    (tmp_path / "c.yaml").write_text("item_modalities: {image: {encoder: 'mine:encode'}}\n")
    given = {key: value for key, value in config.items() if key != "item_modalities"}
    with pytest.raises(ValueError, match="a configuration file may not name"):
        Options.from_config(Config("LLMTwoTower", "toy", [str(tmp_path / "c.yaml")], dict(given)))
    assert not (tmp_path / "ran").exists()
    own = Config(
        "LLMTwoTower", "toy", [str(tmp_path / "c.yaml")], given | {"item_modalities": {"image": "mine:encode"}}
    )
    assert Options.from_config(own).item_modalities == {"image": ModalitySource("mine:encode")}


@pytest.mark.parametrize("encoder", ["mine:encode", "onnx:flat.onnx", "./folder"])
def test_a_checkpoint_names_no_function_file_or_folder(shop, encoder):
    config, _ = shop
    quick = config | {"encoder": "", "item_modalities": None, "epochs": 1}
    run_recbole("LLMTwoTower", "toy", config_dict=dict(quick))
    (last,) = Path(config["checkpoint_dir"]).glob("*-last.pth")
    content = read_checkpoint(last)
    content["settings"]["given"]["item_modalities"] = {"image": {"encoder": encoder}}
    torch.save(content, last)
    with pytest.raises(ValueError, match="--item-modalities="):
        settings_for_resume(last, {"data_path", "feature_cache_dir"})
    _, _, taken = settings_for_resume(last, {"data_path", "feature_cache_dir", "item_modalities"})
    assert taken["epochs"] == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"video": "x"}, "'video' is none of them. Built are image, audio"),
        ({"text": "x"}, "Texts are the key encoder"),
        ({"image": {"column": "c"}}, "names no encoder"),
        ({"image": {"encoder": "x", "size": 3}}, r"an encoder, or \{encoder, column\}"),
        ({"image": 3}, r"an encoder, or \{encoder, column\}"),
        (["image"], "encoders by modality"),
        ("image", "encoders by modality"),
    ],
)
def test_mistakes_name_the_key(value, words):
    with pytest.raises(ValueError, match=words):
        modalities("item_modalities", value)


def test_values_of_a_command_line():
    assert modalities("m", None) == modalities("m", "") == modalities("m", {}) == {}
    for value in ("{image: onnx:f.onnx}", {"image": "onnx:f.onnx"}, '{"image": {"encoder": "onnx:f.onnx"}}'):
        assert modalities("m", value) == {"image": ModalitySource("onnx:f.onnx")}
    assert modalities("m", {"image": {"encoder": "a/b", "column": "c"}}) == {"image": ModalitySource("a/b", "c")}
    assert files("f", "{text: a.npy, image: b.npy}") == {"text": "a.npy", "image": "b.npy"}
    assert files("f", "a.npy") == "a.npy"


def test_pictures_have_one_source_and_there_must_be_some(shop, tmp_path):
    config, folder = shop
    np.save(tmp_path / "b.npy", np.eye(44, dtype=np.float32))
    (tmp_path / "b.ids.txt").write_text("".join(f"i{at}\n" for at in range(44)))
    with pytest.raises(ValueError, match="give one of them"):
        _ = dataset_of(config | {"item_features_file": {"image": str(tmp_path / "b.npy")}}).item_features
    shutil.rmtree(folder / "images")
    with pytest.raises(ValueError, match="not one of 44 items has a picture|not one of 4. items has a picture"):
        _ = dataset_of(config).item_features


def test_the_command_encodes_one_modality_alone(shop, capsys, monkeypatch):
    config, _ = shop
    encoder = config["item_modalities"]["image"]["encoder"]
    given = [f"--data_path={config['data_path']}", f"--feature_cache_dir={config['feature_cache_dir']}", "--gpu_id="]
    given += [f"--encoder={config['encoder']}", "--show_progress=False", f"--item_modalities={{'image': '{encoder}'}}"]
    assert cli.main(["encode", "--dataset", "toy", "--modality", "image", *given]) == 0
    assert capsys.readouterr().out == "items: 42 of 44 have an image vector of 48 dimensions\n"
    assert [path.name[:6] for path in Path(config["feature_cache_dir"]).iterdir()] == ["image-"]
    assert cli.main(["encode", "--dataset", "toy", *given]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "items: 43 of 44 have a text vector of 32 dimensions",
        "items: 42 of 44 have an image vector of 48 dimensions",
    ]
    assert cli.main(["encode", "--dataset", "toy", "--modality", "audio", *given]) == 2
    assert "nothing of this kind is configured" in capsys.readouterr().err
