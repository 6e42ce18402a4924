"""Weights and dislikes through RecBole: a run chooses, a checkpoint keeps, a fit repeats, an export ranks alike."""

import glob
import random

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.bridge.training.choices import read_choices
from recbole_llm.checkpoints import load_trained
from recbole_llm.export.export_model import export_model
from recbole_llm.export.reader import load_export
from recbole_llm.fitting.signals import Signals
from recbole_llm.recommend import open_model, recommend_users

BY_TIME = {"order": "TO", "split": {"RS": [0.7, 0.15, 0.15]}, "group_by": "user", "mode": "full"}
RANDOM = BY_TIME | {"order": "RO"}


@pytest.fixture
def weighed(toy_path, tmp_path, run_config):
    """The made dataset with a weight, low for what is not of a user's topic, and a label, 0 for some of that."""
    rng = random.Random(0)
    folder = tmp_path / "weighed" / "toy"
    folder.mkdir(parents=True)
    for suffix in ("item", "user"):
        (folder / f"toy.{suffix}").write_text((toy_path / "toy" / f"toy.{suffix}").read_text())
    header, *rows = (toy_path / "toy" / "toy.inter").read_text().splitlines()
    out = [f"{header}\tweight:float\tlabel:float"]
    for row in rows:
        user, item = (int(cell[1:]) for cell in row.split("\t")[:2])
        own = user % 4 == item % 4
        weight = (3 if own else 0.25) * rng.uniform(0.8, 1.2)
        out.append(f"{row}\t{weight:.4f}\t{int(own or rng.random() < 0.4)}")
    (folder / "toy.inter").write_text("\n".join(out) + "\n")
    return run_config | {"data_path": str(folder.parent), "weight_field": "weight", "epochs": 2}


def columns(*names):
    return {"load_col": {"inter": ["user_id", "item_id", "timestamp", "weight", *names]}}


def trained(config, **changes):
    result = run_recbole("LLMTwoTower", "toy", config_dict=config | changes)
    (file,) = (each for each in glob.glob(config["checkpoint_dir"] + "/*.pth") if not each.endswith("-last.pth"))
    return file, result


@pytest.mark.parametrize("order", [RANDOM, BY_TIME], ids=["random", "by time"])
@pytest.mark.filterwarnings("ignore")
def test_weights_are_chosen_kept_repeated_and_exported(weighed, paths, tmp_path, order):
    file, _ = trained(weighed, eval_args=order, weight_exponent=0.5, **columns())
    paths = paths | {"data_path": weighed["data_path"]}
    chosen = read_choices(file)
    assert chosen.signals == Signals(0.5, 0.5)
    model, train = load_trained(file, **paths)
    assert model.signals == chosen.signals
    given = train.training_rows().confidence.double()
    torch.testing.assert_close(model.history.weights.double(), given.sqrt(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.history.confidence.double(), given.sqrt() / given.sqrt().mean(), rtol=1e-4, atol=1e-5
    )
    if order is BY_TIME:  # at test histories hold validation's items, and their weights
        model.at_test = True
        assert len(model.ranking_history.weights) == len(model.ranking_history.ids) > len(model.history.ids)
        model.at_test = False
    # fitted once more, with the same signals
    arguments = [f"--{key}={value}" for key, value in paths.items()]
    assert cli.main(["fit", file, "--rows", "all", *arguments]) == 0
    again = max(glob.glob("saved/*.pth"), key=lambda name: (not name.endswith("-last.pth"), name != file))
    assert read_choices(again).signals == chosen.signals
    # everywhere the same answers
    rows = list(recommend_users(open_model(file, texts=False, **paths), k=5))
    export_model(model, train, tmp_path / "export")
    assert list(recommend_users(load_export(tmp_path / "export"), k=5)) == rows
    known = model.known(train)
    users = torch.arange(1, model.n_users)
    scores = model.score.scores(known.history.select(users), model.score.user_parts(users))
    scores[known.history.select(users).row_of_entry(), known.history.select(users).ids] = -torch.inf
    best = {train.id2token("user_id", int(u)): float(s.max()) for u, s in zip(users, scores, strict=True)}
    first = {row.user: row.score for row in rows if row.rank == 1}
    assert first == pytest.approx({user: best[user] for user in first}, rel=1e-3, abs=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_run_chooses_by_validation_and_says_what(weighed, caplog):
    caplog.set_level("INFO")
    file, _ = trained(weighed, eval_args=RANDOM, blocks="closed_form", state="INFO", **columns())
    told = [record.getMessage() for record in caplog.records if "interaction weights" in record.getMessage()]
    assert sum("exponent in the fit/in histories: NDCG@10 0/0: " in line for line in told) == 1
    chosen = read_choices(file).signals
    assert sum("set aside" in line or f"exponent {chosen.fit:g} in the fit" in line for line in told) == 1


@pytest.mark.filterwarnings("ignore")
def test_dislikes_of_a_told_weight_are_kept_and_exported(weighed, paths, tmp_path):
    paths = paths | {"data_path": weighed["data_path"]}
    plain = {"LABEL_FIELD": "label", "eval_args": RANDOM, "weight_field": None, **columns("label")}
    file, _ = trained(weighed, dislike_weight=0.5, **plain)
    assert read_choices(file).block("closed_form").dislikes == 0.5
    model, train = load_trained(file, **paths)
    block = model.score.block("closed_form")
    disliked = train.negative_rows()
    assert block.dislikes == 0.5 and torch.equal(block.disliked.ids, disliked.ids)
    user = int(torch.nonzero(disliked.sizes)[0])
    without = model.score.with_blocks(type(block)(**{**vars(block), "dislikes": 0.0}))
    one = torch.tensor([user])
    assert not torch.allclose(model.scores(one), without.of_users(one, model.history))
    export_model(model, train, tmp_path / "export")
    export = load_export(tmp_path / "export")
    rows = list(recommend_users(export, k=5))
    assert list(recommend_users(open_model(file, texts=False, **paths), k=5)) == rows
    assert export.manifest.blocks[0].dislikes == 0.5
    # of all splits, as the histories
    known = model.known(train)
    assert len(known.disliked.ids) > len(disliked.ids)
    at = list(export.user_ids).index(train.id2token("user_id", user))
    own = known.disliked.select(one).ids
    expected = -0.5 * block.source[own].double().sum(0)
    torch.testing.assert_close(
        torch.from_numpy(export.part_of(at)[: block.dim]).double(), expected, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"loss_type": "sampled_bce", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 2}},
        {"loss_type": "pair_bce", "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}},
        {"loss_type": "catalog_ce"},
    ],
    ids=lambda changes: changes["loss_type"],
)
@pytest.mark.filterwarnings("ignore")
def test_towers_alone_take_weights_as_given_under_every_loss(weighed, changes):
    _, first = trained(weighed, blocks="learned", eval_args=RANDOM, **columns(), **changes)
    _, second = trained(
        weighed | {"checkpoint_dir": weighed["checkpoint_dir"] + "2"},
        blocks="learned",
        eval_args=RANDOM,
        weight_exponent=0,
        **columns(),
        **changes,
    )
    assert first["best_valid_score"] != second["best_valid_score"]


def test_shards_refuse_weights(weighed):
    with pytest.raises(ValueError, match="weight_field"):
        trained(weighed, blocks="learned", shard_items=True, **columns())
