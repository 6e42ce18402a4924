"""Streamed evaluation: RecBole's metrics to the last digit, the smaller id where scores tie, bounded memory."""

import logging

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.bridge.evaluation import streaming as evaluation
from recbole_llm.scoring.rows import Rows

RANKING_METRICS = ["Recall", "NDCG", "MRR", "Hit", "Precision", "MAP"]
ITEM_METRICS = ["ItemCoverage", "AveragePopularity", "ShannonEntropy", "GiniIndex", "TailPercentage"]


def build(config_dict, model="LLMTwoTower", dataset="toy"):
    config = Config(model=model, dataset=dataset, config_dict=dict(config_dict))
    init_seed(config["seed"], True)
    data = create_dataset(config)
    loaders = data_preparation(config, data)
    model = get_model(config["model"])(config, loaders[0]._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    return trainer, loaders


def both_ways(trainer, loader):
    results = []
    for backend in ("stock", "streamed"):
        trainer.config["eval_backend"] = backend
        results.append(trainer.evaluate(loader, load_best_model=False))
    return results


@pytest.fixture
def all_metrics(run_config):
    # with three quarters of the interactions in validation, many users have no test item
    split = {"split": {"RS": [0.6, 0.35, 0.05]}, "group_by": "none"}
    everything = {"inter": ["user_id", "item_id"], "item": ["item_id"]}  # items without any interaction too
    return run_config | {
        "metrics": RANKING_METRICS + ITEM_METRICS,
        "topk": [1, 5, 10],
        "eval_args": split,
        "load_col": everything,
    }


@pytest.mark.parametrize(
    "changes",
    [{}, {"blocks": "learned"}, {"closed_form_dim": "full"}, {"closed_form_dim": 8}, {"blocks": "closed_form"}],
    ids=str,
)
def test_our_model_gets_exactly_the_stock_metrics(all_metrics, changes):
    trainer, (train, valid, test) = build(all_metrics | changes)
    trainer.fit(train, valid, saved=False)
    assert 20 < len(test.uid_list) < trainer.model.n_users - 1  # users without a test item
    for loader in (valid, test):
        stock, streamed = both_ways(trainer, loader)
        assert streamed == stock
        assert list(streamed) == list(stock)
        assert 0 < streamed["recall@10"] < 1


@pytest.mark.parametrize("model", ["BPR", "LightGCN", "SASRec", "Pop", "ItemKNN"])
def test_stock_models_get_exactly_the_stock_metrics_on_request(all_metrics, model):
    changes = {"train_neg_sample_args": None} if model == "SASRec" else {}
    if model == "SASRec":
        columns = {"inter": ["user_id", "item_id", "timestamp"]}
        changes |= {"load_col": columns, "eval_args": {"order": "TO", "split": {"LS": "valid_and_test"}}}
    trainer, (train, valid, test) = build(all_metrics | changes, model=model)
    trainer.fit(train, None, saved=False)
    if model in ("Pop", "ItemKNN"):  # whole numbers and zeros tie
        without_ties(trainer.model)
    stock, streamed = both_ways(trainer, test)
    assert streamed == stock


def without_ties(model):
    score = model.full_sort_predict

    def full_sort_predict(interaction):
        scores = torch.as_tensor(score(interaction)).double()
        items = torch.arange(model.n_items, dtype=torch.float64)
        return (scores.view(-1, model.n_items) - 1e-6 * ((items * 7919) % model.n_items)).flatten()

    model.full_sort_predict = full_sort_predict


class Fixed:
    """A model of whole numbers, full of ties."""

    def __init__(self, scores):
        self.scores = scores

    def full_sort_predict(self, interaction):
        return self.scores[interaction["user_id"]].clone().view(-1)


class Batch(dict):
    def to(self, device):
        return self


@pytest.mark.parametrize("k", [1, 5, 40, 70])
@pytest.mark.parametrize("chunk", [1, 7, 10**6])
def test_ties_go_to_the_smaller_id_and_masked_items_fill_what_is_left(k, chunk, monkeypatch):
    g = torch.Generator().manual_seed(0)
    users, n = 30, 50
    scores = torch.randint(0, 4, (users, n), generator=g).float()
    seen = torch.rand(users, n, generator=g) < 0.3
    seen[:, 0] = False
    seen[3, 1:] = True  # nothing left
    seen_rows = Rows(torch.cat([torch.zeros(1, dtype=torch.int64), seen.sum(1).cumsum(0)]), seen.nonzero()[:, 1])
    every = torch.arange(users)
    rows = evaluation.RankedRows(None, seen_rows, lambda index: Batch(user_id=every[index]), every)
    monkeypatch.setattr(evaluation, "SCORES", chunk * n)
    ids = evaluation.rank_all(Fixed(scores), rows, k, n, torch.device("cpu"))
    masked = scores.masked_fill(seen, -torch.inf)
    masked[:, 0] = -torch.inf
    # -inf ties with -inf: a stable descending sort puts masked items last, in ascending order
    expected = torch.sort(masked, dim=1, descending=True, stable=True).indices[:, : min(k, n)]
    assert ids[:, : min(k, n)].tolist() == expected.tolist()
    assert ids.shape == (users, k)


def test_hits_are_looked_up_per_row():
    positives = Rows(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 4, 4]))
    ids = torch.tensor([[4, 2, 1], [4, 1, 0], [1, 4, 0]])
    assert evaluation.hits(ids, positives, 5).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"metrics": ["Recall", "GAUC"], "valid_metric": "Recall@10"}, "its metrics need rec.meanrank"),
        ({"eval_args": {"mode": "uni20"}}, "its candidates are sampled"),
        (
            {"metrics": ["AUC", "LogLoss"], "valid_metric": "AUC", "eval_args": {"mode": "uni20"}},
            "candidates are sampled",
        ),
    ],
)
def test_other_metrics_and_candidates_take_the_stock_path_and_the_log_says_so_once(
    run_config, changes, reason, caplog, monkeypatch
):
    monkeypatch.setattr(evaluation, "_said", set())
    trainer, (_, valid, _) = build(run_config | changes)
    with caplog.at_level(logging.INFO):
        first = trainer.evaluate(valid, load_best_model=False)
        trainer.evaluate(valid, load_best_model=False)
    assert first
    said = [record.message for record in caplog.records if "takes RecBole's own path" in record.message]
    assert len(said) == 1
    assert reason in said[0]


def test_a_model_without_full_sort_predict_takes_the_stock_path(run_config, caplog, monkeypatch):
    monkeypatch.setattr(evaluation, "_said", set())
    trainer, (_, valid, _) = build(run_config | {"eval_backend": "streamed"}, model="NeuMF")
    with caplog.at_level(logging.INFO):
        assert trainer.evaluate(valid, load_best_model=False)
    assert "NeuMF has no full_sort_predict" in caplog.text


def test_stock_models_are_streamed_on_request_only(run_config, monkeypatch):
    called = []
    monkeypatch.setattr(evaluation, "evaluate", lambda *a: called.append(a) or {"recall@5": 0.5})
    trainer, (_, valid, _) = build(run_config, model="BPR")
    trainer.evaluate(valid, load_best_model=False)
    assert not called
    trainer.config["eval_backend"] = "streamed"
    assert trainer.evaluate(valid, load_best_model=False) == {"recall@5": 0.5}


def test_an_unknown_backend_names_the_known_ones(run_config):
    trainer, (_, valid, _) = build(run_config | {"eval_backend": "fast"}, model="BPR")
    with pytest.raises(ValueError, match="eval_backend must be one of streamed, stock, got 'fast'"):
        trainer.evaluate(valid, load_best_model=False)


def test_no_more_scores_than_agreed_are_held_at_once(run_config, monkeypatch):
    trainer, (train, valid, _) = build(run_config | {"eval_backend": "streamed"}, model="BPR")
    trainer.fit(train, None, saved=False)
    sizes = []
    score = trainer.model.full_sort_predict
    monkeypatch.setattr(trainer.model, "full_sort_predict", lambda x: sizes.append(len(x)) or score(x), raising=False)
    monkeypatch.setattr(evaluation, "SCORES", 4 * trainer.model.n_items)
    trainer.evaluate(valid, load_best_model=False)
    assert set(sizes[:-1]) == {4}
    assert sum(sizes) == len(valid.uid_list)


def test_a_loader_is_read_once_and_freed(run_config):
    import gc
    import weakref

    loader = build(run_config)[1][1]
    assert evaluation.ranked_rows(loader) is evaluation.ranked_rows(loader)
    gone = weakref.ref(loader)
    del loader
    gc.collect()
    assert gone() is None


def test_ranking_copies_no_table_of_ids_and_sees_no_untrained_vector(run_config):
    settings = {"encoder": "", "blocks": "learned", "user_tower": "id", "loss_type": "sampled_bce"}
    settings["eval_args"] = {"split": {"RS": [0.1, 0.4, 0.5]}}  # leaves items without a training interaction
    trainer, (train, _, _) = build(run_config | settings)
    model, untrained = trainer.model, ~trainer.model.trained.value
    assert untrained.sum() > 1
    trainer._train_epoch(train, 0)
    vectors, _ = model.eval().item_vectors()
    assert vectors.data_ptr() == model.target_tower.id.weight.data_ptr()
    assert not vectors[untrained].any() and vectors[~untrained].all()
    with torch.no_grad():
        model.target_tower.id.weight += 1  # as a checkpoint of an earlier version may hold
    assert not model.item_vectors()[0][untrained].any()
