"""recommend and similar from a checkpoint: what its export gives, without code from the file, and clear when it cannot be."""

import glob
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.checkpoints import load_trained
from recbole_llm.export.export_model import export_model
from recbole_llm.recommend import open_model, recommend_items, recommend_text, recommend_users, similar_items

VARIANTS = {
    "default": {},
    "recency": {
        "history_decay": 3.0,
        "eval_args": {"order": "TO", "split": {"RS": [0.8, 0.1, 0.1]}},
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    },
    "users of text and id, cold items ranked": {"user_tower": ["history", "id", "text"], "cold_boost": 1.0},
}


def train(run_config, **changes):
    run_recbole("LLMTwoTower", "toy", config_dict={**run_config, "epochs": 2, **changes})
    (checkpoint,) = glob.glob(run_config["checkpoint_dir"] + "/*-[0-9][0-9].pth")
    return checkpoint


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_recommends_as_its_export(run_config, paths, tmp_path, variant):
    checkpoint = train(run_config, **VARIANTS[variant])
    export_model(*load_trained(checkpoint, **paths), tmp_path / "export")
    exported, opened = open_model(tmp_path / "export", encoder=run_config["encoder"]), open_model(checkpoint, **paths)
    for name in ("vector", "source", "bias", "trained", "listed", "offset", "history_offsets", "history_items"):
        ours, theirs = getattr(opened, name), getattr(exported, name)
        assert ours.dtype == theirs.dtype, name
        np.testing.assert_array_equal(ours, theirs, err_msg=name)
    np.testing.assert_array_equal(opened.history_weight, exported.history_weight)
    assert (opened.history_rank is None) == (exported.history_rank is None)
    if opened.history_rank is not None:
        np.testing.assert_array_equal(opened.history_rank, exported.history_rank)
    assert opened.manifest.blocks == exported.manifest.blocks and opened.manifest.dim == exported.manifest.dim
    assert list(recommend_users(opened, k=5)) == list(recommend_users(exported, k=5))
    assert recommend_items(opened, ["i1", "i5"]) == recommend_items(exported, ["i1", "i5"])
    assert similar_items(opened, "i2") == similar_items(exported, "i2")
    for name in ("offsets", "items", "shares", "titles"):
        np.testing.assert_array_equal(getattr(opened.search, name), getattr(exported.search, name), err_msg=name)
    for by in ("both", "likeness", "chance"):
        answers = [recommend_text(model, "a rocket to the moon", by=by) for model in (opened, exported)]
        assert answers[0] == answers[1] and answers[0].source == "text"
        assert similar_items(opened, "i2", by=by) == similar_items(exported, "i2", by=by)
    title = exported.records[3].title
    twins = {i for i, r in zip(exported.item_ids, exported.records, strict=True) if r.title == title}
    assert recommend_text(opened, title, k=1).items[0].id in twins
    without = open_model(checkpoint, texts=False, **paths)  # no encoder is loaded, and what is like an item is the same
    assert similar_items(without, "i2") == similar_items(exported, "i2")


@pytest.fixture
def checkpoint(run_config):
    return train(run_config, encoder_max_tokens=8)


@pytest.fixture
def options(paths):
    """Of a command that reads the checkpoint."""
    return [f"--{key}={value}" for key, value in paths.items()]


@pytest.mark.filterwarnings("ignore")
def test_the_commands(checkpoint, paths, options, tmp_path, capsys, toy_path, caplog):
    assert cli.main(["recommend", checkpoint, *options, "--k", "3", "--output", str(tmp_path / "recs.jsonl")]) == 0
    assert "180 items for 60 users written" in capsys.readouterr().out
    # texts are cut, which the training has said and a recommendation need not say again
    assert "encoder_max_tokens" not in caplog.text
    open_model(checkpoint, texts=False, **paths)
    assert "longer than encoder_max_tokens" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "recs.jsonl").read_text().splitlines()]
    assert len(rows) == 180 and rows[0].keys() == {
        *["user", "rank", "item", "title", "score", "probability", "cold", "rules"]
    }
    assert all(0 < row["probability"] < 1 for row in rows)
    assert " story of " in rows[0]["title"]
    history = {
        tuple(line.split("\t")[:2]) for line in (Path(toy_path) / "toy" / "toy.inter").read_text().splitlines()[1:]
    }
    trained = load_trained(checkpoint, **paths)[1]
    seen = {
        (str(trained.field2id_token["user_id"][u]), str(trained.field2id_token["item_id"][i]))
        for u, i in zip(trained.inter_feat["user_id"].tolist(), trained.inter_feat["item_id"].tolist(), strict=True)
    }
    assert seen < history and not seen & {(row["user"], row["item"]) for row in rows}

    assert cli.main(["recommend", checkpoint, *options, "--text", "a whale and a ship", "--k", "2"]) == 0
    table = capsys.readouterr().out
    assert len(table.splitlines()) == 3
    assert cli.main(["similar", checkpoint, *options, "--text", "a whale and a ship", "--k", "2"]) == 0
    assert capsys.readouterr().out == table
    assert cli.main(["recommend", checkpoint, *options, "--items", "i1", "--by", "chance"]) == 2
    assert "--by chance belongs to --text" in capsys.readouterr().err
    assert (
        cli.main(["similar", checkpoint, *options, "--item", "i2", "--k", "2", "--output", str(tmp_path / "like.csv")])
        == 0
    )
    assert len((tmp_path / "like.csv").read_text().splitlines()) == 3
    assert cli.main(["recommend", checkpoint, *options, "--users", "u1", "somebody"]) == 2
    assert "'somebody'" in capsys.readouterr().err

    # the folder stands for its newest checkpoint
    assert cli.main(["recommend", checkpoint, *options, "--users", "u1"]) == 0
    table = capsys.readouterr().out
    shutil.copyfile(checkpoint, Path(checkpoint).with_name("LLMTwoTower-older.pth"))
    os.utime(Path(checkpoint).with_name("LLMTwoTower-older.pth"), (1, 1))
    assert cli.main(["recommend", str(Path(checkpoint).parent), *options, "--users", "u1"]) == 0
    captured = capsys.readouterr()
    assert captured.out == table and captured.err.startswith(f"model: {checkpoint}\n")


@pytest.mark.filterwarnings("ignore")
def test_a_dataset_that_moved_or_changed(checkpoint, paths, options, toy_path, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.copytree(Path(toy_path) / "toy", moved / "toy")
    expected = list(recommend_users(open_model(checkpoint, texts=False, **paths)))
    there = paths | {"data_path": moved}
    assert list(recommend_users(open_model(checkpoint, texts=False, **there))) == expected
    file = moved / "toy" / "toy.inter"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-30]) + "\n")
    arguments = ["recommend", checkpoint, "--users", "u1", *options, "--data_path"]
    assert cli.main([*arguments, str(moved)]) == 2
    assert "was trained on other interactions" in capsys.readouterr().err
    file.unlink()
    assert cli.main([*arguments, str(moved)]) == 2
    error = capsys.readouterr().err
    assert "no toy.inter in" in error and "--data-path FOLDER" in error


@pytest.mark.filterwarnings("ignore")
def test_what_the_fast_parser_refuses_is_read_as_recbole_reads_it(run_config, paths, toy_path, tmp_path):
    """pandas' parser in C takes a separator of one byte; and the titles of a file that is not UTF-8 are read as its texts."""
    target = tmp_path / "data" / "toy"
    target.mkdir(parents=True)
    for kind in ("inter", "item", "user"):
        text = (toy_path / "toy" / f"toy.{kind}").read_text()
        (target / f"toy.{kind}").write_text(text.replace("\t", ";;").replace("story", "conté"), encoding="latin-1")
    checkpoint = train(run_config, data_path=str(target.parent), field_separator=";;", encoding="latin-1")
    rows = list(recommend_users(open_model(checkpoint, **paths | {"data_path": target.parent}), ["u1"], k=4))
    assert len(rows) == 4 and " conté of " in rows[0].title


@pytest.mark.filterwarnings("ignore")
def test_no_pickle_is_read(checkpoint, paths, monkeypatch):
    """Neither the configuration in the checkpoint nor a dataset that lies where RecBole would look for one."""
    import pickle

    folder = Path(checkpoint).parent
    (folder / "toy-LLMTwoTowerDataset.pth").write_bytes(pickle.dumps("a saved dataset"))

    def refuse(*arguments, **named):
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    assert len(list(recommend_users(open_model(checkpoint, texts=False, **paths), ["u1"], k=4))) == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["state_dict", "other_parameter"])
def test_a_checkpoint_of_another_version(checkpoint, options, capsys, part):
    import torch

    from recbole_llm.bridge.checkpoint import read_checkpoint

    content = read_checkpoint(checkpoint)
    content[part] = {"closed_form_source": None}
    torch.save(content, checkpoint)
    assert cli.main(["recommend", checkpoint, *options, "--users", "u1"]) == 2
    assert "holds another model than this version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b"no checkpoint", "damaged or no checkpoint"), (b"", "damaged")]
)
def test_what_is_no_model(tmp_path, content, message, capsys):
    file = tmp_path / "model.pth"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["recommend", str(file), "--users", "u1"]) == 2
    assert message in capsys.readouterr().err
    assert cli.main(["recommend", str(tmp_path), "--users", "u1"]) == 2
    assert "holds neither a checkpoint" in capsys.readouterr().err
