"""The baselines against RecBole's own models and evaluator, and against a count by hand."""

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.reporting import baselines, quality
from recbole_llm.reporting.baselines import Bestsellers, ItemKNN, fit_baselines

SETTINGS = {
    "gpu_id": "",
    "show_progress": False,
    "state": "ERROR",
    "metrics": ["Recall", "NDCG", "Hit", "ItemCoverage"],
    "topk": [10],
    "valid_metric": "NDCG@10",
}


class Popular(Bestsellers):
    """Bestsellers under the interface of a model that RecBole evaluates."""

    def eval(self):
        return self


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """RecBole's ItemKNN on ml-100k, its splits, and its test result by RecBole's own evaluation."""
    folder = tmp_path_factory.mktemp("stock")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["recbole-llm"])
        config = Config("ItemKNN", "ml-100k", config_dict=dict(SETTINGS))
        init_seed(config["seed"], config["reproducibility"])
        train, _, test = data_preparation(config, create_dataset(config))
        model = get_model("ItemKNN")(config, train._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], "ItemKNN")(config, model)
        trainer.eval_collector.data_collect(train)
        yield config, train._dataset, test, model, trainer, trainer.evaluate(test, load_best_model=False)


def test_itemknn_is_recboles_to_four_digits(stock):
    config, training, test, _, _, theirs = stock
    fitted = {each.name: each for each in fit_baselines(training).fitted}
    rows = quality.ranked_rows(test)
    ranking = quality.rank_rows(fitted["ItemKNN"], rows, training.item_num, torch.device("cpu"))
    figures = quality._figures(
        ranking,
        rows.positives.sizes,
        torch.zeros(len(rows), dtype=torch.int64),
        torch.zeros(training.item_num, dtype=torch.int64),
        rows.positives,
        torch.ones(training.item_num, dtype=torch.int64),
    )
    assert figures["ndcg"] == pytest.approx(theirs["ndcg@10"], abs=5e-5)
    assert figures["recall"] == pytest.approx(theirs["recall@10"], abs=5e-5)
    assert figures["users_with_a_hit"] == pytest.approx(theirs["hit@10"], abs=5e-5)
    assert figures["items_shown"] / (training.item_num - 1) == pytest.approx(theirs["itemcoverage@10"], abs=1e-3)


def test_bestsellers_are_what_recboles_evaluator_says_of_their_scores(stock):
    config, training, test, _, trainer, _ = stock
    users = training.inter_feat[training.uid_field].numpy()
    items = training.inter_feat[training.iid_field].numpy()
    count = np.bincount(items, minlength=training.item_num)
    # ties are broken by the smaller id, as ours are
    score = torch.from_numpy(count * 10.0 - np.arange(len(count)) / len(count))
    stock_model, trainer.model = trainer.model, Popular(score)
    try:
        theirs = trainer.evaluate(test, load_best_model=False)
    finally:
        trainer.model = stock_model
    rows = quality.ranked_rows(test)
    own = fit_baselines(training).fitted[0]
    ranking = quality.rank_rows(own, rows, training.item_num, torch.device("cpu"))
    # and by hand: the hits of every user among the items with most interactions that it has not met
    order = np.argsort(-count, kind="stable")
    order = order[order != 0]
    seen, wanted, hits = test.uid2history_item, test.uid2positive_item, 0
    for user in test.uid_list.tolist():
        known = set(seen[user].tolist())
        best = [item for item in order.tolist() if item not in known][:10]
        hits += len(set(best) & set(wanted[user].tolist()))
    assert int(ranking.hit.sum()) == hits > 0
    recall = quality.TopKMetric("recall", 10).of(ranking.hit, rows.positives.sizes).mean()
    assert float(recall) == pytest.approx(theirs["recall@10"], abs=5e-5)
    assert len(users) == count.sum()


def test_neighbours_and_shrink_are_recboles(stock):
    from recbole.model.general_recommender.itemknn import ComputeSimilarity

    training = stock[1]
    interactions = training.inter_matrix(form="csr").astype(np.float32)
    for neighbours, shrink in ((20, 10.0), (10_000, 0.0)):
        ours = ItemKNN(interactions, training.uid_field, neighbours, shrink)._weights
        _, theirs = ComputeSimilarity(interactions, topk=neighbours, shrink=shrink).compute_similarity()
        # which of equal neighbours is the last one kept is left to chance; the values kept are not
        for column in (1, 5, 400, 1600):
            a, b = (np.sort(w[:, column].toarray().ravel()) for w in (ours, theirs))
            np.testing.assert_allclose(a, b, atol=1e-6)


def test_what_is_beyond_the_budget_is_said_and_not_fitted(stock, monkeypatch):
    training = stock[1]
    assert [each.name for each in fit_baselines(training).fitted] == ["bestsellers", "ItemKNN"]
    monkeypatch.setattr(baselines, "MAX_ITEMS", 1000)
    found = fit_baselines(training)
    assert [each.name for each in found.fitted] == ["bestsellers"]
    assert "1,000 items" in found.left_out["ItemKNN"] and "1,682" in found.left_out["ItemKNN"]
    monkeypatch.undo()
    monkeypatch.setattr(baselines, "MAX_PAIRS", 10)
    assert "10 pairs" in fit_baselines(training).left_out["ItemKNN"]


def test_a_model_is_not_its_own_baseline(stock):
    assert [each.name for each in fit_baselines(stock[1], without="ItemKNN").fitted] == ["bestsellers"]
