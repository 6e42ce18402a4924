"""The canonical table: its rows against plain loops, its rules, what is refused, and that a stopped run goes on."""

import importlib.util
import json
import math
import os
import random
import re

import numpy as np
import pytest
import torch

pytest.importorskip("recbole")

import recbole_llm  # noqa: F401
from recbole_llm import cli
from recbole_llm.bridge.experiments import table_rows
from recbole_llm.bridge.experiments.baselines import BASELINES, RefusedRowError
from recbole_llm.bridge.experiments.experiment import in_own_process
from recbole_llm.bridge.experiments.leave_one_out import OURS, load, prepare
from recbole_llm.bridge.experiments.table_rows import RowRequest, measure, measure_isolated
from recbole_llm.commands import leaderboard as command
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


@pytest.mark.parametrize("name", list(BY_HAND))
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


# ---------------------------------------------------------------- the protocol: three evaluators, the same scores


def by_recbole(loaded, scorer):
    """Metrics by RecBole's own trainer, of a stock model that gives these scores."""
    from recbole.model.general_recommender import Pop
    from recbole.trainer import Trainer

    model = Pop(loaded.config, loaded.loaders[0]._dataset).eval()
    model.full_sort_predict = lambda interaction: scorer(interaction["user_id"]).flatten()
    return Trainer(loaded.config, model).evaluate(loaded.loaders[2], load_best_model=False)


def by_s3rec(scores, histories, targets):
    """S3-Rec's rule: scores of the history are set to 0, scores being positive, and the best ten are taken in two steps."""
    scores = scores.numpy().astype(np.float64)
    scores += 1 - scores.min()
    found = {f"{name}@{k}": 0.0 for name in ("recall", "ndcg") for k in (5, 10)}
    for row, history, target in zip(scores, histories, targets, strict=True):
        row[0] = 0
        row[[item for item in history if item != target]] = 0
        some = np.argpartition(row, -10)[-10:]
        best = some[np.argsort(row[some])[::-1]].tolist()
        for k in (5, 10):
            if target in best[:k]:
                found[f"recall@{k}"] += 1 / len(targets)
                found[f"ndcg@{k}"] += 1 / math.log2(best.index(target) + 2) / len(targets)
    return found


@pytest.mark.parametrize("name", ["EASE", "Transitions"])
def test_three_evaluators_agree_on_the_same_scores_to_four_digits(folder, name):
    for unmasked in (False, True):
        loaded = load("toy", config_dict=settings(folder), unmasked=unmasked)
        rows, _, _ = prepare(loaded)
        found = BASELINES[name](rows).scorer
        users = torch.arange(USERS + 1)
        # equal scores may stand in any order; a shift of each pair of its own leaves none
        shift = 1e-4 * torch.rand(USERS + 1, ITEMS + 1, generator=torch.Generator().manual_seed(0))
        scores = found(users) + shift

        def scorer(some, scores=scores):
            return scores[some].clone()

        rule = "unmasked" if unmasked else "masked"
        ours = {metric: float(value.mean()) for metric, value in rows.figures(scorer, rule).items()}
        assert by_recbole(loaded, scorer) == pytest.approx(ours, abs=6e-5)  # it rounds to four digits
        walks = sequences(loaded)
        histories = [walk[:-1] for walk in walks] if not unmasked else [[] for _ in walks]
        assert by_s3rec(scores[1:], histories, [walk[-1] for walk in walks]) == pytest.approx(ours, abs=1e-9)
        if name == "EASE":  # its own scores have no ties
            row = measure(loaded, name)
            assert by_recbole(loaded, found) == pytest.approx(row.figures[rule], abs=6e-5)
        assert 0.05 < ours["ndcg@10"] < 0.95


# ---------------------------------------------------------------- groups of users


def test_groups_are_counted_from_the_file(folder):
    loaded = load("toy", config_dict=settings(folder))
    walks = sequences(loaded)
    counts = {}
    for walk in walks:
        for item in walk[:-2]:
            counts[item] = counts.get(item, 0) + 1
    ordered, popular, sofar = sorted(counts, key=lambda item: (-counts[item], item)), set(), 0
    for item in ordered:
        if 2 * sofar < sum(counts.values()):
            popular.add(item)
        sofar += counts[item]
    found = {name: of.tolist() for name, of in loaded.groups.items()}
    assert found["popular"] == [walk[-1] in popular for walk in walks]
    assert found["untrained"] == [walk[-1] not in counts for walk in walks]
    assert found["rare"] == [walk[-1] in counts and walk[-1] not in popular for walk in walks]
    lengths = [len(set(walk[:-1])) for walk in walks]
    middle = sorted(lengths)[(len(lengths) - 1) // 2]
    assert found["short"] == [length <= middle for length in lengths]
    assert found["long"] == [length > middle for length in lengths]
    assert any(found["popular"]) and any(found["rare"])


def test_the_groups_of_a_row_are_means_over_their_users():
    groups = {"rare": np.array([True, False, True]), "long": np.array([False, True, False])}
    found = leaderboard.by_group({"masked": [0.5, 0.25, 0.0], "unmasked": [0.25, 0.0, 0.0]}, groups)
    assert found == {
        "groups": {"masked": {"rare": 0.25, "long": 0.25}, "unmasked": {"rare": 0.125, "long": 0.0}},
        "group_users": {"rare": 2, "long": 1},
    }


# ---------------------------------------------------------------- the command


@pytest.fixture
def here(monkeypatch):
    """Measure rows in this process: a fresh one takes seconds to load its libraries."""

    def in_this_process(request):
        loaded = load(request.dataset, request.config_files, unmasked=request.unmasked)
        return measure(loaded, request.name, request.seed, request.minutes)

    monkeypatch.setattr(command, "measure_isolated", in_this_process)


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


def test_the_command_writes_the_table_and_goes_on_where_it_stopped(folder, capsys, monkeypatch, here):
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
    first, second, third = table["measured"]
    for rule in ("masked", "unmasked"):
        ranked = sorted(table["measured"], key=lambda row: -row["figures"][rule]["ndcg@10"])
        for row in table["measured"]:
            best = ranked[1] if row is ranked[0] else ranked[0]
            assert row["ahead"][rule]["of"] == best["name"]
            ahead = row["figures"][rule]["ndcg@10"] - best["figures"][rule]["ndcg@10"]
            assert row["ahead"][rule]["mean"] == pytest.approx(ahead)
    for row in table["measured"]:
        shares = {name: count / USERS for name, count in row["group_users"].items()}
        for rule in ("masked", "unmasked"):
            for parts in (("popular", "rare", "untrained"), ("short", "long")):
                mean = sum(shares[name] * row["groups"][rule][name] for name in parts if name in shares)
                assert mean == pytest.approx(row["figures"][rule]["ndcg@10"])
    if importlib.util.find_spec("matplotlib"):
        content = (folder / "table" / "table.html").read_text()
        assert f"{ours['figures']['masked']['ndcg@10']:.4f}" in content and str(folder) not in content
        assert ours["setting"] in content
    text = (folder / "table" / "table.md").read_text()
    assert re.search(r"^\| EASE \| masked \| \.?\d", text, re.M) and "published" not in text
    rare = ease["groups"]["masked"]["rare"]
    assert re.search(rf"^\| EASE \(masked\) \| \.?\d.* \| {rare:.4f} \|.* mean diagonals \|$", text, re.M)
    latex = (folder / "table" / "table.tex").read_text()
    assert rf"{first['name']} & " in latex and rf"\textbf{{{first['figures']['masked']['ndcg@10']:.4f}}}" in latex
    monkeypatch.setattr(command, "measure_isolated", lambda *a: pytest.fail("measured again"))
    assert run(folder, "--rows", "Popularity,EASE,LLMTwoTower") == 0
    assert json.loads((folder / "table" / "table.json").read_text()) == table
    # other settings are other rows
    monkeypatch.setattr(command, "measure_isolated", lambda request: (_ for _ in ()).throw(ValueError("anew")))
    file = folder / "more.yaml"
    file.write_text("use_item_bias: False\n")
    for more in (["--use_item_bias=False"], ["--config-files", str(file)]):
        assert run(folder, "--rows", "EASE", *more) == 2
        assert "anew" in capsys.readouterr().err


def test_rows_that_the_data_cannot_have_are_left_out_by_name_unless_they_are_asked_for(folder, capsys, monkeypatch):
    def measure_one(request):
        if request.name in ("L3AE", "TGH"):
            raise RefusedRowError(f"{request.name} reads content")
        return measure(load(request.dataset), "Popularity")

    monkeypatch.setattr(command, "measure_isolated", measure_one)
    assert run(folder) == 0
    table = json.loads((folder / "table" / "table.json").read_text())
    assert table["left_out"] == {"L3AE": "L3AE reads content", "TGH": "TGH reads content"}
    assert "TGH-masked-0: left out. TGH reads content" in capsys.readouterr().out
    assert run(folder, "--rows", "EASE,TGH") == 2
    assert "TGH reads content" in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_is_measured_in_a_process_of_its_own_and_a_refusal_comes_back(folder):
    held = np.ones(2**27)  # 1 GiB in this process is no part of the row's memory
    arguments = (f"--data_path={folder / 'data'}", "--encoder=", "--show_progress=False", "--state=WARNING")
    found = measure_isolated(RowRequest("toy", "EASE", arguments=arguments))
    own = measure(load("toy", config_dict=settings(folder)), "EASE")
    assert found.figures == own.figures and found.setting == own.setting
    assert 2**26 < found.peak_bytes < own.peak_bytes - held.nbytes / 2
    with pytest.raises(RefusedRowError, match="L3AE reads the items' content, and the data set has none"):
        measure_isolated(RowRequest("toy", "L3AE", arguments=arguments))
    with pytest.raises(ValueError, match="no-such-data"):
        measure_isolated(RowRequest("no-such-data", "EASE", arguments=arguments))
    with pytest.raises(ChildProcessError, match="its process ended with code 3"):
        in_own_process(os._exit, 3)


def test_the_budget_of_a_trained_row_is_part_of_what_it_is(folder):
    asked = leaderboard.asked_rows(["EASE", "eSASRec", OURS], 2, False, 5.0)
    assert [(row.name, row.seed, row.minutes) for row in asked] == [
        ("EASE", 0, None),
        ("eSASRec", 0, 5.0),
        ("eSASRec", 1, 5.0),
        (OURS, 0, None),
        (OURS, 1, None),
    ]
    measured = []

    def measure_one(loaded, row):
        measured.append(row.minutes)
        return measure(loaded, "Popularity")

    def rows(minutes):
        some = leaderboard.asked_rows(["eSASRec"], 1, False, minutes)
        read = lambda unmasked: load("toy", config_dict=settings(folder))  # noqa: E731
        return leaderboard.measure_rows(some, folder / "rows", read, "toy", measure_one)

    rows(5.0)
    rows(5.0)
    rows(6.0)
    assert measured == [5.0, 6.0]


def test_a_row_is_measured_anew_where_its_settings_texts_or_times_have_changed(folder):
    config, item = folder / "more.yaml", folder / "data" / "toy" / "toy.item"
    inter = folder / "data" / "toy" / "toy.inter"
    lines = ["item_id:token\ttitle:token_seq", *(f"i{i}\tan item of words {i % 5}" for i in range(ITEMS))]
    texts = "\n".join(lines)
    measured = []

    def measure_one(loaded, row):
        measured.append(row.name)
        return measure(loaded, "Popularity")

    def rows(setting="{}", text=texts, start="0"):
        config.write_text(setting)
        item.write_text(text + "\n")
        inter.write_text("".join(f"{line[:-1]}{start}\n" if line.endswith("\t0") else f"{line}\n" for line in found))
        asked = leaderboard.asked_rows(["Popularity"], 1, False)
        read = lambda unmasked: load("toy", [str(config)], settings(folder))  # noqa: E731
        leaderboard.measure_rows(asked, folder / "rows", read, "toy", measure_one)
        return len(measured)

    found = inter.read_text().splitlines()
    assert rows() == rows() == 1
    assert rows("learning_rate: 0.01") == rows("learning_rate: 0.01") == 2
    assert rows("{checkpoint_dir: elsewhere, learning_rate: 0.01}") == 2, "it changes no figure"
    assert rows() == 3
    assert rows(text=texts.replace("words 3", "another")) == 4
    assert rows(start="-9") == 5
    assert rows() == 6
    # rows that were measured before there was a digest of inputs count
    (file,) = (folder / "rows").glob("*.json")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "inputs"}))
    assert rows() == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rows", "EASE,SASRec"], "rows: SASRec given; expected some of Popularity, Transitions, ItemKNN, "),
        (["--rows", ","], "rows: none given"),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--eval_args={'order': 'RO'}"], "--eval_args is the protocol's own"),
        (["--repeatable=True"], "--repeatable is the protocol's own"),
        (
            ["--rows", "EASE,eSASRec"],
            "budget is None, and eSASRec is trained within one; give --budget MINUTES above 0",
        ),
        (["--rows", "eSASRec", "--budget", "0"], "budget is 0.0, and eSASRec is trained within one"),
        (["--rows", "EASE", "--budget", "3"], "budget is of eSASRec, which --rows does not name"),
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


def test_no_other_row_is_measured_and_none_without_its_budget(folder):
    loaded = load("toy", config_dict=settings(folder))
    with pytest.raises(ValueError, match="rows: 'SASRec' is not one"):
        measure(loaded, "SASRec")
    with pytest.raises(ValueError, match="eSASRec is trained within a budget, and budget is None"):
        measure(loaded, "eSASRec")
    assert set(table_rows.ROWS) == {*BASELINES, OURS}


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
