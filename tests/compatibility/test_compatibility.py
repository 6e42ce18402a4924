"""What people of earlier versions have on their disks loads, and answers as it did: checkpoints, saved datasets, exports, states.

A folder here is one version's, made by ``make.py`` with that version and never again. A change of the code that needs another
``expected.json`` breaks a promise.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import what_is_read

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import load_data_and_model
from recbole.utils import get_trainer

HERE = Path(__file__).parent
VERSIONS = sorted(path.parent.name for path in HERE.glob("*/expected.json"))
RUNS = ("both", "time", "cold")


@pytest.fixture(scope="module", params=VERSIONS)
def expected(request, tmp_path_factory):
    """What a version's files gave, with a copy of them as working directory."""
    folder = tmp_path_factory.mktemp("version") / request.param
    shutil.copytree(HERE / request.param, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", sys.argv)
        yield json.loads(Path("expected.json").read_text())


def test_every_version_is_here():
    assert "0.1.0" in VERSIONS


def of_users(answers):
    """Without texts and similar items: a model that is exported today answers those by a search, which it did not before."""
    return {who: rows for who, rows in answers.items() if who.split()[0] not in ("text", "similar")}


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_recommends_as_it_did(expected, name):
    assert len(expected["answers"][name]) > 25
    found, wanted = what_is_read.answers(f"{name}.pth", name), expected["answers"][name]
    assert what_is_read.differences(of_users(found), of_users(wanted)) == []
    assert all(len(found[who]) == len(rows) for who, rows in wanted.items())


@pytest.mark.parametrize("name", RUNS)
def test_an_export_recommends_as_it_did(expected, name):
    assert what_is_read.differences(what_is_read.answers(f"export-{name}", name), expected["answers"][name]) == []
    assert what_is_read.differences(what_is_read.explained(f"export-{name}"), expected["explained"][name]) == []


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_can_be_exported(expected, name, tmp_path):
    given = [f"--{key}={value}" for key, value in what_is_read.paths_of(name).items()]
    given += ["--bundle-encoder"] if name == "both" else []
    what_is_read.call("export", f"{name}.pth", "--output", tmp_path / "export", "--history", "train", *given)
    found, wanted = what_is_read.answers(tmp_path / "export", name), expected["answers"][name]
    assert what_is_read.differences(of_users(found), of_users(wanted)) == []
    assert what_is_read.differences(what_is_read.explained(tmp_path / "export"), expected["explained"][name]) == []


@pytest.mark.parametrize("name", RUNS)
def test_recbole_loads_a_checkpoint_and_evaluates_it(expected, name, monkeypatch, tmp_path):
    """For ``both`` from the saved dataset and data loaders alone: the file that they were made of is away."""
    shutil.copytree(Path(), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    if name == "both":
        Path("data/shop/shop.inter").unlink()
    saved = [f"saved-both/shop-{part}.pth" for part in ("LLMTwoTowerDataset", "for-LLMTwoTower-dataloader")]
    config, model, dataset, train, valid, test = load_data_and_model(f"{name}.pth", *(saved if name == "both" else ()))
    assert type(dataset).__name__ == "LLMTwoTowerDataset" and len(dataset.inter_feat) == 222
    users = torch.arange(1, dataset.user_num)
    scores = model.eval().full_sort_predict({dataset.uid_field: users}).view(len(users), -1).numpy()
    for who, rows in expected["answers"][name].items():
        if " " in who:  # a list of items, a text
            continue
        found = scores[
            dataset.token2id(dataset.uid_field, who) - 1, dataset.token2id(dataset.iid_field, [r[0] for r in rows])
        ]
        np.testing.assert_allclose(found, [row[1] for row in rows], rtol=1e-5, atol=1e-5)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    assert dict(trainer.evaluate(test, load_best_model=False)) == pytest.approx(expected["metrics"][name], abs=1e-4)


def test_a_training_goes_on(expected):
    """Its items without interactions find their place anew, by a rule that has changed since; without a place nothing has.

    The figures without a place were measured with commit 97b2c22, which made the files.
    """
    found = what_is_read.resume("both-last.pth", "--cold_map=none")
    assert found.pop("losses") == pytest.approx(expected["resumed"]["losses"], rel=1e-4)
    assert found == pytest.approx({"recall@10": 0.4333, "ndcg@10": 0.2055}, abs=5e-4)


def test_a_service_knows_every_change_of_its_state(expected, tmp_path):
    """Items that were put, renamed, fitted anew and deleted; the log then takes further changes."""
    for module in ("fastapi", "uvicorn", "orjson"):
        pytest.importorskip(module, reason="extra 'serve'")
    shutil.copytree("state", tmp_path / "state")
    with what_is_read.service("export-both", tmp_path / "state") as ask:
        found = what_is_read.service_answers(ask)
        assert what_is_read.differences(found, expected["service"]) == []
        assert found["item i3"][0] == found["item new3"][0] == 404
        seq = found["user u0"]["seq"]
        status, content = ask("PUT", "/v1/items/new5", {"text": "a space story of star comet"})
        assert (status, content["created"], content["seq"]) == (200, True, seq + 1)
        assert ask("DELETE", "/v1/items/new1")[0] == 200
    with what_is_read.service("export-both", tmp_path / "state", "--no-encoder") as ask:
        assert ask("GET", "/v1/items/new5")[0] == 200 and ask("GET", "/v1/items/new1")[0] == 404
        assert ask("GET", "/v1/items/new4")[1]["title"] == "Back again"
