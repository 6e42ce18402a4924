"""Training rows: every user once, exact negatives, RecBole's meaning of the batch size."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import recbole_llm  # noqa: F401

batches = pytest.importorskip("recbole_llm.bridge.batches")


def pairs(seed=0, users=40, items=30, n=400):
    g = torch.Generator().manual_seed(seed)
    # user 0 and item 0 are padding; items above 24 have no training interaction
    return torch.randint(1, users, (n,), generator=g), torch.randint(1, items - 5, (n,), generator=g)


def test_negatives_are_in_the_catalogue_and_never_a_positive_of_their_user():
    user, item = pairs()
    sampler = batches.NegativeSampler(user, item, "uniform", 1.0)
    negatives = sampler.sample(user, 50)
    positives = set(zip(user.tolist(), item.tolist(), strict=True))
    assert negatives.shape == (len(user), 50)
    assert not any((u, i) in positives for u, row in zip(user.tolist(), negatives.tolist(), strict=True) for i in row)
    assert set(negatives.flatten().tolist()) <= set(item.tolist())


@pytest.mark.parametrize(("distribution", "alpha"), [("uniform", 1.0), ("popularity", 1.0), ("popularity", 0.5)])
def test_negatives_follow_the_distribution_over_what_remains(distribution, alpha):
    user = torch.tensor([1, 2, 2, 3, 3, 3, 3])
    item = torch.tensor([1, 2, 3, 3, 4, 2, 2])
    sampler = batches.NegativeSampler(user, item, distribution, alpha)
    drawn = sampler.sample(torch.tensor([1]), 60_000, torch.Generator().manual_seed(1)).flatten()
    weight = {2: 3.0, 3: 2.0, 4: 1.0} if distribution == "popularity" else {2: 1.0, 3: 1.0, 4: 1.0}
    weight = {i: w**alpha for i, w in weight.items()}
    for i, w in weight.items():
        expected = w / sum(weight.values())
        # five standard deviations of a binomial share
        assert abs((drawn == i).float().mean().item() - expected) < 5 * (expected * (1 - expected) / 60_000) ** 0.5


def test_a_user_of_the_whole_catalogue_is_counted_and_named():
    with pytest.raises(ValueError, match="1 users have interacted with every item"):
        batches.NegativeSampler(torch.tensor([1, 1, 2]), torch.tensor([1, 2, 1]), "uniform", 1.0)


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="must be uniform or popularity, got 'none'"):
        batches.NegativeSampler(*pairs(), "none", 1.0)


class Config(dict):
    def __missing__(self, key):
        return None


def make(cls, shuffle=True, **changes):
    user, item = pairs()
    dataset = SimpleNamespace(uid_field="user_id", iid_field="item_id", inter_feat={"user_id": user, "item_id": item})
    config = Config(
        seed=1,
        single_spec=True,
        worker=0,
        train_batch_size=64,
        NEG_PREFIX="neg_",
        LABEL_FIELD="label",
        loss_type="sampled_bce",
        train_neg_sample_args={"distribution": "uniform", "sample_num": 3, "alpha": 1.0, "dynamic": False},
    )
    config.update(changes)
    return cls(config, dataset, None, shuffle=shuffle), user, item


def test_a_catalogue_epoch_visits_every_user_with_an_interaction_once():
    loader, user, _ = make(batches.UserRowsDataLoader, train_batch_size=16, loss_type="catalog_bce")
    seen = [b["user_id"] for b in loader]
    assert len(loader) == len(seen) == 3
    assert sorted(torch.cat(seen).tolist()) == sorted(set(user.tolist()))
    again = torch.cat([b["user_id"] for b in loader])
    assert again.tolist() != torch.cat(seen).tolist()  # another order in the next epoch


def test_interaction_rows_cover_every_interaction_and_count_flattened_rows():
    loader, user, item = make(batches.InteractionRowsDataLoader)
    rows = list(loader)
    assert loader.step == 64 // 3
    assert len(rows) == len(loader)
    got = sorted((u, i) for b in rows for u, i in zip(b["user_id"].tolist(), b["item_id"].tolist(), strict=True))
    assert got == sorted(zip(user.tolist(), item.tolist(), strict=True))
    assert all(b["neg_item_id"].shape == (len(b["user_id"]), 3) for b in rows)


def test_pair_rows_are_a_positive_and_its_negatives():
    loader, user, item = make(batches.InteractionRowsDataLoader, loss_type="pair_bce", shuffle=False)
    batch = next(iter(loader))
    assert loader.step == 16
    assert batch["label"].view(16, 4).tolist() == [[1, 0, 0, 0]] * 16
    assert batch["item_id"].view(16, 4)[:, 0].tolist() == item[:16].tolist()
    assert batch["user_id"].view(16, 4).T.tolist() == [user[:16].tolist()] * 4


def test_the_same_seed_gives_the_same_batches():
    first, second = ([b["neg_item_id"].tolist() for b in make(batches.InteractionRowsDataLoader)[0]] for _ in range(2))
    assert first == second


@pytest.mark.parametrize("k", ["none", 0, None])
def test_a_sampled_loss_without_negatives_says_what_to_do(k):
    args = {"distribution": "uniform", "sample_num": k, "alpha": 1.0}
    with pytest.raises(ValueError, match="sample_num must be at least 1"):
        make(batches.InteractionRowsDataLoader, train_neg_sample_args=args)


def test_dynamic_negatives_are_refused_with_a_way_out():
    args = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": True}
    with pytest.raises(ValueError, match="dynamic is not available"):
        make(batches.InteractionRowsDataLoader, train_neg_sample_args=args)


def test_the_loss_type_chooses_the_rows():
    assert batches.train_dataloader_class({"loss_type": "catalog_ce"}) is batches.UserRowsDataLoader
    assert batches.train_dataloader_class({"loss_type": "pair_bce"}) is batches.InteractionRowsDataLoader


@pytest.mark.parametrize("slots", [0, 64], ids=["shared slots", "a slot for each"])
def test_positives_are_found_exactly_where_slots_are_shared(monkeypatch, slots):
    monkeypatch.setattr(batches, "MOST_SLOTS_PER_PAIR", slots)
    monkeypatch.setattr(batches, "SLOTS_PER_PAIR", 1)  # many false suspects
    user, item = pairs()
    sampler = batches.NegativeSampler(user, item, "uniform", 1.0)
    every = torch.cartesian_prod(torch.unique(user), torch.unique(item))
    known = set(zip(user.tolist(), item.tolist(), strict=True))
    found = sampler._positives(every[:, 0] * sampler._span + every[:, 1])
    assert found.tolist() == [row for row, pair in enumerate(every.tolist()) if tuple(pair) in known]
    among = sampler.positives_among(user, torch.tensor([2, 3, 20]))
    assert among.tolist() == [[(u, i) in known for i in (2, 3, 20)] for u in user.tolist()]


def test_a_user_tower_of_histories_gets_its_users_side_by_side(monkeypatch):
    monkeypatch.setattr(batches, "GROUP", 4)
    loader, user, item = make(batches.InteractionRowsDataLoader, train_batch_size=len(pairs()[0]) * 3)
    (epoch,), (other,) = list(loader), list(loader)
    got = list(zip(epoch["user_id"].tolist(), epoch["item_id"].tolist(), strict=True))
    assert sorted(got) == sorted(zip(user.tolist(), item.tolist(), strict=True))
    runs = 1 + sum(a != b for (a, _), (b, _) in pairwise(got))
    assert runs <= sum(-(-n // 4) for n in torch.bincount(user).tolist())
    assert epoch["user_id"].tolist() != other["user_id"].tolist()
    alone, *_ = make(batches.InteractionRowsDataLoader, train_batch_size=len(user) * 3, user_tower="id")
    users = next(iter(alone))["user_id"]
    assert (users[1:] != users[:-1]).sum() > 300  # of 399: no history, no grouping


def test_shared_negatives_are_distinct_and_count_for_users_without_them():
    args = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "shared": 10}
    loader, user, item = make(batches.InteractionRowsDataLoader, train_neg_sample_args=args)
    known = set(zip(user.tolist(), item.tolist(), strict=True))
    rows = list(loader)
    assert [len(b["user_id"]) for b in rows] == [64] * 6 + [16]
    for batch in rows:
        negatives = batch["neg_item_id"].tolist()
        assert len(set(negatives)) == len(negatives) <= 10
        assert batch["neg_valid"].tolist() == [
            [(u, i) not in known for i in negatives] for u in batch["user_id"].tolist()
        ]
    assert rows[0]["neg_item_id"].tolist() != rows[1]["neg_item_id"].tolist()


@pytest.mark.parametrize(
    ("shared", "loss", "words"),
    [(-1, "sampled_bce", "a number of items"), (5, "pair_bce", "belongs to loss_type sampled_bce")],
)
def test_shared_negatives_elsewhere_are_refused(shared, loss, words):
    args = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "shared": shared}
    with pytest.raises(ValueError, match=words):
        make(batches.InteractionRowsDataLoader, train_neg_sample_args=args, loss_type=loss)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "48 items on a CPU: catalog_bce scores every one of them"),
        ({"loss_type": "sampled_bce"}, "rows of a batch can share their negatives"),
        (
            {
                "loss_type": "sampled_bce",
                "train_neg_sample_args": {"distribution": "uniform", "sample_num": 1, "shared": 7},
            },
            "sampled_bce with 7 negatives that the rows of a batch share",
        ),
    ],
)
def test_the_log_of_a_large_catalogue_names_shared_negatives(run_config, changes, words, monkeypatch, caplog):
    import logging

    from recbole.quick_start import run_recbole

    from recbole_llm.bridge.training import advice

    monkeypatch.setattr(advice, "MANY_ITEMS", 40)
    settings = run_config | {"encoder": "", "blocks": "learned", "epochs": 1, "state": "INFO"} | changes
    settings |= {"load_col": {"inter": ["user_id", "item_id"], "item": ["item_id"]}}
    if "train_neg_sample_args" in changes:
        settings["train_neg_sample_args"] = changes["train_neg_sample_args"] | {"alpha": 1.0, "dynamic": False}
    with caplog.at_level(logging.INFO):
        run_recbole("LLMTwoTower", "toy", config_dict=settings)
    assert words in caplog.text
