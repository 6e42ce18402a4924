"""With interactions split by time: fading histories, a next-item block, and validation items in the test's histories."""

import logging
import random

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.serving.model_tables import tables_of

BY_TIME = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}


@pytest.fixture
def walks(run_config, tmp_path, toy_path):
    """Users walk around a circle of 48 items, with a step aside now and then: what comes next is told by the newest item."""
    rng = random.Random(0)
    folder = tmp_path / "data" / "toy"
    folder.mkdir(parents=True)
    (folder / "toy.item").write_text((toy_path / "toy" / "toy.item").read_text())
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for u in range(80):
        at, seen = rng.randrange(48), []
        while len(seen) < 10:
            if at not in seen:
                seen.append(at)
            at = (at + rng.choice([1, 1, 1, 2])) % 48
        lines += [f"u{u}\ti{i}\t{1000 * u + t}" for t, i in enumerate(seen)]
    rng.shuffle(lines[1:])
    (folder / "toy.inter").write_text("\n".join(lines) + "\n")
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    return run_config | {"data_path": str(tmp_path / "data"), "eval_args": BY_TIME, "load_col": columns, "epochs": 2}


def train(config_dict):
    config = Config(model="LLMTwoTower", dataset="toy", config_dict=dict(config_dict))
    init_seed(config["seed"], True)
    loaders = data_preparation(config, create_dataset(config))
    model = get_model(config["model"])(config, loaders[0]._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(*loaders[:2], saved=True, show_progress=False)
    return trainer, loaders


def pairs(loader):
    inter = loader._dataset.inter_feat
    return set(zip(inter["user_id"].tolist(), inter["item_id"].tolist(), strict=True))


@pytest.mark.parametrize("changes", [{}, {"blocks": "closed_form", "closed_form_dim": 12}], ids=str)
def test_the_order_is_used_and_the_log_says_how(walks, caplog, changes):
    with caplog.at_level(logging.INFO):
        trainer, (train_data, valid, test) = train(walks | changes)
        result = trainer.evaluate(test)
    model = trainer.model
    assert "order TO: at test a user's history is the training and validation items" in caplog.text
    assert "histories of the closed form fade by" in caplog.text and "next-item block, decay" in caplog.text
    assert model.uses_order and model._next is not None
    without, _ = train(walks | changes | {"use_order": False})
    assert not without.model.uses_order
    assert result["ndcg@10"] > 1.2 * without.evaluate(test)["ndcg@10"]


def test_the_test_reads_validation_items_and_nothing_else_does(walks):
    trainer, (train_data, valid, test) = train(walks | {"closed_form_dim": 12})
    model = trainer.model
    seen_at = {}
    for name, loader in (("valid", valid), ("test", test)):
        stock = type(model).user_vectors

        def user_vectors(self, users, name=name, stock=stock):
            history = self.ranking_history.select(users)
            ranked = self._ranked.select(users)
            assert torch.equal(history.ids, ranked.ids)
            seen_at.setdefault(name, set()).update(
                zip(users[history.row_of_entry()].tolist(), history.ids.tolist(), strict=True)
            )
            return stock(self, users)

        type(model).user_vectors = user_vectors
        try:
            trainer.evaluate(loader, load_best_model=False)
        finally:
            type(model).user_vectors = stock
    assert seen_at["valid"] <= pairs(train_data)
    assert seen_at["test"] <= pairs(train_data) | pairs(valid) and seen_at["test"] >= pairs(valid)
    assert not seen_at["test"] & pairs(test)
    assert not model.at_test


def test_vectors_scores_and_pairs_agree_and_come_back_from_a_checkpoint(walks):
    trainer, (_, _, test) = train(walks | {"closed_form_dim": 12})
    model = trainer.model.eval()
    users = torch.arange(1, 30)
    for model.at_test in (False, True):
        w, bias = model.item_vectors()
        logits = model._logits(users)
        torch.testing.assert_close(model.user_vectors(users) @ w.T + bias, logits, rtol=1e-4, atol=1e-4)
        items = torch.arange(1, 30)
        torch.testing.assert_close(
            model.predict({"user_id": users, "item_id": items}), logits[torch.arange(29), items], rtol=1e-4, atol=1e-4
        )
    before, other, state = model._logits(users), model.other_parameter(), model.state_dict()
    model._next, model._later, model.closed_decay = None, None, None
    assert not torch.allclose(model._logits(users), before)
    model.load_state_dict(state)
    model.load_other_parameter(other)
    torch.testing.assert_close(model._logits(users), before)


def test_such_a_model_is_not_exported_wrongly(walks):
    trainer, _ = train(walks | {"blocks": "closed_form"})
    with pytest.raises(ValueError, match="use_order: false"):
        tables_of(trainer.model.eval())
