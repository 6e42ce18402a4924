"""The canonical table: its rows against plain loops, its rules, what is refused, and that a stopped run goes on."""

import importlib.util
import json
import math
import random
import re

import numpy as np
import pytest
import torch

pytest.importorskip("recbole")

import recbole_llm  # noqa: F401
from recbole_llm import cli
from recbole_llm.bridge.experiments import leave_one_out
from recbole_llm.bridge.experiments.leave_one_out import BASELINES, OURS, load, measure, prepare
from recbole_llm.reporting import leaderboard, published

USERS, ITEMS, LENGTH = 70, 40, 8


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Walks on a circle; users come back to an item they know now and then."""
    rng = random.Random(1)
    (tmp_path / "data" / "toy").mkdir(parents=True)
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    for u in range(USERS):
        at = rng.randrange(ITEMS)
        for t in range(LENGTH):
            lines.append(f"u{u}\ti{at}\t{t}")
            at = (at + rng.choice([1, 1, 1, 2])) % ITEMS
    (tmp_path / "data" / "toy" / "toy.inter").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(folder):
    return {
        "data_path": str(folder / "data"),
        "encoder": None,
        "epochs": 2,
        "state": "WARNING",
        "show_progress": False,
    }


def by_hand(scores, histories, targets, masked, ties):
    """Recall and NDCG at 5 and 10, by counting what stands before the target; of equal scores none or all do."""
    found = {f"{name}@{k}": [] for name in ("recall", "ndcg") for k in (5, 10)}
    for row, history, target in zip(scores.double(), histories, targets, strict=True):
        row = row.clone()
        row[0] = -math.inf
        if masked:
            row[[item for item in history if item != target]] = -math.inf
        before = row >= row[target] - 1e-9 if ties else row > row[target] + 1e-9
        before[target] = False
        place = int(before.sum())
        for k in (5, 10):
            found[f"recall@{k}"].append(float(place < k))
            found[f"ndcg@{k}"].append(1 / math.log2(place + 2) if place < k else 0.0)
    return {name: float(np.mean(values)) for name, values in found.items()}


def sequences(loaded):
    """Each user's items in their order, in internal ids, from the file's own rows."""
    rows = []
    for loader in loaded.loaders:
        inter = loader._dataset.inter_feat
        rows += zip(inter["user_id"].tolist(), inter["timestamp"].tolist(), inter["item_id"].tolist(), strict=True)
    users = {}
    for user, _, item in sorted(rows):
        users.setdefault(user, []).append(item)
    return [users[user] for user in sorted(users)]


def popularity_by_hand(train, later, setting):
    counts = torch.zeros(ITEMS + 1, dtype=torch.float64)
    for walk in train:
        for item in walk:
            counts[item] += 1
    return counts.expand(USERS, -1)


def transitions_by_hand(train, later, setting):
    tau = float(setting.removeprefix("decay "))
    follows = torch.zeros(ITEMS + 1, ITEMS + 1, dtype=torch.float64)
    for walk in train:
        for i, item in enumerate(walk):
            for gap, before in enumerate(reversed(walk[:i])):
                if gap < math.ceil(5 * tau):
                    follows[before, item] += math.exp(-gap / tau)
    return torch.stack(
        [sum(math.exp(-rank / tau) * follows[item] for rank, item in enumerate(reversed(walk))) for walk in later]
    )


def ease_by_hand(train, later, setting):
    X, H = torch.zeros(2, USERS, ITEMS + 1, dtype=torch.float64)
    for user in range(USERS):
        X[user, train[user]] = 1.0
        H[user, later[user]] = 1.0
    G = X.T @ X
    ridge = float(setting.split()[1]) * G.diagonal()[1:].mean()
    P = torch.linalg.inv(G[1:, 1:] + ridge * torch.eye(ITEMS, dtype=torch.float64))
    B = torch.zeros(ITEMS + 1, ITEMS + 1, dtype=torch.float64)
    B[1:, 1:] = -P / P.diagonal()
    return H @ B.fill_diagonal_(0.0)


BY_HAND = {"Popularity": popularity_by_hand, "Transitions": transitions_by_hand, "EASE": ease_by_hand}


@pytest.mark.parametrize("name", list(BASELINES))
def test_a_row_is_what_a_plain_loop_gives_under_both_rules(folder, name):
    loaded = load("toy", config_dict=settings(folder))
    assert (loaded.n_users, loaded.n_items) == (USERS, ITEMS)
    walks = sequences(loaded)
    train, later, targets = [w[:-2] for w in walks], [w[:-1] for w in walks], [w[-1] for w in walks]
    row = measure(loaded, name)
    scores = BY_HAND[name](train, later, row.setting)
    for rule in ("masked", "unmasked"):
        low, high = (by_hand(scores, later, targets, rule == "masked", ties) for ties in (True, False))
        for metric, value in row.figures[rule].items():
            assert low[metric] - 1e-4 <= value <= high[metric] + 1e-4
        if name == "EASE":
            assert row.figures[rule] == pytest.approx(high, abs=1e-4)
        assert row.users[rule].shape == (USERS,)
        assert row.users[rule].mean() == pytest.approx(row.figures[rule]["ndcg@10"])
    assert row.chosen_by == "masked" and row.seed == 0


def test_our_row_has_the_figures_of_recboles_own_evaluation_under_both_rules(folder):
    for unmasked in (False, True):
        loaded = load("toy", config_dict=settings(folder) | {"blocks": ["closed_form"]}, unmasked=unmasked)
        row = measure(loaded, OURS)
        _, _, trainer = prepare(loaded)
        trainer.fit(*loaded.loaders[:2], saved=False, show_progress=False)
        stock = trainer.evaluate(loaded.loaders[2], load_best_model=False)
        assert row.chosen_by == ("unmasked" if unmasked else "masked")
        for metric, value in row.figures[row.chosen_by].items():
            assert stock[metric] == pytest.approx(value, abs=6e-5)
        assert row.valid == pytest.approx(trainer.best_valid_result["ndcg@10"])
        assert "closed_form" in row.setting and row.cpu_seconds > 0


def run(folder, *arguments):
    return cli.main(
        [
            "leaderboard",
            "toy",
            f"--data_path={folder / 'data'}",
            "--encoder=",
            "--epochs=1",
            "--blocks=['closed_form']",
            "--output",
            str(folder / "table"),
            *arguments,
        ]
    )


def test_the_command_writes_the_table_and_goes_on_where_it_stopped(folder, capsys, monkeypatch):
    assert run(folder, "--rows", "Popularity,EASE,LLMTwoTower") == 0
    table = json.loads((folder / "table" / "table.json").read_text())
    names = [row["name"] for row in table["measured"]]
    assert sorted(names) == ["EASE", "LLMTwoTower", "Popularity"] and table["published"] == []
    values = [row["figures"]["masked"]["ndcg@10"] for row in table["measured"]]
    assert values == sorted(values, reverse=True)
    ease = next(row for row in table["measured"] if row["name"] == "EASE")
    ours = next(row for row in table["measured"] if row["name"] == OURS)
    assert ease["difference"]["masked"]["mean"] == pytest.approx(
        ours["figures"]["masked"]["ndcg@10"] - ease["figures"]["masked"]["ndcg@10"]
    )
    assert "difference" not in ours
    if importlib.util.find_spec("matplotlib"):
        content = (folder / "table" / "table.html").read_text()
        assert f"{ours['figures']['masked']['ndcg@10']:.4f}" in content and str(folder) not in content
    text = (folder / "table" / "table.md").read_text()
    assert re.search(r"^\| EASE \| masked \| \.?\d", text, re.M) and "published" not in text
    monkeypatch.setattr(leaderboard, "measure", lambda *a: pytest.fail("measured again"))
    assert run(folder, "--rows", "Popularity,EASE,LLMTwoTower") == 0
    assert json.loads((folder / "table" / "table.json").read_text()) == table
    # other settings are other rows
    monkeypatch.setattr(leaderboard, "measure", lambda loaded, name, seed: (_ for _ in ()).throw(ValueError("anew")))
    assert run(folder, "--rows", "EASE", "--use_item_bias=False") == 2
    assert "anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "EASE,SASRec"], "rows: SASRec given; expected some of Popularity, Transitions, EASE, LLMTwoTower"),
        (["--rows", ","], "rows: none given"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--eval_args={'order': 'RO'}"], "--eval_args is the protocol's own"),
        (["--repeatable=True"], "--repeatable is the protocol's own"),
    ],
    ids=str,
)
def test_what_cannot_be_a_row_of_the_table_is_refused(folder, capsys, arguments, message):
    assert run(folder, *arguments) == 2
    assert message in capsys.readouterr().err


def test_another_data_set_under_a_canonical_name_is_refused(folder):
    loaded = load("toy", config_dict=settings(folder))
    with pytest.raises(
        ValueError, match="has 70 users and 40 items; the canonical Amazon 2014 Beauty has 22363 and 12101"
    ):
        leaderboard.check_size("beauty", loaded)
    leaderboard.check_size("toy", loaded)


def test_item_item_rows_of_too_many_items_are_refused(folder, monkeypatch):
    monkeypatch.setattr(leave_one_out, "MAX_ITEMS", 10)
    loaded = load("toy", config_dict=settings(folder))
    for name in ("EASE", "Transitions"):
        with pytest.raises(ValueError, match=f"{name} holds an item-item matrix, and 41 items are more than 10"):
            measure(loaded, name)
    with pytest.raises(ValueError, match="rows: 'SASRec' is not one"):
        measure(loaded, "SASRec")


def test_a_data_set_without_times_is_refused(folder):
    path = folder / "data" / "toy" / "toy.inter"
    lines = [line.rpartition("\t")[0] for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match="timestamp"):
        load("toy", config_dict=settings(folder))


def test_published_rows_are_sorted_and_every_one_has_a_source():
    for name in published.CANONICAL:
        rows = published.published(name)
        values = [row.ndcg[name] for row in rows]
        assert values == sorted(values, reverse=True) and len(rows) >= 6
    assert all(row.source and 0 < max(row.ndcg.values()) < 0.1 for row in published.PUBLISHED)
    assert published.published("toy") == []
