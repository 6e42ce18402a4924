"""RecBole's entry points with LLMTwoTower, and with stock models beside it: what goes in, what comes out, what is logged."""

import pickle
import socket
import sys
import types

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import load_data_and_model, run, run_recbole, run_recboles
from recbole.utils import get_model, get_trainer, init_seed
from recbole.utils.case_study import full_sort_scores, full_sort_topk


def prepare(config_dict, model="LLMTwoTower"):
    config = Config(model, "toy", config_dict=dict(config_dict))
    init_seed(config["seed"], config["reproducibility"])
    return config, *data_preparation(config, create_dataset(config))


def train(config_dict):
    """Metrics of a training as run_recbole does it, and its loaders."""
    config, *loaders = prepare(config_dict)
    init_seed(config["seed"], config["reproducibility"])
    model = get_model("LLMTwoTower")(config, loaders[0]._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], "LLMTwoTower")(config, model)
    result = trainer.fit(loaders[0], loaders[1], saved=False, verbose=False)
    return (*result, trainer.evaluate(loaders[2], load_best_model=False)), loaders


# ---------------------------------------------------------------- runs


def test_run_with_one_process_is_run_recbole(run_config):
    once, again = (f("LLMTwoTower", "toy", config_dict=dict(run_config)) for f in (run, run_recbole))
    assert once == again
    assert set(once) == {"best_valid_score", "valid_score_bigger", "best_valid_result", "test_result"}
    assert once["best_valid_score"] == once["best_valid_result"]["ndcg@10"]


def test_run_recboles_in_a_group_of_one_process_comes_to_the_same(run_config):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    results = []
    queue = types.SimpleNamespace(put=results.append)
    group = dict(world_size=1, nproc=1, ip="localhost", port=port, offset=0)
    run_recboles(0, "LLMTwoTower", "toy", None, {"config_dict": {**run_config, **group}, "queue": queue})
    assert not torch.distributed.is_initialized()
    alone = run_recbole("LLMTwoTower", "toy", config_dict=dict(run_config))
    assert results[0]["test_result"] == pytest.approx(alone["test_result"], abs=1e-4)


def test_a_file_a_dictionary_and_the_command_line_overrule_each_other_in_this_order(run_config, tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("epochs: 1\nhistory_dropout: 0.1\nneg_weight: 0.1\nlearning_rate: 0.1\n")
    (tmp_path / "b.yaml").write_text("neg_weight: 0.2\nlearning_rate: 0.2\nhistory_dropout: 0.2\n")
    given = {"learning_rate": 0.3, "history_dropout": 0.3}
    script = tmp_path / "train.py"
    script.write_text("")
    monkeypatch.setattr(sys, "argv", [str(script), "--history_dropout=0.4", "--mine=a=b"])
    config = Config(
        "LLMTwoTower", "toy", ["a.yaml", "b.yaml"], {k: v for k, v in run_config.items() if k != "epochs"} | given
    )
    found = [config[key] for key in ("epochs", "neg_weight", "learning_rate", "history_dropout", "mine")]
    assert found == [1, 0.2, 0.3, 0.4, "a=b"]


# ---------------------------------------------------------------- case study


@pytest.fixture
def split_without_some_users(run_config):
    """With a split over all interactions, some users have none in test."""
    run_config["eval_args"] = {"split": {"RS": [0.97, 0.02, 0.01]}, "group_by": "none"}
    return run_config


@pytest.mark.parametrize("model", ["LLMTwoTower", "BPR", "GRU4Rec"])
def test_case_study_ranks_the_users_of_the_split_and_names_the_others(split_without_some_users, model):
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    if model == "GRU4Rec":  # a sequential model has rows of interactions, not of users
        split_without_some_users |= {"load_col": columns, "train_neg_sample_args": None, "metrics": ["Recall", "NDCG"]}
        split_without_some_users["eval_args"] = {"split": {"RS": [0.97, 0.02, 0.01]}, "group_by": "none", "order": "TO"}
    config, trained, _, test = prepare(split_without_some_users, model)
    network = get_model(model)(config, trained._dataset)
    dataset = test._dataset
    present = np.unique(dataset.inter_feat["user_id"].numpy())
    absent = sorted(set(range(1, dataset.user_num)) - set(present.tolist()))
    assert len(present)
    assert absent
    scores = full_sort_scores(present, network, test, config["device"])
    assert scores.shape[1] == dataset.item_num
    assert len(scores) >= len(present)
    assert torch.isneginf(scores[:, 0]).all()
    value, items = full_sort_topk([int(user) for user in present], network, test, k=3)
    torch.testing.assert_close(scores.gather(1, items), value)
    token = dataset.id2token("user_id", absent[0])
    message = (
        rf"uid_series: 1 of {len(present) + 1} users have no interaction in this split: {absent[0]} \({token}\)\. Give"
    )
    with pytest.raises(ValueError, match=message):
        full_sort_topk([*present, absent[0]], network, test, k=3)
    with pytest.raises(ValueError, match=rf"users have no interaction in this split: 0 .*{10**6} \(no id\)"):
        full_sort_scores([0, 10**6], network, test)


def test_case_study_needs_a_loader_of_the_whole_catalogue(run_config):
    config, trained, valid, _ = prepare(run_config | {"eval_args": {"mode": "uni20"}})
    network = get_model("LLMTwoTower")(config, trained._dataset)
    with pytest.raises(ValueError, match="test_data must be a loader of eval_args mode 'full', got a NegSample"):
        full_sort_topk([1], network, valid, k=3)


# ---------------------------------------------------------------- saved data


@pytest.fixture
def saving(run_config):
    return run_config | {"save_dataset": True, "save_dataloaders": True}


@pytest.fixture
def reading(run_config):
    """The paths of what a run with ``saving`` has saved, which whoever wants it read names."""
    folder = run_config["checkpoint_dir"]
    return {
        "dataset_save_path": f"{folder}/toy-LLMTwoTowerDataset.pth",
        "dataloaders_save_path": f"{folder}/toy-for-LLMTwoTower-dataloader.pth",
    }


def test_a_run_that_saves_its_data_and_one_that_reads_them_come_to_the_same(run_config, saving, reading, tmp_path):
    plain, _ = train(run_config)
    written, loaders = train(saving)
    files = {str(path) for path in (tmp_path / "saved").glob("toy*.pth")}
    assert files == set(reading.values())
    read, read_loaders = train(run_config | reading)
    assert plain == written == read
    assert [type(loader) for loader in read_loaders] == [type(loader) for loader in loaders]


def test_saved_loaders_of_other_rows_or_sizes_are_made_anew(saving, reading):
    _, loaders = train(saving | {"epochs": 1})
    saving |= reading
    changed = saving | {"loss_type": "sampled_bce", "train_batch_size": 16, "epochs": 1}
    _, others = train(changed)
    assert type(loaders[0]).__name__ == "UserRowsDataLoader"
    assert type(others[0]).__name__ == "InteractionRowsDataLoader"
    smaller = prepare(changed | {"eval_batch_size": 100})
    assert len(smaller[2]) > len(others[1])


def test_saved_data_follow_the_present_keys(saving, reading):
    """What the model reads of a saved dataset is what this run says, though the key does not make the file stale."""
    train(saving | {"epochs": 1})
    saving |= reading
    config, trained, _, _ = prepare(saving | {"user_tower": "history+text"})
    assert set(trained._dataset.user_features) == {"text"}
    other = {"split": {"RS": [0.5, 0.25, 0.25]}}
    _, fewer, _, _ = prepare(saving | {"eval_args": other})
    assert len(fewer._dataset) < 0.7 * len(trained._dataset)


@pytest.mark.parametrize("names_them", [True, False])
def test_a_checkpoint_is_read_back_with_saved_data_where_they_are_named(saving, reading, tmp_path, names_them):
    done = run_recbole("LLMTwoTower", "toy", config_dict=dict(saving))
    (path,) = (p for p in (tmp_path / "saved").glob("LLMTwoTower*.pth") if "-last" not in p.name)
    with open(reading["dataset_save_path"], "rb+") as file:
        dataset = pickle.load(file)
        dataset.mark = "saved"
        file.seek(0)
        pickle.dump(dataset, file)
    config, model, dataset, _, _, test = load_data_and_model(str(path), **(reading if names_them else {}))
    assert hasattr(dataset, "mark") == names_them
    trainer = get_trainer(config["MODEL_TYPE"], "LLMTwoTower")(config, model)
    assert trainer.evaluate(test, load_best_model=False) == done["test_result"]


# ---------------------------------------------------------------- logs


def test_tensorboard_gets_losses_and_validation_scores(run_config, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run_recbole("LLMTwoTower", "toy", config_dict=dict(run_config, state="INFO"))
    folders = {path.parent for path in (tmp_path / "log_tensorboard").rglob("events*")}
    tags = {}
    for folder in folders:
        events = accumulator.EventAccumulator(str(folder))
        events.Reload()
        tags |= {tag: len(events.Scalars(tag)) for tag in events.Tags()["scalars"]}
    assert tags["Loss/Train"] == tags["Vaild_score"] == run_config["epochs"]  # RecBole's spelling


@pytest.mark.parametrize("eval_backend", ["streamed", "stock"])
def test_wandb_gets_what_a_stock_model_sends(run_config, monkeypatch, eval_backend):
    calls = {"init": [], "log": [], "define_metric": []}

    def installed():
        module = types.ModuleType("wandb")
        module.run = None

        def init(**arguments):
            calls["init"].append(arguments)
            module.run = types.SimpleNamespace(summary={})

        module.init = init
        module.log = lambda metrics, commit=True: calls["log"].append(metrics)
        module.define_metric = lambda name, step_metric: calls["define_metric"].append(name)
        monkeypatch.setitem(sys.modules, "wandb", module)
        return module

    sent = {}
    for model in ("BPR", "LLMTwoTower"):
        module = installed()
        calls["log"].clear()
        done = run_recbole(model, "toy", config_dict=dict(run_config, log_wandb=True, eval_backend=eval_backend))
        assert module.run.summary == {f"eval/{name}": value for name, value in done["test_result"].items()}
        sent[model] = [set(metrics) for metrics in calls["log"]]
    assert sent["LLMTwoTower"] == sent["BPR"]
    assert sent["BPR"][0] == {"train/epoch", "train/train_loss", "train_step"}
    assert calls["init"][0]["project"] == "recbole"
