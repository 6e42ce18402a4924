"""What a run is asked to measure and to learn is checked before anything is read, for every model."""

import logging

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data.utils import data_preparation
from recbole.utils import ModelType, get_model, init_logger

from recbole_llm.bridge.files import require_dataset
from recbole_llm.bridge.model_keys import keys_read_by, unread_keys
from recbole_llm.bridge.options import OWN_KEYS
from recbole_llm.bridge.repairs.configuration import NEEDED_MODULES, known_models
from recbole_llm.bridge.run_settings import require_three_parts

MODELS = ("LLMTwoTower", "BPR", "SASRec")
LABELED = {"mode": "labeled"}


def config(model="LLMTwoTower", **settings):
    if model == "SASRec":
        settings.setdefault("train_neg_sample_args", None)
    return Config(model, "ml-100k", config_dict=settings)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("settings", "topk", "result"),
    [
        ({"topk": [5, 20]}, [5, 20], "{0}@5"),
        ({"topk": (20, 10, 5)}, [20, 10, 5], "{0}@10"),
        ({"topk": 7}, [7], "{0}@7"),
        ({"metrics": ["Recall", "Hit"]}, [10], "Recall@10"),
        ({"metrics": "recall", "topk": [3]}, [3], "recall@3"),
        ({"metrics": ["ItemCoverage", "MAP"]}, [10], "MAP@10"),
        ({"metrics": ["GAUC"]}, [10], "GAUC"),
        ({"metrics": ["LogLoss", "AUC"], "eval_args": LABELED}, [10], "LogLoss"),
        ({"metrics": ["RMSE"], "eval_args": {"mode": "uni100"}}, [10], "RMSE"),
    ],
)
def test_a_default_valid_metric_follows_metrics_and_topk(model, settings, topk, result):
    found = config(model, **settings)
    assert found["topk"] == topk
    assert found["valid_metric"] == result.format("NDCG" if model == "LLMTwoTower" else "MRR")
    assert found["valid_metric_bigger"] is (result not in ("LogLoss", "RMSE"))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["NDCG", "Diversity"]}, "metrics: 'Diversity' is none of AUC, "),
        ({"metrics": ["NGCD"]}, r"metrics: 'NGCD' is none of .*\. Is NDCG meant\?"),
        ({"metrics": "NDCG,Recall"}, r"Write several as a list: \['Recall', 'NDCG'\]"),
        ({"metrics": []}, r"metrics must be a list of names such as \['Recall', 'NDCG'\], got \[\]"),
        ({"metrics": [1]}, r"metrics must be a list of names"),
        ({"metrics": ["AUC", "NDCG"]}, "metrics: NDCG rank items, and AUC compare scores with labels"),
        ({"topk": 0}, "topk must be a number of items, .* got 0"),
        ({"topk": [5, True]}, "topk must be .* got"),
        ({"topk": [5, 2.5]}, "topk must be .* got"),
        ({"topk": []}, "topk must be .* got"),
        ({"topk": None}, "topk must be .* got None"),
        ({"valid_metric": "NDCG"}, r"valid_metric is 'NDCG', and metrics and topk give .* Is NDCG@10 meant\?"),
        ({"valid_metric": "MAP@10"}, r"valid_metric is 'MAP@10'.* Give one of these, or add it to metrics and topk"),
        ({"topk": [5, 20], "valid_metric": "ndcg@10"}, r"valid_metric is 'ndcg@10'.* Is NDCG@5 meant\?"),
        ({"valid_metric": 3}, "valid_metric is 3, "),
        ({"metrics": ["ItemCoverage"]}, "None of these says how good a ranking is. Add NDCG to metrics"),
        (
            {"eval_args": LABELED},
            r"eval_args.mode is labeled, .* metrics \(Recall, MRR, .*Give metrics: \[AUC, LogLoss\]",
        ),
        ({"eval_args": {"mode": {"valid": "full", "test": "labeled"}}}, "eval_args.mode is labeled"),
        ({"metrics": ["AUC"]}, "eval_args.mode is full, which ranks all items, and metrics .AUC. compare"),
        (
            {"eval_args": {"mode": "uni"}},
            "eval_args.mode must be full, labeled, or such as uni100 or pop100, got 'uni'",
        ),
        ({"eval_args": {"mode": "uni0"}}, "eval_args.mode must be"),
    ],
)
def test_what_does_not_go_together_is_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        config(model, **settings)


def test_the_defaults_of_every_stock_model_pass():
    models = [name for name in known_models() if name not in NEEDED_MODULES]
    for name in models:
        sequential = get_model(name).type == ModelType.SEQUENTIAL
        found = Config(name, "ml-100k", config_dict={"train_neg_sample_args": None} if sequential else {})
        assert found["valid_metric"] == found.internal_config_dict["valid_metric"]


def test_metrics_that_are_no_accuracy_may_be_named():
    found = config(metrics=["ItemCoverage", "GiniIndex"], valid_metric="giniindex@10")
    assert (found["valid_metric"], found["valid_metric_bigger"]) == ("giniindex@10", False)


def test_a_metric_of_ones_own_is_measured(monkeypatch):
    from recbole.evaluator import register

    monkeypatch.setitem(register.metric_types, "novelty", register.metric_types["ndcg"])
    monkeypatch.setitem(register.metric_information, "novelty", ["rec.topk"])
    found = config(metrics=["Novelty"], topk=[3], valid_metric="Novelty@3")
    assert found["valid_metric"] == "Novelty@3"


@pytest.mark.parametrize(
    ("given", "ours"), [("CE", "catalog_ce"), ("ce", "catalog_ce"), ("BCE", "pair_bce"), ("sampled_bce", "sampled_bce")]
)
def test_losses_under_the_names_of_recbole(given, ours):
    assert config(loss_type=given)["loss_type"] == ours


def test_pair_bce_is_what_recbole_calls_bce():
    """It is the logistic loss of a positive and its negatives, each a row with a label."""
    import torch

    from recbole_llm_kernels import pair_bce

    query, table = torch.randn(6, 4, dtype=torch.float64), torch.randn(9, 4, dtype=torch.float64)
    items, label = torch.tensor([0, 3, 3, 8, 1, 2]), torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)
    scores = (query * table[items]).sum(1)
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, label)
    found = pair_bce(query, table, torch.arange(6), items, label, backend="torch")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "BPR"}, "loss_type is 'BPR', and LLMTwoTower has no loss of pairs of items. Give sampled_bce"),
        ({"loss_type": "softmax"}, "loss_type must be one of catalog_bce"),
        (
            {"loss_type": "BCE", "train_neg_sample_args": None},
            "pair_bce needs negatives, and train_neg_sample_args is None",
        ),
        (
            {"loss_type": "sampled_bce", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 0}},
            "sampled_bce needs negatives",
        ),
        ({"embedding_size": 0}, "embedding_size must be an integer of at least 1, got 0"),
        ({"embeding_size": 8}, "did you mean 'embedding_size'"),
    ],
)
def test_values_of_our_model_are_checked_by_the_configuration(settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_losses_without_negatives_need_none():
    assert config(loss_type="CE", train_neg_sample_args=None)["loss_type"] == "catalog_ce"


# ---------------------------------------------------------------- keys that nobody reads


def said(caplog, tmp_path, monkeypatch, found, level=logging.WARNING):
    monkeypatch.chdir(tmp_path)  # RecBole writes its log where it is
    with caplog.at_level(logging.INFO):
        init_logger(found)
    return [record.getMessage() for record in caplog.records if record.levelno == level]


def test_unread_keys_are_one_warning(caplog, tmp_path, monkeypatch):
    found = config(n_layers=2, epoch=3, my_note=1, mf_embedding_size=8, embedding_size=8)
    assert said(caplog, tmp_path, monkeypatch, found) == [
        "LLMTwoTower does not read these configuration keys, and they change nothing: epoch (is epochs meant?), "
        "mf_embedding_size (of NeuMF), my_note, n_layers (of AutoInt, BERT4Rec and 16 more)."
    ]


def test_unread_keys_of_a_stock_model(caplog, tmp_path, monkeypatch):
    found = config("BPR", n_layers=2, embeding_size=3, encoder="", item_text_fields=["title"], learning_rate=0.1)
    (line,) = said(caplog, tmp_path, monkeypatch, found)
    assert line.startswith("BPR does not read these configuration keys, and they change nothing: embeding_size ")
    assert "(is embedding_size meant?), n_layers (of " in line
    assert "encoder" not in line
    assert "item_text_fields" not in line


def test_settings_that_are_read_are_no_warning(caplog, tmp_path, monkeypatch):
    settings = dict(
        epochs=1, alias_of_item_id=["iid"], enable_amp=False, tail_ratio=0.1, encoding="utf-8", shuffle=True
    )
    assert said(caplog, tmp_path, monkeypatch, config(**settings, topk=[10])) == []
    assert said(caplog, tmp_path, monkeypatch, config("LightGCN", n_layers=1, require_pow=True)) == []


def test_values_that_changed_are_said(caplog, tmp_path, monkeypatch):
    found = said(caplog, tmp_path, monkeypatch, config(topk=[5], loss_type="CE"), logging.INFO)
    assert "valid_metric is NDCG@5: metrics and topk do not hold its default, NDCG@10." in found
    assert "loss_type: CE is RecBole's name of LLMTwoTower's catalog_ce." in found
    caplog.clear()
    plain = said(caplog, tmp_path, monkeypatch, config(), logging.INFO)
    assert [line for line in plain if line.startswith(("valid_metric", "loss_type"))] == []


def test_what_a_stock_model_s_own_file_sets_is_read_by_it():
    import yaml

    from recbole_llm.bridge import model_keys

    folder = model_keys._folder() / "properties" / "model"
    models = [name for name in known_models() if name not in NEEDED_MODULES]
    assert len(models) > 80
    for name in models:
        if (folder / f"{name}.yaml").is_file():
            keys = yaml.safe_load((folder / f"{name}.yaml").read_text()) or {}
            assert unread_keys(name, keys) == []
    assert unread_keys("LLMTwoTower", OWN_KEYS) == []


def test_of_other_models_nobody_knows():
    assert keys_read_by("MyTower") is None
    assert unread_keys("MyTower", ["anything"]) == []


# ---------------------------------------------------------------- benchmark parts


@pytest.mark.parametrize("parts", [["train", "test"], ["a"], ["a", "b", "c", "d"], "train,valid,test", ["a", "b", 3]])
def test_other_than_three_benchmark_parts_are_explained(parts):
    message = r"benchmark_filename is .*; expected the names of three files, in the order train, valid, test"
    with pytest.raises(ValueError, match=message):
        require_three_parts(parts)
    found = {"benchmark_filename": parts, "dataset": "none", "data_path": "nowhere"}
    with pytest.raises(ValueError, match=message):
        require_dataset(found)
    with pytest.raises(ValueError, match=message):
        data_preparation(found, None)


@pytest.mark.parametrize("parts", [None, [], ["train", "valid", "test"], ("a", "b", "c")])
def test_three_benchmark_parts_or_none_pass(parts):
    require_three_parts(parts)
