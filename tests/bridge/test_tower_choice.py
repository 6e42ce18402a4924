"""A run that chooses how its towers are trained: what a person set stays, and checkpoints, resumes and refits repeat the choice."""

import math

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import load_data_and_model
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.bridge.checkpoint import last_file, read_checkpoint
from recbole_llm.bridge.training import tower_choice
from recbole_llm.bridge.training.choices import read_choices
from recbole_llm.bridge.training.tower_choice import patience
from recbole_llm.checkpoints import load_trained
from recbole_llm.fitting.tower_choice import TowerChoice

BEST = TowerChoice("catalog_ce", "cosine", 10.0, True, True)


def build(settings):
    config = Config(model="LLMTwoTower", dataset="toy", config_dict=dict(settings))
    init_seed(config["seed"], True)
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], True)
    model = get_model(config["model"])(config, train._dataset)
    return get_trainer(config["MODEL_TYPE"], config["model"])(config, model), train, valid, test


@pytest.fixture
def many(monkeypatch):
    """The toy's items are many; which ways were offered."""
    monkeypatch.setattr(tower_choice, "MANY_ITEMS", 10)
    offered, choose = [], tower_choice.choose_towers
    monkeypatch.setattr(
        tower_choice, "choose_towers", lambda ways, *more: (offered.append(ways), choose(ways, *more))[1]
    )
    return offered


@pytest.fixture
def taken(many, monkeypatch):
    """The cosine over cross-entropy wins, if it is offered."""
    monkeypatch.setattr(tower_choice, "choose_towers", lambda ways, *more: (many.append(ways), ways[0])[1])
    return many


@pytest.fixture
def quick(run_config):
    return run_config | {"epochs": 3}


def test_few_items_are_trained_as_the_options_say(quick, monkeypatch):
    monkeypatch.setattr(tower_choice, "choose_towers", None)  # not called
    trainer, train, valid, _ = build(quick)
    trainer.fit(train, valid, verbose=False)
    assert trainer.model.tower_choice is None and not trainer.model.towers.target.adapters
    assert read_choices(trainer.saved_model_file).towers is None


def test_a_checkpoint_holds_the_choice_and_loads_as_the_model_that_was_trained(quick, taken, paths):
    trainer, train, valid, test = build(quick)
    trainer.fit(train, valid, verbose=False)
    assert len(taken) == 1 and len(taken[0]) == 3
    model = trainer.model
    assert model.tower_choice == BEST and model.towers.cosine and model.loss.options.loss_type == "catalog_ce"
    assert any(parameter is model.target_tower.adapters["text"].weight for parameter in trainer._parameters)
    assert read_choices(trainer.saved_model_file).towers == BEST
    users = torch.arange(1, model.n_users)
    trainer.evaluate(test)  # the best state
    expected = model.scores(users)
    loaded, _ = load_trained(trainer.saved_model_file, **paths)
    assert torch.equal(loaded.scores(users), expected)
    assert loaded.tower_choice == BEST and loaded.towers.cosine
    assert torch.equal(loaded.towers.block().target, model.towers.block().target)
    _, stock, *_ = load_data_and_model(trainer.saved_model_file)
    assert torch.equal(stock.scores(users), expected)


@pytest.mark.parametrize("seconds", [0, 1e9])
def test_a_resumed_run_equals_one_that_was_left_alone(quick, taken, seconds, tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_llm.bridge.training.trainer.SECONDS_BETWEEN_CHECKPOINTS", seconds)
    whole, train, valid, test = build(quick)
    expected = whole.fit(train, valid, verbose=False), whole.evaluate(test)
    first, train, valid, test = build(quick | {"checkpoint_dir": str(tmp_path / "stopped")})

    def stop(done, score):
        if done == 1:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        first.fit(train, valid, verbose=False, callback_fn=stop)
    last = last_file(first.saved_model_file)
    assert read_checkpoint(last)["other_parameter"]["towers"] == BEST.to_state()
    second, train, valid, test = build(quick | {"checkpoint_dir": str(tmp_path / "stopped"), "resume_from": last})
    count = len(taken)
    found = second.fit(train, valid, verbose=False), second.evaluate(test)
    assert len(taken) == count, "what was chosen is not chosen again"
    assert found == expected
    assert second.train_loss_dict == whole.train_loss_dict
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_final_fit_repeats_the_choice(quick, taken):
    trainer, train, valid, _ = build(quick)
    trainer.fit(train, valid, verbose=False)
    settings = quick | {"refit_rows": "valid", "refit_from": trainer.saved_model_file}
    again, train, valid, _ = build(settings)
    count = len(taken)
    again.fit(train, valid, verbose=False)
    assert len(taken) == count
    block = read_choices(trainer.saved_model_file).block("learned")
    assert again.model.tower_choice == BEST
    assert block is None or again.model.towers.cosine


@pytest.mark.parametrize(
    "given",
    [
        {"loss_type": "catalog_bce"},
        {"scoring": "dot"},
        {"tower_features": False},
        {"neg_weight": 0.5},
        {"tower_features": True, "scoring": "cosine", "scale_init": 2.0, "loss_type": "catalog_bce"},
    ],
    ids=str,
)
def test_what_a_person_set_is_never_changed(quick, many, given):
    trainer, train, valid, _ = build(quick | given | {"epochs": 1})
    trainer.fit(train, valid, verbose=False)
    (ways,) = many
    assert all(getattr(way, key) == value for way in ways for key, value in given.items() if hasattr(way, key))
    if "neg_weight" in given:
        assert {way.loss_type for way in ways} == {"catalog_bce"}
    model = trainer.model
    assert model.loss.options.loss_type == given.get("loss_type", model.loss.options.loss_type)
    assert model.towers.options.scoring == given.get("scoring", model.towers.options.scoring)
    assert bool(model.towers.target.adapters) == given.get("tower_features", bool(model.towers.target.adapters))


def test_losses_over_samples_and_shards_are_not_tried(quick, many):
    trainer, train, valid, _ = build(quick | {"loss_type": "sampled_bce", "epochs": 1})
    trainer.fit(train, valid, verbose=False)
    assert not many and trainer.model.tower_choice is None


def test_large_catalogues_wait_for_a_few_validations_alone(quick, many):
    trainer, train, _, _ = build({key: value for key, value in quick.items() if key != "stopping_step"})
    assert patience(trainer, 1000) == tower_choice.PATIENCE_OF_MANY
    assert patience(trainer, 20) == 5
    given, *_ = build(quick | {"stopping_step": 9})
    assert patience(given, 1000) == 9
    tower_choice.MANY_ITEMS = 1000  # the fixture puts it back
    assert patience(trainer, 1000) == 15
    assert patience(trainer, 5) == math.ceil(100 / 5)


@pytest.mark.parametrize("saved", [True, False])
def test_the_learned_block_is_that_of_its_best_epoch(quick, saved, monkeypatch):
    """Also where no checkpoint is written, as in a search of settings."""
    trainer, train, valid, _ = build(quick | {"epochs": 4})
    states, values = [], iter([0.2, 0.4, 0.3, 0.1, 0.5])
    monkeypatch.setattr(trainer, "_valid_epoch", lambda *a, **k: (next(values), {}))
    monkeypatch.setattr("recbole_llm.bridge.training.trainer.dict2str", str)
    seen = []

    def callback(epoch, value):
        seen.append((epoch, value))
        states.append(trainer.model.target_tower.id.weight.clone())

    trainer.fit(train, valid, verbose=False, saved=saved, callback_fn=callback)
    assert seen == [(0, 0.2), (1, 0.4), (2, 0.3), (3, 0.1)]
    assert torch.equal(trainer.model.target_tower.id.weight, states[1])
    assert not torch.equal(states[3], states[1])
    assert trainer.model.chosen.epochs == 2
