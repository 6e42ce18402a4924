"""Training rows: every user once, exact negatives, RecBole's meaning of the batch size."""

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
