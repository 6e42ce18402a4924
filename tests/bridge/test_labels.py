"""Label 0: nobody's positive, part of nobody's history, and nothing to be offered again; read where a model is trained on it."""

import glob

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.interaction import Interaction
from recbole.quick_start import run_recbole
from recbole.utils import init_seed

from recbole_llm.bridge.repairs.labels import keep_in_lists
from recbole_llm.export.export_model import export_model
from recbole_llm.export.reader import load_export
from recbole_llm.recommend import open_model, recommend_users
from recbole_llm.retrieval.recommender import Recommender, Request

LIKED = 3
COLUMNS = {"load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}, "threshold": {"rating": LIKED}}
SPLITS = {
    "by time": {"order": "TO", "split": {"RS": [0.7, 0.15, 0.15]}, "group_by": "user", "mode": "full"},
    "left out": {"order": "TO", "split": {"LS": "valid_and_test"}, "group_by": "user", "mode": "full"},
    "random": {"order": "RO", "split": {"RS": [0.7, 0.15, 0.15]}, "group_by": "user", "mode": "full"},
}


def ratings(toy_path):
    rows = [line.split("\t") for line in (toy_path / "toy" / "toy.inter").read_text().splitlines()[1:]]
    return {(user, item): int(rating) for user, item, rating, _ in rows}


def prepared(run_config, model, **changes):
    config = Config(model, "toy", config_dict=run_config | COLUMNS | {"train_neg_sample_args": None} | changes)
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    return dataset, data_preparation(config, dataset)


def pairs(dataset, inter):
    """External (user, item) pairs of a table."""
    users, items = (dataset.id2token(f, inter[f].long().numpy()) for f in (dataset.uid_field, dataset.iid_field))
    return set(zip(users.tolist(), items.tolist(), strict=True))


DRAWN = {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1, "alpha": 1.0}}
MODELS = {
    "Pop": DRAWN,
    "BPR": DRAWN,
    "EASE": DRAWN,
    "NeuMF": DRAWN,
    "LLMTwoTower": DRAWN,
    "SASRec": {"loss_type": "CE"},
    "GRU4Rec": {"loss_type": "BPR", **DRAWN},
}


@pytest.mark.parametrize("split", ["by time", "left out"])
@pytest.mark.parametrize("model", MODELS)
def test_no_model_is_trained_on_label_0_or_rewarded_for_it(run_config, toy_path, model, split):
    own = ratings(toy_path)
    dataset, loaders = prepared(run_config, model, eval_args=SPLITS[split], **MODELS[model])
    found = [pairs(dataset, loader._dataset.inter_feat) for loader in loaders]
    assert all(found) and all(own[pair] >= LIKED for part in found for pair in part)
    liked = {pair for pair, rating in own.items() if rating >= LIKED}
    if model not in ("SASRec", "GRU4Rec"):
        assert set.union(*found) == liked
    if split == "by time":  # by ratio, RecBole cuts the rows of sequential models without each user's first
        return
    # the same rows are tested by whichever model is compared, but for users without any earlier item
    general = pairs(dataset, prepared(run_config, "Pop", eval_args=SPLITS[split], **DRAWN)[1][2]._dataset.inter_feat)
    assert found[2] <= general and len(found[2]) >= 0.9 * len(general)


def test_sequential_histories_hold_positives_in_their_order(run_config, toy_path):
    dataset, loaders = prepared(run_config, "SASRec", eval_args=SPLITS["left out"], loss_type="CE")
    lines = [line.split("\t") for line in (toy_path / "toy" / "toy.inter").read_text().splitlines()[1:]]
    rows = 0
    for loader in loaders:
        inter = loader._dataset.inter_feat
        for n in range(len(inter)):
            user, item = (str(dataset.id2token(f, int(inter[f][n]))) for f in ("user_id", "item_id"))
            history = [line for line in lines if line[0] == user]
            place = [line[1] for line in history].index(item)
            wanted = [line[1] for line in history[:place] if int(line[2]) >= LIKED]
            length = int(inter["item_length"][n])
            listed = [str(dataset.id2token("item_id", int(i))) for i in inter["item_id_list"][n][:length]]
            assert listed == wanted and not inter["item_id_list"][n][length:].any()
            assert (inter["rating_list"][n][:length] if "rating_list" in inter else torch.ones(1)).all()
            times = inter["timestamp_list"][n]
            assert times[:length].tolist() == [float(line[3]) for line in history[:place] if line[1] in listed]
            rows += 1
    assert rows > 300


@pytest.mark.parametrize("split", SPLITS)
def test_what_was_seen_and_not_liked_has_no_place_later(run_config, toy_path, split):
    own = ratings(toy_path)
    dataset, loaders = prepared(run_config, "BPR", eval_args=SPLITS[split], **DRAWN)
    train, valid, test = (loader._dataset for loader in loaders)
    negatives = [pairs(dataset, part.negative_feat) for part in (train, valid, test)]
    assert set.union(*negatives) == {pair for pair, rating in own.items() if rating < LIKED}
    for loader, earlier in ((loaders[1], negatives[:1]), (loaders[2], negatives[:2])):
        hidden = {
            (str(dataset.id2token("user_id", user)), str(dataset.id2token("item_id", int(item))))
            for user in loader.uid_list.tolist()
            for item in loader.uid2history_item[user]
        }
        users = {pair[0] for pair in pairs(dataset, loader._dataset.inter_feat)}
        assert {pair for pair in hidden if own[pair] < LIKED} == {
            pair for part in earlier for pair in part if pair[0] in users
        }


def test_labels_are_read_where_a_model_is_trained_on_them(run_config, toy_path):
    labelled = SPLITS["random"] | {"mode": "labeled"}
    config = {"metrics": ["AUC"], "valid_metric": "AUC", "eval_args": labelled}
    dataset, loaders = prepared(run_config, "FM", **config)
    counts = [len(loader._dataset.inter_feat) for loader in loaders]
    assert sum(counts) == 60 * 14
    labels = torch.cat([loader._dataset.inter_feat["label"] for loader in loaders])
    assert 0 < int((labels == 0).sum()) == sum(rating < LIKED for rating in ratings(toy_path).values())
    # trained on labels and ranked: the training keeps its rows, the targets are positives
    _, ranked = prepared(run_config, "FM", eval_args=SPLITS["random"])
    assert (ranked[0]._dataset.inter_feat["label"] == 0).any()
    assert all((loader._dataset.inter_feat["label"] == 1).all() for loader in ranked[1:])


def test_a_split_in_three_files(run_config, toy_path, tmp_path):
    folder = tmp_path / "files" / "toy"
    folder.mkdir(parents=True)
    header, *lines = (toy_path / "toy" / "toy.inter").read_text().splitlines()
    parts = {"train": lines[:600], "valid": lines[600:700], "test": lines[700:]}
    for name, some in parts.items():
        (folder / f"toy.{name}.inter").write_text("\n".join([header, *some]) + "\n")
    files = {"data_path": str(folder.parent), "benchmark_filename": list(parts)}
    dataset, loaders = prepared(run_config, "BPR", **files, **DRAWN)
    for loader, some in zip(loaders, parts.values(), strict=True):
        wanted = {tuple(line.split("\t")[:2]) for line in some if int(line.split("\t")[2]) >= LIKED}
        assert pairs(dataset, loader._dataset.inter_feat) == wanted


def test_a_label_column_without_zeros_changes_nothing(run_config):
    _, loaders = prepared(run_config, "BPR", threshold={"rating": 1}, eval_args=SPLITS["random"], **DRAWN)
    assert sum(len(loader._dataset.inter_feat) for loader in loaders) == 60 * 14
    assert not any(hasattr(loader._dataset, "negative_feat") for loader in loaders)


def test_nothing_but_zeros_is_an_error(run_config):
    with pytest.raises(ValueError, match="No interaction of the training split has a positive label"):
        prepared(run_config, "BPR", threshold={"rating": 9}, eval_args=SPLITS["random"], **DRAWN)


def test_lists_keep_their_order():
    inter = Interaction(
        {
            "item_list": torch.tensor([[5, 6, 7, 0], [8, 9, 0, 0], [1, 2, 3, 4]]),
            "vector_list": torch.arange(24.0).view(3, 4, 2),
            "length": torch.tensor([3, 2, 4]),
            "item": torch.tensor([1, 2, 3]),
        }
    )
    kept = torch.tensor([[True, False, True, False], [False] * 4, [False, True, True, True]])
    found = keep_in_lists(inter, kept, ["item_list", "vector_list"], "length")
    assert found["item"].tolist() == [1, 3] and found["length"].tolist() == [2, 3]
    assert found["item_list"].tolist() == [[5, 7, 0, 0], [2, 3, 4, 0]]
    assert found["vector_list"][0].tolist() == [[0, 1], [4, 5], [0, 0], [0, 0]]


@pytest.mark.parametrize("split", ["by time", "random"])
@pytest.mark.filterwarnings("ignore")
def test_our_model_offers_no_dislike_again(run_config, paths, toy_path, tmp_path, split):
    own = ratings(toy_path)
    run_recbole("LLMTwoTower", "toy", config_dict=run_config | COLUMNS | {"epochs": 1, "eval_args": SPLITS[split]})
    (checkpoint,) = glob.glob(run_config["checkpoint_dir"] + "/*-[0-9][0-9].pth")
    model = open_model(checkpoint, texts=False, **paths)
    assert model.manifest.counts["interactions"] == sum(rating >= LIKED for rating in own.values())
    for row, user in enumerate(model.user_ids):
        disliked = model.disliked_items[slice(*model.disliked_offsets[row : row + 2])]
        assert {model.item_ids[item] for item in disliked} == {
            i for (u, i), r in own.items() if u == user and r < LIKED
        }
    rows = list(recommend_users(model, k=30))
    assert not [row for row in rows if (row.user, row.item) in own]
    again = list(recommend_users(model, k=30, exclude_seen=False))
    assert [row for row in again if (row.user, row.item) in own]
    assert all(own.get((row.user, row.item), LIKED) >= LIKED for row in again)

    from recbole_llm.checkpoints import load_trained

    manifest = export_model(*load_trained(checkpoint, **paths), tmp_path / "export")
    assert manifest.min_reader == 3
    export = load_export(tmp_path / "export")
    assert list(recommend_users(export, k=30)) == rows
    answer = Recommender(export).recommend(Request(user="u1", k=48, exclude_seen=False))
    assert all(own.get(("u1", item.id), LIKED) >= LIKED for item in answer.items)
