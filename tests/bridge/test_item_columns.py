"""``item_columns``: columns in the model beside the texts, in its checkpoints, and nothing where none is named."""

import shutil
from pathlib import Path

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.bridge.dataset import LLMTwoTowerDataset
from recbole_llm.bridge.option_values import columns
from recbole_llm.checkpoints import load_trained
from recbole_llm.export.reader import load_export

pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("red", "green", "blue")


@pytest.fixture
def shop(run_config, toy_path, tmp_path):
    """The toy data with a column of colours, one of them missing."""
    folder = tmp_path / "data" / "toy"
    shutil.copytree(toy_path / "toy", folder)
    lines = (folder / "toy.item").read_text().splitlines()
    cells = ["colour:token", *(KINDS[at % 3] if at != 5 else "" for at in range(len(lines) - 1))]
    (folder / "toy.item").write_text("".join(f"{a}\t{b}\n" for a, b in zip(lines, cells, strict=True)))
    return run_config | {"data_path": str(tmp_path / "data")}, folder


def dataset_of(config):
    return LLMTwoTowerDataset(Config("LLMTwoTower", "toy", config_dict=dict(config)))


def test_columns_stand_behind_the_texts_and_gaps_are_masks(shop):
    config, _ = shop
    assert list(dataset_of(config).item_features) == ["text"]
    for wanted in ("auto", ["year", "colour"], {"year": "number", "colour": "category"}):
        dataset = dataset_of(config | {"item_columns": wanted})
        content = dataset.item_features
        assert list(content) == ["text", "column_year", "column_colour"]
        colour, tokens = content["column_colour"], dataset.field2id_token["item_id"]
        assert {tokens[at] for at in range(1, len(tokens)) if not colour.present[at]} == {"i5"}
        torch.testing.assert_close(colour.vectors[colour.present].mean(0), torch.zeros(3), atol=1e-6, rtol=0)
        assert not colour.vectors[~colour.present].any() and content["column_year"].dim == 17
    text, plain = content["text"], dataset_of(config).item_features["text"]
    assert torch.equal(text.vectors, plain.vectors)


def test_a_model_of_columns_alone_comes_back_from_its_checkpoint_and_export(shop, tmp_path):
    config, _ = shop
    quick = config | {"epochs": 1, "encoder": "", "item_columns": "auto"}
    quick |= {"load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id"]}}
    run_recbole("LLMTwoTower", "toy", config_dict=dict(quick))
    (file,) = [path for path in Path(config["checkpoint_dir"]).glob("*.pth") if "-last" not in path.name]
    scores = []
    for _ in range(2):
        model, _ = load_trained(file, data_path=config["data_path"], feature_cache_dir=config["feature_cache_dir"])
        assert list(model.training_data().content) == ["column_year", "column_colour"]
        scores.append(model.scores(torch.arange(1, 5)))
    assert torch.equal(*scores) and bool(torch.isfinite(scores[0][:, 1:]).any())
    output, options = tmp_path / "export", [f"--data-path={config['data_path']}"]
    assert cli.main(["export", str(file), "--output", str(output), *options]) == 0
    assert set(load_export(output).content) == {"column_year", "column_colour"}
    assert cli.main(["similar", str(output), "--item", "i1", "--k", "3"]) == 0


def test_what_the_key_may_hold():
    assert columns("item_columns", None) is None and columns("item_columns", []) is None
    assert columns("item_columns", "auto") == "auto"
    assert columns("item_columns", "brand, price") == {"brand": "auto", "price": "auto"}
    assert columns("item_columns", "{brand: category}") == {"brand": "category"}
    for wrong in ({"brand": "text"}, {1: "auto"}, 3, [""]):
        with pytest.raises(ValueError, match="item_columns"):
            columns("item_columns", wrong)


def test_columns_that_are_not_there_stop_with_their_names(shop):
    config, folder = shop
    with pytest.raises(ValueError, match="names 'price'; toy.item has the columns item_id:token"):
        _ = dataset_of(config | {"item_columns": ["price"]}).item_features
    (folder / "toy.item").unlink()
    with pytest.raises(ValueError, match="there is no toy.item"):
        _ = dataset_of(config | {"item_columns": "auto", "encoder": ""}).item_features
