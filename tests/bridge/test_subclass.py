"""A subclass of LLMTwoTower is a model like it: by class and by name, with its defaults, trainer, dataset and loaders."""

import sys
from pathlib import Path

import pytest

import recbole_llm

pytest.importorskip("recbole")
import recbole.data.dataset
import recbole.trainer
from recbole.config import Config
from recbole.data.utils import get_dataloader
from recbole.model.general_recommender import BPR
from recbole.utils import get_model, get_trainer

from recbole_llm.bridge import register
from recbole_llm.bridge.dataset import LLMTwoTowerDataset
from recbole_llm.bridge.training.trainer import LLMTwoTowerTrainer
from recbole_llm.checkpoints import newest_checkpoint
from recbole_llm.model import LLMTwoTower


@pytest.fixture(autouse=True)
def registrations(monkeypatch):
    own = {"LLMTwoTower": register._registrations["LLMTwoTower"]}  # whatever other tests of this process registered
    monkeypatch.setattr(register, "_registrations", own)
    yield
    for name in [name for name in sys.modules if name.startswith(f"{register.MODEL_PACKAGE}.own")]:
        del sys.modules[name]


def make(name="OwnTower", base=LLMTwoTower):
    return type(name, (base,), {"__module__": __name__})


def config_of(model, run_config, **changes):
    return Config(model, "toy", config_dict=run_config | changes)


def test_a_class_is_registered_by_being_used(run_config):
    own = make()
    config = config_of(own, run_config)
    assert (config["model"], config.model_class) == ("OwnTower", own)
    assert get_model("OwnTower") is own
    assert config_of("OwnTower", run_config).model_class is own
    base = config_of("LLMTwoTower", run_config)
    same = {key for key in base.final_config_dict if key != "model"}
    assert {key: config[key] for key in same} == {key: base[key] for key in same}


def test_it_inherits_what_recbole_looks_up(run_config):
    recbole_llm.register_model(make())
    config = config_of("OwnTower", run_config)
    assert get_trainer(config["MODEL_TYPE"], "OwnTower") is LLMTwoTowerTrainer
    assert recbole.data.dataset.OwnTowerDataset is LLMTwoTowerDataset
    base = config_of("LLMTwoTower", run_config)
    for phase in ("train", "evaluation"):
        assert get_dataloader(config, phase) is get_dataloader(base, phase)
    found = register.registered("OwnTower")
    assert found.count_flops is False and found.yaml.name == "LLMTwoTower.yaml"
    assert not hasattr(recbole.data.dataset, "OtherDataset")


def test_what_a_subclass_brings_comes_first_and_goes_on(run_config, tmp_path):
    class OwnTrainer(LLMTwoTowerTrainer):
        pass

    (tmp_path / "own.yaml").write_text("embedding_size: 24\n")

    @recbole_llm.register_model(yaml=tmp_path / "own.yaml", trainer=OwnTrainer)
    class OwnFirst(LLMTwoTower):
        pass

    @recbole_llm.register_model
    class OwnSecond(OwnFirst):
        pass

    assert register.registered("OwnSecond").trainer is OwnTrainer
    assert register.registered("OwnSecond").yaml == Path(tmp_path / "own.yaml")
    assert register.registered("OwnSecond").dataset == register.registered("LLMTwoTower").dataset
    bare = {key: value for key, value in run_config.items() if key != "embedding_size"}
    assert config_of(OwnSecond, bare)["embedding_size"] == 24


def test_by_a_path_nothing_is_imported_until_it_is_needed(run_config, monkeypatch, tmp_path):
    (tmp_path / "own_module.py").write_text("import recbole_llm\nclass OwnLate(recbole_llm.LLMTwoTower):\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    recbole_llm.register_model("OwnLate", "own_module:OwnLate")
    assert "own_module" not in sys.modules
    assert register.our_models() == ["LLMTwoTower"]
    assert register.is_ours("OwnLate")
    assert get_trainer(None, "OwnLate") is LLMTwoTowerTrainer
    sys.modules.pop("own_module")


def test_a_cell_that_runs_again_replaces_the_class(run_config):
    first, second = make(), make()
    assert config_of(first, run_config).model_class is first
    assert get_model("OwnTower") is first
    config_of(second, run_config)
    assert get_model("OwnTower") is second
    recbole_llm.register_model(first)
    assert get_model("OwnTower") is first


def test_a_subclass_of_a_stock_model_runs_by_class_too(run_config):
    own = make("OwnBPR", BPR)
    config = Config(own, "toy", config_dict={"data_path": run_config["data_path"], "gpu_id": ""})
    assert get_model(config["model"]) is own and not register.is_ours("OwnBPR")
    assert register.registered("OwnBPR").trainer is None


def test_ours_are_those_that_derive_from_llmtwotower():
    recbole_llm.register_model(make())
    recbole_llm.register_model(make("OwnBPR", BPR))
    assert register.our_models() == ["LLMTwoTower", "OwnTower"]
    assert register.is_ours("OwnTower") and not register.is_ours("OwnBPR") and not register.is_ours("nothing")


def test_the_newest_checkpoint_is_of_a_registered_subclass_too(tmp_path):
    import os

    for at, name in enumerate(("LLMTwoTower-a.pth", "OwnTower-b.pth", "OwnTower-c-last.pth", "BPR-d.pth"), 1):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (at, at))
    assert newest_checkpoint(tmp_path).name == "LLMTwoTower-a.pth"
    recbole_llm.register_model(make())
    assert newest_checkpoint(tmp_path).name == "OwnTower-b.pth"


def test_mistakes():
    other = type("LLMTwoTower", (LLMTwoTower,), {"__module__": __name__})
    with pytest.raises(ValueError, match="'LLMTwoTower' is the model of recbole-llm"):
        recbole_llm.register_model(other)
    with pytest.raises(ValueError, match="loader: give the class of 'OwnTower'"):
        recbole_llm.register_model("OwnTower")
    with pytest.raises(ValueError, match="loader is given beside the class OwnTower"):
        recbole_llm.register_model(make(), make())
    assert get_model("LLMTwoTower") is LLMTwoTower
    assert recbole_llm.register_model(make()) is not None


def test_a_checkpoint_of_a_class_that_nobody_can_import_is_written_and_read(run_config, tmp_path):
    """Such as one of a notebook: its base is in the pickled configuration, its name beside it."""
    import torch

    from recbole_llm.bridge.checkpoint import read_checkpoint, write_checkpoint

    own = make()
    config = config_of(own, run_config)
    write_checkpoint(tmp_path / "a.pth", {"settings": {"model": config["model"]}}, config)
    assert config.model_class is own
    assert read_checkpoint(tmp_path / "a.pth")["settings"]["model"] == "OwnTower"
    there = torch.load(tmp_path / "a.pth", weights_only=False)["config"]
    assert there.model_class is LLMTwoTower and there["model"] == "OwnTower"
    main = type("OwnMain", (LLMTwoTower,), {"__module__": "__main__"})
    vars(sys.modules["__main__"])["OwnMain"] = main
    try:
        write_checkpoint(tmp_path / "b.pth", {}, config_of(main, run_config))
    finally:
        del vars(sys.modules["__main__"])["OwnMain"]
    assert torch.load(tmp_path / "b.pth", weights_only=False)["config"].model_class is LLMTwoTower
