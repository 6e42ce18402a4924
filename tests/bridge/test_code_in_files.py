"""No file that a run meets runs code: not what lies where RecBole would look, not weights, not a search space.

Every attack here makes a folder ``ran...`` if it succeeds.
"""

import datetime
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import load_data_and_model, run_recbole
from recbole.utils import get_model

from recbole_llm import cli

ROOT = Path(__file__).resolve().parents[2]


class Harmful:
    """Makes a folder where it is unpickled."""

    def __init__(self, folder="ran"):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def none_ran(folder):
    return not list(Path(folder).glob("ran*"))


def one_line(captured):
    """The message of a command that failed, which has no traceback."""
    assert "Traceback" not in captured.err, captured.err
    (line,) = [line for line in captured.err.splitlines() if line.startswith("recbole-llm: error: ")]
    return line


# ---------------------------------------------------------------- pickles


def stock(run_config, **changes):
    return {key: run_config[key] for key in ("data_path", "checkpoint_dir", "gpu_id", "show_progress", "state")} | {
        "epochs": 1,
        "embedding_size": 8,
        **changes,
    }


@pytest.mark.parametrize("model", ["LLMTwoTower", "BPR", "Pop", "GRU4Rec"])
def test_a_file_by_convention_is_named_and_not_read(run_config, tmp_path, model, caplog):
    given = stock(run_config, encoder="", state="INFO")
    if model == "GRU4Rec":
        given |= {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "train_neg_sample_args": None}
    saved = tmp_path / "saved"
    saved.mkdir()
    kind = {"LLMTwoTower": "LLMTwoTowerDataset", "GRU4Rec": "SequentialDataset"}.get(model, "Dataset")
    files = [saved / f"toy-{kind}.pth", saved / f"toy-for-{model}-dataloader.pth"]
    for number, file in enumerate(files):
        file.write_bytes(pickle.dumps(Harmful(tmp_path / f"ran{number}")))
    config = Config(model, "toy", config_dict=given)
    with caplog.at_level(logging.INFO):
        train, *_ = data_preparation(config, create_dataset(config))
    assert none_ran(tmp_path) and len(train._dataset)
    said = [record.getMessage() for record in caplog.records if "nobody named it" in record.getMessage()]
    assert [line.split(" ")[0] for line in said] == [str(file) for file in files]
    assert "dataset_save_path=" in said[0] and "dataloaders_save_path=" in said[1]


@pytest.mark.parametrize("how", ["config_dict", "config file", "command line"])
def test_a_path_that_the_caller_gives_is_read(run_config, tmp_path, monkeypatch, how):
    given = stock(run_config)
    first = create_dataset(Config("BPR", "toy", config_dict=dict(given, save_dataset=True)))
    first.mark = "of the first run"
    file = tmp_path / "kept by me.pth"
    file.write_bytes(pickle.dumps(first))
    files, argv = [], ["train.py"]
    if how == "config_dict":
        given["dataset_save_path"] = str(file)
    elif how == "config file":
        (tmp_path / "a.yaml").write_text(f"dataset_save_path: {file}\n")
        files = [str(tmp_path / "a.yaml")]
    else:
        (tmp_path / "train.py").write_text("")
        argv = [str(tmp_path / "train.py"), f"--dataset_save_path={file}"]
    monkeypatch.setattr("sys.argv", argv)
    assert create_dataset(Config("BPR", "toy", files, given)).mark == "of the first run"


def test_a_path_that_is_not_there_or_of_other_settings_is_said(run_config, tmp_path, caplog):
    given = stock(run_config, state="INFO")
    create_dataset(Config("BPR", "toy", config_dict=dict(given, save_dataset=True)))
    given["dataset_save_path"] = f"{run_config['checkpoint_dir']}/toy-Dataset.pth"
    with caplog.at_level(logging.WARNING):
        create_dataset(Config("BPR", "toy", config_dict=given))
        assert caplog.text == ""
        create_dataset(Config("BPR", "toy", config_dict=given | {"seed": 7}))
        assert "was saved under other settings and is not used" in caplog.text
        create_dataset(Config("BPR", "toy", config_dict=given | {"dataset_save_path": "nowhere.pth"}))
        assert "dataset_save_path: nowhere.pth does not exist" in caplog.text


@pytest.mark.parametrize("model", ["LLMTwoTower", "BPR"])
def test_load_data_and_model_follows_no_path_of_the_checkpoint(run_config, tmp_path, model):
    """Named by the run, and swapped afterwards: the caller has named the checkpoint and nothing else."""
    named = {key: str(tmp_path / f"{key}.pth") for key in ("dataset_save_path", "dataloaders_save_path")}
    done = run_recbole(model, "toy", config_dict=stock(run_config, encoder="", **named))
    for key, file in named.items():
        Path(file).write_bytes(pickle.dumps(Harmful(tmp_path / f"ran-{key}")))
    (file,) = (p for p in (tmp_path / "saved").glob(f"{model}*.pth") if "-last" not in p.name)
    config, *_ = load_data_and_model(str(file))
    assert none_ran(tmp_path)
    assert config["dataset_save_path"] is None and done["test_result"]


# ---------------------------------------------------------------- weights and arrays


def test_pretrained_weights_are_read_as_tensors(run_config, tmp_path):
    """ConvNCF from a checkpoint of RecBole's BPR, whose Config is not made again; and from one that would run code."""
    given = stock(run_config)
    run_recbole("BPR", "toy", config_dict=dict(given))
    (file,) = (tmp_path / "saved").glob("BPR*.pth")
    weights = torch.load(file, weights_only=False)["state_dict"]
    shape = dict(cnn_channels=[1, 4, 4, 4], cnn_kernels=[2, 2, 2], cnn_strides=[2, 2, 2])
    given |= {"train_method": "after_pretrain", "pre_model_path": str(file), **shape}
    config = Config("ConvNCF", "toy", config_dict=given)
    train, *_ = data_preparation(config, create_dataset(config))
    model = get_model("ConvNCF")(config, train._dataset)
    for name in ("user_embedding.weight", "item_embedding.weight"):
        assert torch.equal(model.state_dict()[name], weights[name])

    torch.save({"config": Harmful(tmp_path / "ran"), "state_dict": weights}, file, pickle_protocol=4)
    assert torch.equal(
        get_model("ConvNCF")(config, train._dataset).item_embedding.weight, weights["item_embedding.weight"]
    )
    torch.save({"state_dict": Harmful(tmp_path / "ran")}, file)
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        get_model("ConvNCF")(config, train._dataset)
    file.write_bytes(pickle.dumps(Harmful(tmp_path / "ran")))
    with pytest.raises(ValueError, match="its tensors cannot be read"):
        get_model("ConvNCF")(config, train._dataset)
    assert none_ran(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_load_tensors_gives_what_torch_gives(tmp_path, protocol):
    from recbole_llm.bridge.repairs.files import Inert, load_tensors

    w = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3).half())
    content = {"w": w, "part": w[:, 1].detach(), "list": [1, 2.5, "x", None, True], "size": w.shape}
    content |= {
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "best": np.float64(2),
        "own": Harmful(tmp_path / "ran"),
    }
    torch.save(content, tmp_path / "x.pth", pickle_protocol=protocol)
    found = load_tensors(torch.load, str(tmp_path / "x.pth"), map_location="cpu")
    assert found.keys() == content.keys() and none_ran(tmp_path)
    assert (
        torch.equal(found["w"], w) and found["w"].dtype == torch.float16 and torch.equal(found["part"], content["part"])
    )
    for name in ("list", "size", "dtype", "device"):
        assert found[name] == content[name]
    assert isinstance(found["own"], Inert)
    with pytest.raises(FileNotFoundError):
        load_tensors(torch.load, str(tmp_path / "nowhere.pth"))


def test_item_embeddings_of_ldiffrec_are_numbers(tmp_path):
    import recbole.model.general_recommender.ldiffrec as module

    table = np.random.default_rng(0).standard_normal((4, 3))
    np.save(tmp_path / "item_emb.npy", table)
    np.testing.assert_array_equal(module.np.load(tmp_path / "item_emb.npy", allow_pickle=True), table)
    objects = np.empty(1, object)
    objects[0] = Harmful(tmp_path / "ran")
    np.save(tmp_path / "item_emb.npy", objects, allow_pickle=True)
    with pytest.raises(ValueError, match=r"item_emb\.npy: .*Save it anew with np\.save"):
        module.np.load(str(tmp_path / "item_emb.npy"), allow_pickle=True)
    assert none_ran(tmp_path)


# ---------------------------------------------------------------- expressions


@pytest.mark.parametrize(
    "expression", ["[__import__('os').mkdir('ran')]", "exec('')", "range(3)", "3", "[]", "", "[a]"]
)
def test_a_search_space_is_read_as_literals(tmp_path, monkeypatch, capsys, expression):
    pytest.importorskip("hyperopt")
    monkeypatch.chdir(tmp_path)
    Path("a.hyper").write_text(f"learning_rate choice {expression or '()'}\n")
    assert cli.main(["tune", "-m", "EASE", "-d", "ml-100k", "--params_file", "a.hyper", "--output", "out"]) == 2
    assert "the values of a choice are a list in brackets" in one_line(capsys.readouterr())
    assert none_ran(tmp_path)


def test_every_search_space_of_ours_says_what_it_said():
    """Literals are what an evaluation gave."""
    pytest.importorskip("hyperopt")
    from recbole.trainer import HyperTuning

    files = sorted((ROOT / "configs").rglob("*.hyper"))
    assert len(files) > 5
    for file in files:
        lines = [line.split(" ", 2) for line in file.read_text().splitlines() if len(line.split(" ")) > 2]
        space = HyperTuning._build_space_from_file(str(file))
        assert space.keys() == {name for name, *_ in lines}
        for name, kind, text in lines:
            if kind == "choice":
                values = [each.eval() if hasattr(each, "eval") else each for each in space[name].pos_args[1:]]
                found = [plain(value) for value in values]
                assert found == [list(v) if isinstance(v, tuple) else v for v in eval(text)], (file, name)


def plain(node):
    """The value of a node of hyperopt's space."""
    if getattr(node, "name", "") == "pos_args":
        return [plain(part) for part in node.pos_args]
    return node.obj if hasattr(node, "obj") else node


@pytest.mark.parametrize("teacher", ["CrossNet", "CIN"])
def test_teachers_of_kd_dagfm_are_found_by_name(run_config, teacher):
    columns = {"inter": ["user_id", "item_id", "rating"], "item": ["item_id", "year"]}
    given = stock(
        run_config, load_col=columns, threshold={"rating": 3}, metrics=["AUC"], valid_metric="AUC", teacher=teacher
    )
    config = Config("KD_DAGFM", "toy", config_dict=given)
    train, *_ = data_preparation(config, create_dataset(config))
    assert type(get_model("KD_DAGFM")(config, train._dataset).teacher_network).__name__ == teacher
    config["teacher"] = "__import__('os').mkdir('ran') or CrossNet"
    with pytest.raises(ValueError, match="teacher must be one of DAGFM, CrossNet, CIN, got"):
        get_model("KD_DAGFM")(config, train._dataset)
    assert none_ran(".")


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [ran]",
        "!!python/object/new:os.mkdir [ran]",
        "!!python/name:os.mkdir",
        "!!python/module:os",
        "!unknown 3",
    ],
)
def test_a_configuration_file_holds_plain_values(run_config, capsys, tag):
    Path("a.yaml").write_text(f"epochs: 1\nnote: {tag}\n")
    assert cli.main(["run", "-m", "BPR", "-d", "toy", "--config_files", "a.yaml"]) == 2
    assert "line 2" in one_line(capsys.readouterr())
    assert none_ran(".")


def test_plain_values_of_a_configuration_file_are_read_as_before(run_config):
    Path("a.yaml").write_text("a: 1e-3\nb: 1.5\nc: 1_000\nd: .5\ne: [1, x, ~]\nf: {g: on}\nh: 2024-01-02\ni: '3'\n")
    config = Config("BPR", "toy", ["a.yaml"], stock(run_config))
    found = {key: config[key] for key in "abcdefhi"}
    date = datetime.date(2024, 1, 2)
    assert found == {
        "a": 1e-3,
        "b": 1.5,
        "c": 1000,
        "d": 0.5,
        "e": [1, "x", None],
        "f": {"g": True},
        "h": date,
        "i": "3",
    }
