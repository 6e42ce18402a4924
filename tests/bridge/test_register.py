"""A registered model works like a stock one in every entry point of RecBole; LLMTwoTower is one."""

import copy
import pickle
import sys
from logging import getLogger
from pathlib import Path

import pytest

import recbole_llm

pytest.importorskip("recbole")
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataloader import FullSortEvalDataLoader, TrainDataLoader
from recbole.data.dataset import Dataset
from recbole.data.transform import construct_transform
from recbole.data.utils import get_dataloader
from recbole.model.general_recommender import BPR
from recbole.quick_start import load_data_and_model, objective_function, run, run_recbole
from recbole.trainer import Trainer
from recbole.utils import dataset_arguments, get_flops, get_model, get_trainer

from recbole_llm.bridge import register
from recbole_llm.bridge.options import DATASET_KEYS


class OwnModel(BPR):
    """A model of a user's, which RecBole may not copy."""

    def __deepcopy__(self, memo):
        raise RuntimeError("copied")


class OwnTrainer(Trainer):
    pass


class OwnDataset(Dataset):
    pass


class OwnLoader(TrainDataLoader):
    pass


def choose_loader(config):
    return OwnLoader if config["own_rows"] else None


@pytest.fixture(autouse=True)
def registrations(monkeypatch):
    """Registrations made by a test end with it."""
    monkeypatch.setattr(register, "_registrations", dict(register._registrations))
    yield
    for name in [name for name in sys.modules if name.startswith(f"{register.MODEL_PACKAGE}.own")]:
        del sys.modules[name]


@pytest.fixture
def own(tmp_path):
    defaults = tmp_path / "OwnModel.yaml"
    defaults.write_text("embedding_size: 7\nepochs: 2\nown_rows: True\nlearning_rate: 0.01\n")
    recbole_llm.register_model(
        "OwnModel",
        OwnModel,
        defaults,
        lambda: OwnTrainer,
        lambda: OwnDataset,
        train_dataloader=choose_loader,
        count_flops=False,
    )
    return "OwnModel"


@pytest.fixture
def settings(toy_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quiet = {"show_progress": False, "state": "ERROR", "gpu_id": "", "checkpoint_dir": str(tmp_path / "saved")}
    return {"data_path": str(toy_path), **quiet}


def test_every_lookup_finds_what_was_registered(own, settings):
    config = Config(own, "toy", config_dict=settings)
    assert config.model_class is get_model(own) is OwnModel
    assert get_trainer(config["MODEL_TYPE"], own) is OwnTrainer
    dataset = create_dataset(config)
    assert type(dataset) is OwnDataset
    train, valid, _ = data_preparation(config, dataset)
    assert type(train) is OwnLoader
    assert type(valid) is FullSortEvalDataLoader


def test_a_stock_model_is_looked_up_as_before(own, settings):
    config = Config("BPR", "toy", config_dict={**settings, "own_rows": True})
    assert config.model_class is get_model("BPR") is BPR
    assert get_trainer(config["MODEL_TYPE"], "BPR") is Trainer
    assert type(create_dataset(config)) is Dataset
    assert get_dataloader(config, "train") is TrainDataLoader


def test_the_stock_loader_is_taken_where_the_model_chooses_none(own, settings):
    config = Config(own, "toy", config_dict={**settings, "own_rows": False})
    assert get_dataloader(config, "train") is TrainDataLoader
    with pytest.raises(ValueError, match="phase"):
        get_dataloader(config, "training")


def test_the_model_runs_by_name_and_by_class_through_every_function(own, settings):
    results = [
        run_recbole(own, "toy", config_dict=dict(settings)),
        run_recbole(OwnModel, "toy", config_dict=dict(settings)),
        run(own, "toy", config_dict=dict(settings)),
        run(OwnModel, "toy", config_dict=dict(settings)),
        objective_function({**settings, "model": own, "dataset": "toy"}),
        recbole_llm.objective_function({**settings, "model": own, "dataset": "toy"}),
    ]
    assert results[0]["test_result"]["ndcg@10"] > 0
    assert all(r["test_result"] == results[0]["test_result"] for r in results)


def test_a_checkpoint_is_loaded_and_training_resumed(own, settings, tmp_path):
    run_recbole(own, "toy", config_dict=dict(settings))
    (file,) = (tmp_path / "saved").glob("OwnModel-*.pth")
    config, model, dataset, train, valid, _ = load_data_and_model(file)
    assert (type(model), type(dataset), type(train), config["embedding_size"]) == (OwnModel, OwnDataset, OwnLoader, 7)
    state = torch.load(file, weights_only=False)["state_dict"]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    config["epochs"] = 4
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.resume_checkpoint(file)
    epochs = []
    trainer.fit(train, valid, saved=False, show_progress=False, callback_fn=lambda epoch, _: epochs.append(epoch))
    assert epochs == list(range(trainer.start_epoch, 4))
    assert trainer.start_epoch in (1, 2)


def test_defaults_take_the_models_place_in_the_order_of_precedence(own, settings, tmp_path, monkeypatch):
    (tmp_path / "file.yaml").write_text("embedding_size: 8\nlearning_rate: 0.02\n")
    stock = Config("BPR", "ml-100k")
    alone = Config(own, "ml-100k")
    assert (alone["epochs"], alone["embedding_size"], alone["train_batch_size"]) == (2, 7, stock["train_batch_size"])
    assert alone["load_col"] == stock["load_col"] == {"inter": ["user_id", "item_id", "rating", "timestamp"]}
    given = Config(own, "ml-100k", [str(tmp_path / "file.yaml")], {"embedding_size": 9})
    assert (given["epochs"], given["learning_rate"], given["embedding_size"]) == (2, 0.02, 9)
    monkeypatch.setattr(sys, "argv", ["recbole-llm", "--embedding_size=10"])
    assert Config(own, "ml-100k", None, {"embedding_size": 9})["embedding_size"] == 10


def test_a_default_that_recbole_would_overwrite_is_an_error(tmp_path):
    defaults = tmp_path / "OwnModel.yaml"
    defaults.write_text("epochs: 2\nseq_len: {title: 5}\nload_col: ~\n")
    recbole_llm.register_model("OwnModel", OwnModel, defaults)
    with pytest.raises(ValueError, match=r"OwnModel.yaml sets load_col, seq_len, which .*sample.yaml overwrites"):
        Config("OwnModel", "ml-100k")


def test_the_model_is_not_copied_to_count_its_flops(own, settings):
    config = Config(own, "toy", config_dict=settings)
    dataset = create_dataset(config)
    train, *_ = data_preparation(config, dataset)
    model = OwnModel(config, train._dataset)
    arguments = (dataset, "cpu", getLogger(), construct_transform(config))
    assert get_flops(model, *arguments) != get_flops(model, *arguments)  # not a number
    recbole_llm.register_model(own, OwnModel)
    with pytest.raises(RuntimeError, match="copied"):
        get_flops(model, *arguments)


def test_a_saved_dataset_is_stale_when_a_key_of_ours_changed(own, settings):
    assert set(DATASET_KEYS) <= set(dataset_arguments)
    key = DATASET_KEYS[0]
    first = create_dataset(Config(own, "toy", config_dict={**settings, key: ["a"], "save_dataset": True}))
    first.mark = "saved"
    first.save()
    named = {**settings, "dataset_save_path": f"{settings['checkpoint_dir']}/toy-{type(first).__name__}.pth"}
    again = create_dataset(Config(own, "toy", config_dict={**named, key: ["a"]}))
    assert again.mark == "saved"
    changed = create_dataset(Config(own, "toy", config_dict={**named, key: ["b"]}))
    assert not hasattr(changed, "mark")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Own Model", "x:y"), "name must be a class name, got 'Own Model'"),
        (("OtherName", OwnModel), "'OwnModel', got 'OtherName'"),
        (("BPR", "x:y"), "RecBole has a model 'BPR'"),
        (("bpr", "x:y"), "RecBole has a model 'bpr'"),
        (("OwnModel", OwnModel, "absent.yaml"), "yaml: absent.yaml does not exist"),
    ],
)
def test_a_wrong_registration_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        recbole_llm.register_model(*arguments)


def test_a_target_that_is_not_there_is_an_error_and_never_the_stock_class(settings):
    recbole_llm.register_model("OwnModel", OwnModel, trainer="os:absent", dataset="os:absent")
    config = Config("OwnModel", "toy", config_dict=settings)
    for look in (lambda: get_trainer(config["MODEL_TYPE"], "OwnModel"), lambda: create_dataset(config)):
        with pytest.raises(ImportError, match="os:absent cannot be imported"):
            look()


def test_llmtwotower_is_found_by_every_name():
    import recbole.data.dataset
    import recbole.model.general_recommender.llmtwotower as by_module
    import recbole.trainer
    from recbole.model.general_recommender import LLMTwoTower as ByPackage

    from recbole_llm.bridge.dataset import LLMTwoTowerDataset
    from recbole_llm.bridge.training.trainer import LLMTwoTowerTrainer
    from recbole_llm.model import LLMTwoTower

    assert LLMTwoTower is get_model("LLMTwoTower") is by_module.LLMTwoTower is ByPackage is recbole_llm.LLMTwoTower
    assert recbole.trainer.LLMTwoTowerTrainer is LLMTwoTowerTrainer
    assert recbole.data.dataset.LLMTwoTowerDataset is LLMTwoTowerDataset
    assert not hasattr(recbole.data.dataset, "BPRDataset")


def test_llmtwotower_by_name_and_by_class_is_one_configuration():
    from recbole_llm.model import LLMTwoTower

    by_name, by_class = (Config(model, "ml-100k") for model in ("LLMTwoTower", LLMTwoTower))
    assert by_name.model_class is by_class.model_class is LLMTwoTower
    assert by_name.final_config_dict == by_class.final_config_dict
    text = (Path(recbole_llm.__file__).parent / "properties" / "LLMTwoTower.yaml").read_text()
    assert f"\nembedding_size: {by_name['embedding_size']} " in text
    twin = pickle.loads(pickle.dumps(by_name))
    assert twin.model_class is LLMTwoTower


def test_registering_a_model_imports_nothing(monkeypatch):
    recbole_llm.register_model("OwnLazy", "no_such_module:OwnLazy")
    assert "OwnLazy" in register.registered_models()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        get_model("OwnLazy")


def test_a_loader_may_be_a_function_and_is_called_when_needed():
    called = []
    recbole_llm.register_model("OwnModel", lambda: called.append(1) or OwnModel)
    assert called == []
    assert get_model("OwnModel") is OwnModel
    assert copy.copy(called) == [1]


def test_a_module_whose_registration_is_gone_is_not_used_again(monkeypatch):
    """A registration that was taken back leaves its module in sys.modules; the next class of that name gets its own."""
    from recbole.utils import get_model

    def subclass():
        return type("TakenBack", (recbole_llm.LLMTwoTower,), {})

    with monkeypatch.context() as context:
        context.setattr(register, "_registrations", dict(register._registrations))
        first = recbole_llm.register_model(subclass())
        assert get_model("TakenBack") is first
    second = recbole_llm.register_model(subclass())
    assert get_model("TakenBack") is second
