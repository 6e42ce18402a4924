"""The loss from user vectors on at once is the loss of the general path, and gives way to it where an entry does not count."""

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, init_seed

from recbole_llm.bridge.batches import DrawnBatch
from recbole_llm_kernels.torch_ops.sampled import has_sampled_dots

TABLES = {
    "encoder": "",
    "blocks": "learned",
    "user_tower": "id",
    "loss_type": "sampled_bce",
    "neg_weight": 0.7,
    "scale_init": 2.0,
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 3, "alpha": 1.0, "dynamic": False},
}


def build(settings):
    config = Config(model="LLMTwoTower", dataset="toy", config_dict=dict(settings))
    init_seed(config["seed"], True)
    train, _, _ = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, train._dataset).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.normal_(std=0.3)
    return model, next(iter(train))


def both_ways(model, batch, monkeypatch):
    """Loss and gradients as they come, and by the general path."""

    def of():
        torch.manual_seed(0)  # history dropout
        model.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    found = of()
    with monkeypatch.context() as patched:
        patched.setattr(model.loss, "in_one_pass", lambda *args: None)
        return found, of()


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0])
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 3
    for name, gradient in found[1].items():
        torch.testing.assert_close(gradient, expected[1][name], rtol=1e-4, atol=1e-7)


def is_at_once(model, batch):
    entries = getattr(batch, "entries", None)
    users, items = batch[model.USER_ID], batch[model.ITEM_ID]
    negatives = batch[model.NEG_ITEM_ID] if model.options.loss_type == "sampled_bce" else items
    return model.loss.in_one_pass(users, items, negatives, model.history, entries and entries()) is not None


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_item_bias": False},
        {"user_tower": "history"},
        {"user_tower": "history+id", "history_dropout": 0.0},
        {"user_tower": "history", "encoder": "tiny"},
    ],
    ids=str,
)
def test_it_equals_the_general_path(run_config, changes, monkeypatch):
    text = {"encoder": run_config["encoder"]} if "encoder" in changes else {}
    model, batch = build(run_config | TABLES | changes | text)
    assert bool(model.target_tower.adapters) == bool(text)
    assert is_at_once(model, batch) == has_sampled_dots()
    assert_same(*both_ways(model, batch, monkeypatch))


@pytest.mark.parametrize("what", ["a negative that is the positive", "a negative without a training interaction"])
def test_a_batch_with_an_entry_that_does_not_count_takes_the_general_path(run_config, what, monkeypatch):
    model, batch = build(run_config | TABLES)
    untrained = (~model.trained.value).nonzero()[-1]
    negatives = batch[model.NEG_ITEM_ID].view(len(batch[model.ITEM_ID]), -1)
    negatives[0, 0] = batch[model.ITEM_ID][0] if "positive" in what else untrained
    assert not is_at_once(model, batch)
    assert_same(*both_ways(model, batch, monkeypatch))
    assert what.endswith("positive") or not model.target_tower.id.weight.grad[untrained].any()


@pytest.mark.parametrize("how", ["written to", "exchanged", "moved"])
def test_a_batch_that_is_no_longer_as_drawn_is_looked_at(run_config, how, monkeypatch):
    model, batch = build(run_config | TABLES)
    assert batch.entries() is not None
    items, negatives = batch[model.ITEM_ID], batch[model.NEG_ITEM_ID]
    if how == "exchanged":
        batch.interaction[model.NEG_ITEM_ID] = negatives = negatives.clone()
        negatives[1] = items[1]
    elif how == "moved":  # as RecBole's own loop does
        batch = batch.to("cpu")
        assert type(batch) is not DrawnBatch
        batch[model.NEG_ITEM_ID][1] = items[1]
    else:
        negatives[1] = items[1]
        assert batch.entries() is None
    assert not is_at_once(model, batch)
    assert_same(*both_ways(model, batch, monkeypatch))


def test_a_batch_as_drawn_with_a_further_column_is_one(run_config):
    model, batch = build(run_config | TABLES)
    batch["weight"] = torch.ones(len(batch))
    entries = batch.entries()
    assert torch.equal(entries[:, 0], batch[model.ITEM_ID]) and torch.equal(entries[:, 1:], batch[model.NEG_ITEM_ID])
    assert model.trained.value[entries].all() and not (entries[:, 1:] == entries[:, :1]).any()


@pytest.mark.parametrize(
    "changes", [{"scoring": "cosine"}, {"loss_type": "pair_bce"}, {"kernel_backend": "triton"}], ids=str
)
def test_other_towers_and_losses_take_the_general_path(run_config, changes):
    model, batch = build(run_config | TABLES | changes)
    assert not is_at_once(model, batch)


def test_mixed_precision_takes_the_general_path(run_config):
    model, batch = build(run_config | TABLES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not is_at_once(model, batch)
