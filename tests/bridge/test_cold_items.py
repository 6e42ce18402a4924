"""Items without a training interaction: placed by their texts, or left out, and never by an untrained vector."""

import logging
from dataclasses import replace

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.bridge.evaluation import cold_items as cold_report
from recbole_llm.bridge.evaluation.streaming import ranked_rows
from recbole_llm.fitting.ease import Kernel
from recbole_llm.fitting.pipeline import _without_items
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.importing.cold_split import split_dataset
from recbole_llm.scoring.rows import rows_from_pairs


@pytest.fixture
def cold_config(run_config, tmp_path, toy_path):
    import shutil

    shutil.copytree(toy_path / "toy", tmp_path / "data" / "toy")
    split_dataset("toy", "cold", cold_items=0.25, seed=1, data_path=tmp_path / "data")
    changes = {"data_path": str(tmp_path / "data"), "benchmark_filename": ["train", "valid", "test"], "epochs": 8}
    return run_config | changes


def train(config_dict):
    config = Config(model="LLMTwoTower", dataset="cold", config_dict=dict(config_dict))
    init_seed(config["seed"], True)
    train_data, valid, test = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, train_data._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(train_data, valid, saved=True, show_progress=False)
    result = trainer.evaluate(test, load_best_model=True)
    return model.eval(), test, result


def cold_only(model, test):
    inter = test._dataset.inter_feat
    targets = rows_from_pairs(inter["user_id"], inter["item_id"], model.n_users)
    targets = targets.keep(model.cold[targets.ids])
    users = torch.nonzero(targets.sizes).squeeze(1)

    def scores(rows):
        return model.scores(users[rows])

    targets, seen = targets.select(users), model.history.select(users)
    value = user_metric(scores, targets, seen, model.n_items, TopKMetric("ndcg", 5), excluded=~model.cold)
    return float(value.mean()), len(users)


@pytest.mark.parametrize("blocks", ["closed_form+learned", "closed_form", "learned"])
def test_cold_items_are_ranked_by_their_texts(cold_config, blocks):
    well_trained = {"epochs": 40, "learning_rate": 0.02, "weight_decay": 0.01, "stopping_step": 40}
    model, test, _ = train(cold_config | well_trained | {"blocks": blocks, "cold_boost": 1.0})
    assert int(model.cold.sum()) == 11
    placed = cold_only(model, test)[0]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(model.n_users, model.n_items, generator=generator)
    model.scores = lambda users: noise[users].clone()
    # the encoder's weights are random, so that little of a text but its words is left in its vector
    assert placed > 1.2 * cold_only(model, test)[0]


def test_left_out_items_have_no_place_and_come_back_from_a_checkpoint(cold_config):
    model, _, _ = train(cold_config)
    assert int(model.cold.sum()) == 11
    assert torch.equal(model.score.cold.ids, torch.nonzero(model.cold).squeeze(1))
    state, other = model.state_dict(), model.other_parameter()
    users = torch.arange(1, 20)
    before, cold = model.scores(users), model.score.cold
    assert before[:, cold.ids].isfinite().all() == cold.joint
    model.fitted = None
    assert not torch.allclose(model.scores(users), before)
    model.load_state_dict(state)
    model.load_other_parameter(other)
    torch.testing.assert_close(model.scores(users), before)
    for name, rows in cold.target.items():
        assert torch.equal(model.score.cold.target[name], rows)
        assert torch.equal(model.score.cold.source[name], cold.source[name])


def test_vectors_and_scores_agree_for_cold_items_too(cold_config):
    model, _, _ = train(cold_config | {"cold_boost": 0.7})
    users = torch.arange(1, 20)
    w, bias = model.item_vectors()
    torch.testing.assert_close(model.user_vectors(users) @ w.T + bias, model.scores(users), rtol=1e-4, atol=1e-4)
    items = torch.nonzero(model.cold).squeeze(1)[:5]
    pairs = {"user_id": users[:5], "item_id": items}
    torch.testing.assert_close(
        model.predict(pairs), model.scores(users[:5])[torch.arange(5), items], rtol=1e-4, atol=1e-4
    )


def test_without_a_map_the_log_says_how_many_items_have_no_place(cold_config, caplog):
    with caplog.at_level(logging.INFO):
        model, _, _ = train(cold_config | {"cold_map": "none"})
    assert model.score.cold is None
    assert "11 items have no training interaction, and nothing to place them by (cold_map none)" in caplog.text


def run_stock(cold_config, model, changes=()):
    config = Config(model=model, dataset="cold", config_dict=cold_config | {"epochs": 1} | dict(changes))
    init_seed(config["seed"], True)
    train_data, valid, test = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, train_data._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(train_data, valid, saved=True, show_progress=False)
    return trainer, test


@pytest.mark.parametrize(
    "model, remark, backend",
    [
        ("BPR", "ranks these by chance", "stock"),
        ("BPR", "ranks these by chance", "streamed"),
        ("EASE", "gives all of them the same score", "stock"),
    ],
)
def test_a_stock_models_warm_cold_and_joint_figures_stand_beside_its_table(cold_config, caplog, model, remark, backend):
    trainer, test = run_stock(cold_config, model, {"eval_backend": backend})
    with caplog.at_level(logging.INFO):
        result = trainer.evaluate(test)
    assert "items without a training interaction: 11; they are" in caplog.text
    assert f"{model} cannot score cold items" in caplog.text and remark in caplog.text
    found = cold_report.report(trainer, test)
    for name, value in found.metrics["all items"].items():
        assert value == pytest.approx(result[name], abs=6e-5)  # RecBole rounds to four places
    assert found.cold_targets == int((~trainer.eval_collector.trained_items[test._dataset.inter_feat["item_id"]]).sum())


def test_warm_and_cold_figures_are_those_of_rankings_among_themselves(cold_config, monkeypatch):
    trainer, test = run_stock(cold_config, "BPR")
    model, trained = trainer.model, trainer.eval_collector.trained_items
    inter = test._dataset.inter_feat
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(model.n_users, model.n_items, generator=generator)
    monkeypatch.setattr(model, "full_sort_predict", lambda interaction: noise[interaction["user_id"]].view(-1))
    found = cold_report.report(trainer, test)
    rows = ranked_rows(test)
    targets = rows_from_pairs(inter["user_id"], inter["item_id"], model.n_users)
    for group, kind, excluded in (
        ("warm items alone", trained, ~trained),
        ("warm, cold present", trained, ~(trained | ~trained)),
        ("cold items alone", ~trained, trained),
    ):
        excluded = excluded.clone()
        excluded[0] = True
        own = targets.select(rows.users).keep(kind[targets.select(rows.users).ids])
        metric = TopKMetric.parse("ndcg@10")
        expected = user_metric(lambda r: noise[rows.users[r]], own, rows.seen, model.n_items, metric, excluded)
        assert found.metrics[group]["ndcg@10"] == pytest.approx(float(expected.mean()))


def test_nothing_is_told_where_every_item_of_the_test_is_trained(run_config, caplog):
    config = run_config | {"eval_args": {"split": {"RS": [0.9, 0.05, 0.05]}, "group_by": "none"}}
    config = Config(model="BPR", dataset="toy", config_dict=config | {"epochs": 1})
    train_data, valid, test = data_preparation(config, create_dataset(config))
    model = get_model("BPR")(config, train_data._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(train_data, valid, saved=False)
    assert trainer.eval_collector.trained_items[test._dataset.inter_feat["item_id"]].all()
    assert cold_report.report(trainer, test) is None


@pytest.mark.parametrize("dim", [8, "full"])
def test_hidden_items_of_many_are_refitted_in_the_svd_form(cold_config, dim, monkeypatch):
    model, _, _ = train(cold_config | {"blocks": "closed_form", "closed_form_dim": dim, "cold_boost": 1.0})
    setting = replace(model.fitted.setting, kernels=(Kernel("text", 0.05),))
    data, options, score = model.training_data(), model.options, model.score
    left = model.history.keep(model.history.ids % 5 > 0)
    exact = _without_items(score, data, left, options, setting)
    monkeypatch.setattr("recbole_llm.fitting.pipeline.EXACT_ITEMS", 5)
    monkeypatch.setattr("recbole_llm.fitting.ease.spotrf", lambda *args, **options: pytest.fail("an exact solution"))
    users = torch.arange(1, model.n_users)
    found = _without_items(score, data, left, options, setting)
    hidden = torch.arange(model.n_items) % 5 == 0
    assert found.has_vectors and not found.blocks[0].target[hidden].any()
    warm = torch.bincount(left.ids, minlength=model.n_items) > 0
    ranked = warm.repeat(model.n_users, 1)
    ranked[left.row_of_entry(), left.ids] = False  # the diagonal of the matrix, which is anything
    scores = [each.scores(left.select(users))[ranked[1:]] for each in (found, exact)]
    assert all(each.isfinite().all() for each in scores)
    alike = torch.corrcoef(torch.stack(scores))[0, 1]
    assert alike > (0.6 if dim == 8 else 0.9)  # other directions, and few
