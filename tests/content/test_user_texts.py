"""Users' own texts go the way of items' texts, and nothing of a user but its training interactions enters its profile."""

import glob
import random

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm.checkpoints import load_trained
from recbole_llm.content import features
from recbole_llm.recommend import open_model, recommend_users


def split(toy_path, folder, held_out):
    """The made dataset as benchmark files: each user's last four items are held out, or four others by ``held_out``."""
    target = folder / "toy"
    target.mkdir(parents=True)
    header, *lines = (toy_path / "toy" / "toy.inter").read_text().splitlines()
    rows: dict[str, list[str]] = {}
    for line in lines:
        rows.setdefault(line.split("\t")[0], []).append(line)
    rng, parts = random.Random(1), {"train": [], "valid": [], "test": []}
    for user, own in rows.items():
        parts["train"] += own[:-4]
        parts["valid"] += own[-4:-2]
        seen = {line.split("\t")[1] for line in own}
        others = rng.sample([f"i{i}" for i in range(40) if f"i{i}" not in seen], 2)
        parts["test"] += own[-2:] if held_out == "own" else [f"{user}\t{item}\t5\t9" for item in others]
    for part, kept in parts.items():
        (target / f"toy.{part}.inter").write_text("\n".join([header, *kept]) + "\n")
    for kind in ("item", "user"):
        (target / f"toy.{kind}").write_text((toy_path / "toy" / f"toy.{kind}").read_text())
    return {part: {tuple(line.split("\t")[:2]) for line in kept} for part, kept in parts.items()}


@pytest.mark.filterwarnings("ignore")
def test_neither_validation_nor_test_items_enter_a_profile(toy_path, run_config, paths, tmp_path, monkeypatch):
    encoded = []
    encode_texts = features.encode_texts
    monkeypatch.setattr(
        "recbole_llm.bridge.dataset.encode_texts",
        lambda texts, *a, **k: encoded.append(texts) or encode_texts(texts, *a, **k),
    )
    models = {}
    for held_out in ("own", "others"):
        pairs = split(toy_path, tmp_path / held_out, held_out)
        settings = run_config | {
            "data_path": str(tmp_path / held_out),
            "benchmark_filename": ["train", "valid", "test"],
            "user_tower": ["history", "text"],
            "checkpoint_dir": str(tmp_path / held_out / "saved"),
        }
        result = run_recbole("LLMTwoTower", "toy", config_dict=settings)
        (checkpoint,) = glob.glob(settings["checkpoint_dir"] + "/*-[0-9][0-9].pth")
        paths |= {"data_path": settings["data_path"]}
        models[held_out] = (
            load_trained(checkpoint, **paths),
            open_model(checkpoint, texts=False, history="train", **paths),
            pairs,
            result,
        )

    (model, dataset), export, pairs, result = models["own"]
    (other, _), other_export, other_pairs, other_result = models["others"]
    assert pairs["train"] == other_pairs["train"] and not pairs["test"] & other_pairs["test"]
    assert result["test_result"] != other_result["test_result"]
    users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
    history = model.history
    row = torch.repeat_interleave(torch.arange(len(history.sizes)), history.sizes)
    assert {(users[u], items[i]) for u, i in zip(row, history.ids, strict=True)} == pairs["train"]

    # other test items, and every parameter and user is the same to the bit
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    everyone = torch.arange(1, len(users))
    assert torch.equal(model.user_vectors(everyone), other.user_vectors(everyone))
    assert torch.equal(dataset.user_features["text"].vectors, models["others"][0][1].user_features["text"].vectors)
    np.testing.assert_array_equal(export.user_part, other_export.user_part)
    ours = list(recommend_users(export, k=48))
    assert ours == list(recommend_users(other_export, k=48))

    # what was held out may be recommended, what was trained on may not
    recommended = {(r.user, r.item) for r in ours}
    assert not recommended & pairs["train"]
    assert pairs["valid"] | pairs["test"] <= recommended

    # the users' texts are the columns of the .user file and nothing else
    bios = [line.split("\t")[1] for line in (toy_path / "toy" / "toy.user").read_text().splitlines()[1:]]
    of_users = [texts for texts in encoded if texts[1].startswith("Bio: ")]
    assert of_users and all(sorted(texts[1:]) == sorted(f"Bio: {bio}" for bio in bios) for texts in of_users)
