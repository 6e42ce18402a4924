"""learner: rowwise_adagrad: the gradients are those of dense tables, and a step changes no row that its batch does not name."""

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm_kernels import RowwiseAdagrad

SETTINGS = {
    "encoder": "",
    "blocks": "learned",
    "user_tower": "id",
    "loss_type": "sampled_bce",
    "neg_weight": 0.7,
    "scale_init": 2.0,
    "train_neg_sample_args": {"distribution": "uniform", "sample_num": 3, "alpha": 1.0, "dynamic": False},
    "learner": "rowwise_adagrad",
    "weight_decay": 0.0,
    "epochs": 2,
    "train_batch_size": 16,
}


def built(settings):
    """Trainer, model and training batches."""
    config = Config(model="LLMTwoTower", dataset="toy", config_dict=dict(settings))
    init_seed(config["seed"], True)
    train, valid, _ = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, train._dataset).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "log_scale":
                parameter.normal_(std=0.3)
    return get_trainer(config["MODEL_TYPE"], config["model"])(config, model), model, train, valid


def gradients(model, batch):
    torch.manual_seed(0)  # history dropout
    model.zero_grad()
    loss = model.calculate_loss(batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


WAYS = [
    {},
    {"user_tower": "history"},
    {"user_tower": "history+id", "share_parameters": True},
    {"user_tower": "history+id", "scoring": "cosine"},
    {"loss_type": "pair_bce"},
    {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 3, "shared": 20}},
]


@pytest.mark.parametrize("changes", WAYS, ids=str)
def test_the_gradients_are_those_of_dense_tables(run_config, changes):
    trainer, model, train, _ = built(run_config | SETTINGS | changes)
    assert type(trainer.optimizer) is RowwiseAdagrad
    batch = next(iter(train))
    loss, sparse = gradients(model, batch)
    tables = {n: x for n, x in model.named_modules() if isinstance(x, torch.nn.Embedding)}
    given = {n: g for n, g in sparse.items() if g.is_sparse}
    assert {f"{n}.weight" for n in tables if f"{n}.weight" in sparse} == set(given) and given
    for table in tables.values():
        table.sparse = False
    want, dense = gradients(model, batch)
    torch.testing.assert_close(loss, want)
    assert sparse.keys() == dense.keys() and not any(g.is_sparse for g in dense.values())
    for name, gradient in sparse.items():
        torch.testing.assert_close(gradient.to_dense(), dense[name], rtol=1e-4, atol=1e-7)


def test_a_step_changes_the_rows_of_its_batch_alone(run_config):
    trainer, model, train, _ = built(run_config | SETTINGS)
    batch = next(iter(train))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer._step(batch, model.calculate_loss)
    users = set(batch[model.USER_ID].tolist())
    items = set(batch[model.ITEM_ID].tolist()) | set(batch[model.NEG_ITEM_ID].reshape(-1).tolist())
    for table, named in ((model.user_tower.id, users), (model.target_tower.id, items)):
        name = next(n for n, p in model.named_parameters() if p is table.weight)
        changed = (table.weight != before[name]).any(1).nonzero()[:, 0].tolist()
        assert set(changed) == named and len(named) < len(table.weight)
        assert trainer.optimizer.state[table.weight]["sum"].count_nonzero() == len(named)


def test_a_training_learns(run_config):
    trainer, model, train, valid = built(run_config | SETTINGS | {"epochs": 12, "learning_rate": 0.3, "eval_step": 12})
    first = sum(float(model.calculate_loss(batch)) for batch in train)
    trainer.fit(train, valid, saved=False, verbose=False)
    model.train()
    assert sum(float(model.calculate_loss(batch)) for batch in train) < 0.7 * first


REFUSED = {
    "under loss_type catalog_bce it names every item; set loss_type": {
        "loss_type": "catalog_bce",
        "train_neg_sample_args": None,
    },
    "does not go with clip_grad_norm": {"clip_grad_norm": {"max_norm": 1}},
    "has no weight_decay, and it is 0.1; set it to 0": {"weight_decay": 0.1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_it_does_not_go_with_is_refused(run_config, message):
    with pytest.raises(ValueError, match=message):
        built(run_config | SETTINGS | REFUSED[message])
