"""What is known counts: recommendations are made from every interaction of the data set, and repeat none of them."""

import glob
import json
from collections import defaultdict

import numpy as np
import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.checkpoints import load_trained
from recbole_llm.export.export_model import export_model
from recbole_llm.export.reader import load_export
from recbole_llm.recommend import open_model, recommend_users

TIMES = {"inter": ["user_id", "item_id", "timestamp"]}
BY_TIME = {"order": "TO", "split": {"RS": [0.8, 0.1, 0.1]}, "group_by": "user", "mode": "full"}
VARIANTS = {
    "random": {},
    "by time": {"eval_args": BY_TIME, "load_col": TIMES},
    "recency": {"eval_args": BY_TIME, "load_col": TIMES, "history_decay": 3.0},
    "left out": {"eval_args": BY_TIME | {"split": {"LS": "valid_and_test"}}, "load_col": TIMES},
}


def train(run_config, **changes):
    run_recbole("LLMTwoTower", "toy", config_dict={**run_config, "epochs": 1, **changes})
    (checkpoint,) = glob.glob(run_config["checkpoint_dir"] + "/*-[0-9][0-9].pth")
    return checkpoint


def bought(toy_path):
    """Items of each user in the file, oldest first."""
    found = defaultdict(list)
    for line in (toy_path / "toy" / "toy.inter").read_text().splitlines()[1:]:
        user, item, _, time = line.split("\t")
        found[user].append((float(time), item))
    return {user: [item for _, item in sorted(rows)] for user, rows in found.items()}


def histories(export, by_rank=False):
    """Items of each user in an export, oldest first where there are ranks."""
    found = {}
    for row, user in enumerate(export.user_ids):
        span = slice(*export.history_offsets[row : row + 2])
        items = export.history_items[span]
        if by_rank:
            items = items[np.argsort(-export.history_rank[span])]
        found[user] = [export.item_ids[item] for item in items]
    return found


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.filterwarnings("ignore")
def test_nothing_of_the_data_set_is_recommended_again(run_config, paths, toy_path, tmp_path, variant):
    checkpoint, own = train(run_config, **VARIANTS[variant]), bought(toy_path)
    opened = open_model(checkpoint, texts=False, **paths)
    ranked = opened.history_rank is not None
    found = histories(opened, ranked)
    assert (found if ranked else {user: sorted(items) for user, items in found.items()}) == (
        own if ranked else {user: sorted(items) for user, items in own.items()}
    )
    if variant == "recency":  # the newest item weighs 1
        for row, user in enumerate(opened.user_ids):
            span = slice(*opened.history_offsets[row : row + 2])
            newest = opened.item_ids[opened.history_items[span][np.argmax(opened.history_weight[span])]]
            assert newest == own[user][-1] and opened.history_weight[span].max() == 1
    rows = list(recommend_users(opened, k=10))
    assert len({row.user for row in rows}) == 60 and not [row for row in rows if row.item in own[row.user]]
    export_model(*load_trained(checkpoint, **paths), tmp_path / "export")
    assert list(recommend_users(load_export(tmp_path / "export"), k=10)) == rows
    before = open_model(checkpoint, texts=False, history="train", **paths)
    again = [row for row in recommend_users(before, k=10) if row.item in own[row.user]]
    assert again  # what the training split does not hold
    counts = opened.manifest.counts
    assert counts["interactions"] == 60 * 14
    assert counts["fitted_interactions"] == before.manifest.counts["interactions"] < 60 * 14


@pytest.mark.filterwarnings("ignore")
def test_the_commands_say_what_is_known(run_config, paths, toy_path, tmp_path, capsys):
    checkpoint, own = train(run_config), bought(toy_path)
    options = [f"--{key}={value}" for key, value in paths.items()]
    fitted = open_model(checkpoint, texts=False, history="train", **paths).manifest.counts["interactions"]
    capsys.readouterr()

    assert cli.main(["recommend", checkpoint, *options, "--output", "all.jsonl"]) == 0
    assert f"fitted on {fitted} interactions; 840 are known as histories and as seen\n" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert not [row for row in rows if row["item"] in own[row["user"]]]

    assert cli.main(["recommend", checkpoint, *options, "--history", "train", "--output", "train.jsonl"]) == 0
    assert f"fitted on {fitted} interactions, which are all that is known" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row for row in rows if row["item"] in own[row["user"]]]

    for history in ("all", "train"):
        command = ["export", checkpoint, *options, "--output", f"export-{history}", "--history", history]
        assert cli.main(command) == 0
        assert f"fitted on {fitted} interactions" in capsys.readouterr().out
        given = open_model(checkpoint, texts=False, history=history, **paths)
        assert histories(load_export(tmp_path / f"export-{history}")) == histories(given)
        assert (
            f"interactions in their histories, {fitted} fitted on"
            in (tmp_path / f"export-{history}" / "README.md").read_text()
        )
    assert cli.main(["similar", "export-all", "--item", "i2"]) == 0
    assert f"fitted on {fitted} interactions; 840" in capsys.readouterr().err
    assert cli.main(["recommend", "export-all", "--history", "train", "--users", "u1"]) == 2
    assert "history belongs to a checkpoint" in capsys.readouterr().err
    with pytest.raises(ValueError, match="history is 'some'; expected one of all, train"):
        open_model(checkpoint, texts=False, history="some", **paths)


@pytest.mark.filterwarnings("ignore")
def test_a_split_that_has_lost_the_others_says_so(run_config, paths, caplog):
    model, train_split = load_trained(train(run_config), **paths)
    assert len(model.known(train_split).history.ids) == 840
    del train_split.__dict__["_later_splits"]  # as one that was pickled with its loader
    assert len(model.known(train_split).history.ids) == len(model.history.ids) < 840
    assert "are not at hand" in caplog.text
