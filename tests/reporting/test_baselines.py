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

    type = None

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
        train, valid, test = data_preparation(config, create_dataset(config))
        model = get_model("ItemKNN")(config, train._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], "ItemKNN")(config, model)
        trainer.eval_collector.data_collect(train)
        trainer.valid_data = valid
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


def test_the_setting_is_the_one_with_most_hits_on_validation(stock, monkeypatch):
    training, trainer = stock[1], stock[4]
    rows = quality.ranked_rows(trainer.valid_data)
    choices = {50.0: (5, 60, 30), 0.0: (5, 60, 30)}  # without the default
    monkeypatch.setattr(baselines, "CHOICES", choices)
    interactions = training.inter_matrix(form="csr")
    hits = {}
    for shrink, numbers in choices.items():
        for number in numbers:
            model = ItemKNN(interactions, training.uid_field, number, shrink)
            ranking = quality.rank_rows(model, rows, training.item_num, torch.device("cpu"))
            hits[number, shrink] = int(ranking.hit.sum())
    best = max(hits, key=hits.get)
    assert len(set(hits.values())) > 3 and best != (5, 50.0)  # there is something to choose
    fitted = fit_baselines(training, rows).fitted[1]
    assert f"{best[0]} neighbours, shrink {best[1]:g} (the best of 6 settings on validation)" in fitted.about
    own = quality.rank_rows(fitted, rows, training.item_num, torch.device("cpu"))
    assert int(own.hit.sum()) == hits[best]
    # too large to choose, and nothing to choose by
    monkeypatch.setattr(baselines, "CHOICE_ITEMS", 1000)
    assert "100 neighbours, shrink 0 (RecBole's default; up to 1,000" in fit_baselines(training, rows).fitted[1].about
    assert "no ranking of a validation split" in fit_baselines(training).fitted[1].about


def test_fewer_neighbours_are_those_of_a_fit_with_fewer(stock):
    training = stock[1]
    interactions = training.inter_matrix(form="csr")
    wide = ItemKNN(interactions, training.uid_field, 100, 10.0).with_fewer(7)._weights
    direct = ItemKNN(interactions, training.uid_field, 7, 10.0)._weights
    assert wide.shape == direct.shape and np.diff(wide.indptr).max() == 7
    for column in (1, 5, 400, 1600):
        a, b = (np.sort(w[:, column].toarray().ravel()) for w in (wide, direct))
        np.testing.assert_array_equal(a, b)


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
