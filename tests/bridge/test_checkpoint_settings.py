"""What a checkpoint says is data: of LLMTwoTower, an allow-list of settings, and no path.

Every attack here makes a folder ``ran...`` if it succeeds.
"""

import logging
import os
import pickle
import shlex
from pathlib import Path

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole
from recbole.utils import argument_list

from recbole_llm import cli
from recbole_llm.bridge import checkpoint
from recbole_llm.bridge.checkpoint import FORMAT, read_checkpoint, settings_for_resume
from recbole_llm.bridge.options import OWN_KEYS
from recbole_llm.recommend import open_model


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


@pytest.fixture
def trained(run_config):
    """The last-epoch file of a short run, and the paths that a resume is given again, as options."""
    quick = run_config | {"encoder": "", "epochs": 2}
    run_recbole("LLMTwoTower", "toy", config_dict=dict(quick))
    (last,) = Path(run_config["checkpoint_dir"]).glob("*-last.pth")
    return last, [f"--data_path={run_config['data_path']}"]


def rewritten(file, model=None, dataset=None, **given):
    """The checkpoint with other settings, as somebody else might have written it."""
    content = read_checkpoint(file)
    settings = content["settings"]
    settings["model"], settings["dataset"] = model or settings["model"], dataset or settings["dataset"]
    settings["given"] |= given
    torch.save(content, file)
    return file


@pytest.mark.parametrize("model", ["KD_DAGFM", "BPR", "NeuMF", "OwnTower", "../LLMTwoTower"])
def test_a_resume_takes_no_other_model(trained, capsys, model):
    last, paths = trained
    rewritten(last, model, teacher="__import__('os').mkdir('ran') or CrossNet")
    assert cli.main(["run", "--resume", str(last), *paths]) == 2
    assert f"is of '{model}'; LLMTwoTower's alone are read" in one_line(capsys.readouterr())
    assert none_ran(".")


def test_a_resume_takes_no_path_and_no_key_but_its_own(trained, caplog):
    last, paths = trained
    strange = {
        "dataset_save_path": "a.pth",
        "dataloaders_save_path": "b.pth",
        "mf_pretrain_path": "c.pth",
        "pre_model_path": "d.pth",
        "warm_up": "e.pth",
        "teacher": "f()",
        "trust_remote_code": True,
        "encoder_trust_remote_code": True,
        "save_dataset": True,
        "log_wandb": True,
        "nobody_knows": 1,
    }
    rewritten(last, checkpoint_dir="/somewhere/else", item_features_file="", **strange)
    with caplog.at_level(logging.WARNING):
        model, dataset, given = settings_for_resume(last, {"data_path"})
    assert (model, dataset) == ("LLMTwoTower", "toy")
    assert not given.keys() & (strange.keys() | {"data_path", "item_features_file", "feature_cache_dir"})
    assert given["checkpoint_dir"] == str(last.parent) and given["epochs"] == 2 and given["encoder"] == ""
    for key in strange:
        assert key in caplog.text


def test_pickles_that_a_checkpoint_names_are_not_read(trained, tmp_path, monkeypatch):
    last, paths = trained
    for name in ("side.pth", "sides.pth", "saved/toy-LLMTwoTowerDataset.pth"):
        (tmp_path / name).write_bytes(pickle.dumps(Harmful(tmp_path / f"ran-{Path(name).name}")))
    rewritten(last, dataset_save_path=str(tmp_path / "side.pth"), dataloaders_save_path=str(tmp_path / "sides.pth"))
    assert cli.main(["run", "--resume", str(last), *paths, "--epochs=3"]) == 0
    assert read_checkpoint(last)["epoch"] == 2  # it did go on
    assert none_ran(tmp_path)


@pytest.mark.parametrize("backend", ["stock", "streamed"])
def test_the_best_file_beside_is_unpickled_by_no_evaluation(run_config, tmp_path, backend):
    """RecBole's own path would, and a checkpoint's settings may ask for it."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    quick = run_config | {"encoder": "", "epochs": 1, "eval_backend": backend}
    done = run_recbole("LLMTwoTower", "toy", config_dict=dict(quick))
    (best,) = (path for path in (tmp_path / "saved").glob("*.pth") if "-last" not in path.name)
    content = read_checkpoint(best)
    content["config"] = checkpoint._Pickled(Harmful(tmp_path / "ran"))
    torch.save(content, best)
    config = Config("LLMTwoTower", "toy", config_dict=dict(quick))
    init_seed(config["seed"], config["reproducibility"])
    train, _, test = data_preparation(config, create_dataset(config))
    trainer = get_trainer(config["MODEL_TYPE"], "LLMTwoTower")(config, get_model("LLMTwoTower")(config, train._dataset))
    trainer.eval_collector.data_collect(train)
    assert trainer.evaluate(test, model_file=str(best)) == done["test_result"]
    assert none_ran(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"dataset": "../toy"},
        {"dataset": ".."},
        {"dataset": "/etc/passwd"},
        {"dataset": "a\\b"},
        {"benchmark_filename": ["train", "../../x"]},
        {"additional_feat_suffix": "../x"},
        {"additional_feat_suffix": 3},
        {"load_col": {"inter": ["user_id"], "/x": ["a"]}},
        {"unload_col": {"a/b": ["a"]}},
    ],
    ids=str,
)
def test_no_part_of_a_name_leads_elsewhere(trained, settings):
    last, _ = trained
    rewritten(last, **settings)
    with pytest.raises(ValueError, match="that is no name"):
        settings_for_resume(last, {"data_path"})


def test_paths_that_matter_are_given_again(trained, tmp_path, capsys):
    """The error holds the options; with them, in any spelling of the caller's, the run goes on."""
    last, paths = trained
    (tmp_path / "an encoder").mkdir()
    rewritten(last, encoder=str(tmp_path / "an encoder"), item_features_file="v.npy", feature_cache_dir="cache")
    for command in (["run", "--resume", str(last)], ["recommend", str(last), "--users", "u1"]):
        assert cli.main(command) == 2
        line = one_line(capsys.readouterr())
        assert (
            f"--encoder='{tmp_path}/an encoder'" in line
            and "--item-features-file=v.npy" in line
            and paths[0].replace("_", "-", 1) in line
        )
        assert "A path is not taken out of a file" in line
    assert settings_for_resume(last, {"data_path", "encoder", "item_features_file"})[2]["encoder"] == str(
        tmp_path / "an encoder"
    )
    assert cli.main(["run", "--resume", str(last), *paths, "--encoder=", "--item_features_file="]) == 0


@pytest.mark.parametrize(
    ("encoder", "again"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", False),
        ("owner/name", False),
        ("plain", False),
        ("here", True),  # a folder of that name is there
        ("./here", True),
        ("~/encoders/x", True),
        ("/encoders/x", True),
        ("a/b/c", True),
        ("..\\x", True),
    ],
)
def test_an_encoder_is_taken_as_a_name_and_never_as_a_folder(trained, encoder, again):
    last, _ = trained
    Path("here").mkdir()
    rewritten(last, encoder=encoder, feature_cache_dir="")
    if again:
        with pytest.raises(ValueError, match=r"--encoder="):
            settings_for_resume(last, {"data_path"})
    else:
        assert settings_for_resume(last, {"data_path"})[2]["encoder"] == encoder


def test_the_default_data_path_and_the_dataset_that_ships_need_no_option(trained):
    last, _ = trained
    for changes in ({"data_path": "dataset"}, {"data_path": "./dataset/"}, {"dataset": "ml-100k", "data_path": "/x"}):
        rewritten(last, **{"feature_cache_dir": "", **changes})
        assert "data_path" not in settings_for_resume(last)[2]


def test_every_known_key_is_taken_or_has_a_reason_not_to_be():
    import recbole
    import yaml

    from recbole_llm.bridge.checkpoint_settings import NOT_TAKEN, PATHS, TAKEN

    known = {key for value in vars(argument_list).values() if isinstance(value, list) for key in value} | set(OWN_KEYS)
    for name in ("overall.yaml", "dataset/sample.yaml"):
        known |= yaml.safe_load((Path(recbole.__file__).parent / "properties" / name).read_text()).keys()
    assert known <= TAKEN | NOT_TAKEN.keys()
    assert not TAKEN & NOT_TAKEN.keys()
    paths = [key for key in TAKEN if key.endswith(("_path", "_dir", "_file", "_files", "_from", "checkpoint"))]
    assert paths == []
    assert PATHS.keys() <= NOT_TAKEN.keys() | {"encoder", "item_modalities"}


SMALL = {"epoch": 0, "cur_step": 0, "best_valid_score": 0.0, "best_valid_result": None, "train_loss_dict": {}}
SMALL |= {"state_dict": {}, "other_parameter": {}, "optimizer": {}, "scaler": {}, "random_states": [], "data": "0"}
SETTINGS = {"model": "LLMTwoTower", "dataset": "ml-100k", "given": {"gpu_id": "", "encoder": "", "state": "ERROR"}}
STRANGERS = {
    "pickle": Harmful(),
    "state_dict alone": {"w": torch.zeros(2)},
    "stock": {"config": Harmful(), "state_dict": {}},
    "a tensor": torch.zeros(3),
    "our name alone": {"format": FORMAT},
    "a version that is none": {"format": FORMAT, "version": "1"},
    "no settings": {"format": FORMAT, "version": 1} | SMALL,
    "no state": {"format": FORMAT, "version": 1, "settings": SETTINGS, "config": torch.zeros(1)},
    "settings of another form": {"format": FORMAT, "version": 1, "settings": [1]} | SMALL,
    "numbers for names": {"format": FORMAT, "version": 1, "settings": SETTINGS | {"given": {1: 2}}} | SMALL,
    "state of another form": {"format": FORMAT, "version": 1, "settings": SETTINGS} | SMALL | {"state_dict": [1]},
    "empty state": {"format": FORMAT, "version": 1, "settings": SETTINGS} | SMALL,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STRANGERS)
def test_whatever_is_no_checkpoint_of_ours_is_one_line(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    torch.save(STRANGERS[name], "LLMTwoTower-x.pth")
    for command in (
        ["run", "--resume", "LLMTwoTower-x.pth", "--epochs=1"],
        ["recommend", "LLMTwoTower-x.pth", "--users", "1"],
        ["recommend", "LLMTwoTower-x.pth", "--text", "x"],
        ["similar", "LLMTwoTower-x.pth", "--item", "1"],
        ["export", "LLMTwoTower-x.pth", "--output", "exported"],
    ):
        assert cli.main(command) == 2, command
        assert "LLMTwoTower-x.pth" in one_line(capsys.readouterr())
    assert none_ran(tmp_path)


def test_random_numbers_of_another_form_are_one_line(trained, capsys):
    last, paths = trained
    content = read_checkpoint(last)
    content["random_states"] = [{"python": "x"}]
    torch.save(content, last)
    assert cli.main(["run", "--resume", str(last), *paths, "--epochs=3"]) == 2
    assert "its state of the random numbers" in one_line(capsys.readouterr())


def test_what_a_command_needs_is_said_where_a_run_ends(run_config, capsys):
    options = [f"--{key}={value}" for key, value in run_config.items() if key not in ("metrics", "topk", "epochs")]
    assert cli.main(["run", "-d", "toy", *options, "--epochs=1"]) == 0
    begins = "next: recbole-llm recommend "
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(begins)]
    command = shlex.split(line.removeprefix("next: recbole-llm "))
    assert {f"--data-path={run_config['data_path']}", f"--data_path={run_config['data_path']}"} & set(command), line
    assert cli.main(command) == 0
    assert len(
        open_model(command[1], **{k: run_config[k] for k in ("data_path", "encoder", "feature_cache_dir")}).user_ids
    )
