"""LLMTwoTower through RecBole's own entry points, on a made dataset with a tiny encoder."""

import glob
import logging
from dataclasses import replace

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import load_data_and_model, objective_function, run_recbole
from recbole.utils import get_model, get_trainer, init_seed
from recbole.utils.case_study import full_sort_topk

from recbole_llm.fitting.stage_values import FittedScore
from recbole_llm.scoring.probability import ProbabilityMap


def build(config_dict, model="LLMTwoTower"):
    config = Config(model=model, dataset="toy", config_dict=dict(config_dict))
    init_seed(config["seed"], True)
    dataset = create_dataset(config)
    train, valid, test = data_preparation(config, dataset)
    model = get_model(config["model"])(config, train._dataset)
    return config, model, dataset, train, valid, test


def chance(config_dict):
    """NDCG@10 of random scores on the made data, about."""
    return run_recbole("Random", "toy", config_dict={k: v for k, v in config_dict.items() if k != "epochs"})[
        "test_result"
    ]["ndcg@10"]


@pytest.mark.parametrize("loss_type", ["catalog_bce", "catalog_ce", "sampled_bce", "pair_bce"])
def test_every_loss_learns_the_made_tastes(run_config, loss_type):
    run_config |= {"loss_type": loss_type, "epochs": 12, "learning_rate": 0.01}
    result = run_recbole("LLMTwoTower", "toy", config_dict=dict(run_config))
    assert result["test_result"]["ndcg@10"] > 1.3 * chance(run_config)


def test_the_model_is_reached_by_class_too_and_gives_the_same_result(run_config):
    from recbole_llm.model import LLMTwoTower

    by_name = run_recbole("LLMTwoTower", "toy", config_dict=dict(run_config))
    by_class = run_recbole(LLMTwoTower, "toy", config_dict=dict(run_config))
    assert by_name["test_result"] == by_class["test_result"]


def test_a_run_that_encodes_and_a_run_that_reads_the_cache_are_equal(run_config, caplog):
    first = run_recbole("LLMTwoTower", "toy", config_dict=dict(run_config))
    stored = {
        p: open(p, "rb").read()
        for p in glob.glob(run_config["feature_cache_dir"] + "/**/*", recursive=True)
        if "." in p
    }
    second = run_recbole("LLMTwoTower", "toy", config_dict=dict(run_config))
    assert first == second
    assert stored
    assert all(open(p, "rb").read() == content for p, content in stored.items() if p.endswith(".safetensors"))


def test_a_checkpoint_is_small_and_scores_as_the_trained_model(run_config):
    run_recbole("LLMTwoTower", "toy", config_dict=dict(run_config))
    (path,) = glob.glob(run_config["checkpoint_dir"] + "/LLMTwoTower*[0-9].pth")
    state = torch.load(path, weights_only=False)["state_dict"]
    assert not [name for name in state if "features" in name or "history" in name]
    config, model, dataset, _, _, test = load_data_and_model(path)
    users = dataset.token2id(dataset.uid_field, ["u1", "u5"])
    scores, items = full_sort_topk(users, model.eval(), test, k=5, device=config["device"])
    again = load_data_and_model(path)[1].eval()
    users = torch.as_tensor(users)
    expected = again.full_sort_predict({"user_id": users}).view(2, -1)
    torch.testing.assert_close(scores, expected.gather(1, items))


def test_training_resumes_from_a_checkpoint(run_config):
    run_recbole("LLMTwoTower", "toy", config_dict=dict(run_config))
    (path,) = glob.glob(run_config["checkpoint_dir"] + "/LLMTwoTower*[0-9].pth")
    config, model, _, train, valid, _ = build(run_config | {"epochs": 5})
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.resume_checkpoint(path)
    start = trainer.start_epoch
    trainer.fit(train, valid, saved=False, show_progress=False)
    assert 1 <= start <= 3
    assert sorted(trainer.train_loss_dict) == list(range(5))  # the checkpoint brings the earlier ones


def test_the_objective_function_of_hyper_tuning_runs(run_config):
    out = objective_function(dict(run_config, model="LLMTwoTower", dataset="toy"))
    assert out["model"] == "LLMTwoTower"
    assert out["best_valid_score"] > 0


def test_the_history_is_the_training_split_alone(run_config):
    _, model, dataset, train, valid, test = build(run_config)
    pairs = {(u, i) for u in range(dataset.user_num) for i in model.history.select(torch.tensor([u])).ids.tolist()}
    inter = train._dataset.inter_feat
    assert pairs == set(zip(inter["user_id"].tolist(), inter["item_id"].tolist(), strict=True))
    for split in (valid, test):
        inter = split._dataset.inter_feat
        assert pairs.isdisjoint(zip(inter["user_id"].tolist(), inter["item_id"].tolist(), strict=True))


def test_padding_and_items_without_a_training_interaction_are_no_negatives(run_config):
    everything = {
        "inter": ["user_id", "item_id"],
        "item": ["item_id"],
    }  # items that nobody touched are in the .item file
    _, model, dataset, train, _, _ = build(run_config | {"history_dropout": 0.0, "load_col": everything})
    batch = next(iter(train))
    model.train().calculate_loss(batch).backward()
    untrained = torch.ones(dataset.item_num, dtype=torch.bool)
    untrained[train._dataset.inter_feat["item_id"]] = False
    assert int(untrained.sum()) >= 5  # padding and the four items nobody touched
    assert model.item_bias.grad[untrained].abs().max() == 0
    assert model.target_tower.id.weight.grad[untrained].abs().max() == 0
    assert model.item_bias.grad[~untrained].abs().min() > 0


def test_items_are_mapped_once_per_evaluation_and_again_after_a_step(run_config, monkeypatch):
    config, model, _, train, valid, _ = build(run_config | {"eval_batch_size": 100})
    calls = []
    original = model.target_tower.parts
    monkeypatch.setattr(model.target_tower, "parts", lambda *a: calls.append(1) or original(*a))
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.evaluate(valid, load_best_model=False)
    assert len(valid) > 10
    assert len(calls) == 1
    with torch.no_grad():
        model.item_bias += 1
    before = len(calls)
    model.full_sort_predict({"user_id": torch.tensor([1])})
    assert len(calls) == before + 1


def test_predict_and_full_sort_agree_and_value_metrics_get_probabilities(run_config):
    _, model, dataset, _, _, _ = build(run_config)
    model.eval()
    users, items = torch.tensor([3, 3, 9]), torch.tensor([5, 40, 1])
    full = model.full_sort_predict({"user_id": users}).view(3, -1)
    logits = model.predict({"user_id": users, "item_id": items})
    torch.testing.assert_close(logits, full[torch.arange(3), items])
    assert torch.isneginf(full[:, 0]).all()
    assert torch.isfinite(full[:, 1:]).all()
    value = run_config | {"metrics": ["AUC", "LogLoss"], "valid_metric": "AUC", "eval_args": {"mode": "uni20"}}
    _, model, _, _, _, _ = build(value)
    model.eval()
    probability = model.predict({"user_id": users, "item_id": items})
    torch.testing.assert_close(probability, torch.sigmoid(logits))
    shown = ProbabilityMap(-3.0, 0.25, 0.4, -1.0, (2.0, 0.5), (0.5,))
    model.fitted = FittedScore(replace(model.score, probability=shown))
    n = model.history.sizes[users]
    wanted = torch.sigmoid(shown.logit(logits, n.float().log()))
    assert not torch.allclose(wanted, probability, atol=1e-3)
    torch.testing.assert_close(model.predict({"user_id": users, "item_id": items}), wanted)
    torch.testing.assert_close(model.probabilities(users)[torch.arange(3), items], wanted)
    assert (model.probabilities(users)[:, 0] == 0).all()


@pytest.mark.parametrize(
    "changes",
    [
        {"share_parameters": True},
        {"scoring": "cosine", "scale_init": 8.0},
        {"user_tower": "history+id+text"},
        {"user_tower": "id"},
        {"adapter_hidden_size": 24},
        {"use_item_id": False},
        {"use_item_bias": False},
        {"encoder": ""},
        {"feature_transform": "whiten"},
        {
            "history_decay": 5.0,
            "eval_args": {"order": "TO", "split": {"LS": "valid_and_test"}},
            "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        },
        {"blocks": "closed_form"},
        {"blocks": "learned"},
        {"closed_form_dim": 8},
        {"closed_form_dim": "full"},
        {
            "loss_type": "sampled_bce",
            "train_neg_sample_args": {"distribution": "popularity", "sample_num": 4, "alpha": 0.5},
        },
    ],
    ids=lambda c: "-".join(c),
)
def test_every_option_trains_and_scores(run_config, changes):
    result = run_recbole("LLMTwoTower", "toy", config_dict=run_config | changes)
    assert 0 < result["test_result"]["recall@10"] <= 1


def test_history_decay_without_time_order_is_refused(run_config):
    with pytest.raises(ValueError, match="set eval_args.order to TO"):
        build(run_config | {"history_decay": 5.0})


def test_an_own_pair_never_explains_itself(run_config):
    """The query of (user, item) must equal one pooled from the history without the item."""
    from recbole_llm.scoring.rows import Rows, history_weights, pool

    _, model, _, _, _, _ = build(run_config | {"history_dropout": 0.0, "loss_type": "sampled_bce"})
    user = 4
    items = model.history.select(torch.tensor([user])).ids
    queries = model.towers.queries_of_pairs(torch.full_like(items, user), items, model.history)
    for k, item in enumerate(items):
        rest = items[items != item]
        row = Rows(torch.tensor([0, len(rest)]), rest)
        pooled = pool(model.source_tower(), row, history_weights(row, 0.5))
        expected = model.user_tower(torch.tensor([user]), pooled) * model.log_scale.exp()
        torch.testing.assert_close(queries[k], expected[0], rtol=1e-4, atol=1e-6)


def test_a_single_item_history_leaves_the_offset_alone(run_config):
    _, model, _, _, _, _ = build(run_config | {"history_dropout": 0.99, "loss_type": "sampled_bce"})
    users = torch.arange(1, 40)
    items = torch.stack([model.history.select(u[None]).ids[0] for u in users])
    assert torch.isfinite(model.towers.queries_of_pairs(users, items, model.history)).all()


def test_the_log_names_the_text_columns_and_counts_what_is_missing(run_config, caplog):
    with caplog.at_level(logging.INFO):
        build(run_config | {"state": "INFO"})
    text = caplog.text
    assert "title" in text
    assert "1 of 44 have only empty text columns" in text
    assert "first text: 'Title: A " in text


def test_a_dataset_without_item_file_says_what_to_do(run_config, tmp_path):
    folder = tmp_path / "bare" / "toy"
    folder.mkdir(parents=True)
    from pathlib import Path

    (folder / "toy.inter").write_text((Path(run_config["data_path"]) / "toy" / "toy.inter").read_text())
    with pytest.raises(ValueError, match=r"there is no toy\.item"):
        build(run_config | {"data_path": str(tmp_path / "bare")})


def test_a_saved_dataset_is_small_and_stale_when_our_keys_change(run_config, tiny_encoder):
    run_config |= {"save_dataset": True}
    build(run_config)
    (path,) = glob.glob(run_config["checkpoint_dir"] + "/toy-*.pth")
    run_config |= {"dataset_save_path": path}
    _, _, dataset, _, _, _ = build(run_config)  # read back
    assert "_item_features" not in dataset.__getstate__()
    _, _, changed, train, _, _ = build(run_config | {"feature_transform": "none"})
    assert changed.config["feature_transform"] == "none"
