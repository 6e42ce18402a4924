"""Ways to train the towers: which are tried, by what they are compared, and that a choice is kept whole."""

import itertools

import pytest
import torch
from made_interactions import interactions, selection_of

from recbole_llm.fitting import tower_choice
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.tower_choice import TowerChoice, candidates, choose_towers
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.losses import LossOptions, TowerLoss
from recbole_llm.scoring.tables import FrozenTensor
from recbole_llm.scoring.towers import TowerOptions, TwoTowers

DOT = TowerChoice("catalog_bce", "dot", 1.0, False)
N = 25


def towers_of(way, data, vectors=None, present=None, dim=8, share=False, init=torch.randn):
    features = {}
    if way.tower_features:
        vectors = init(N, 6) if vectors is None else vectors
        present = torch.ones(N, dtype=torch.bool) if present is None else present
        features = {"text": (FrozenTensor(vectors), FrozenTensor(present))}
    options = TowerOptions(dim, None, True, True, share, ("history",), 0.5, 0.0, way.scoring, way.scale_init)
    towers = TwoTowers(options, 60, data.popularity, 60, features, None, AllRows(N))
    if way.principal_start:
        towers.start_at_principal_axes()
    return towers, TowerLoss(towers, LossOptions(way.loss_type, 1.0, way.scoring, 0.0, "torch"))


@pytest.fixture(scope="module")
def made():
    train, valid, _ = interactions(seed=2)
    return TrainingData(train, AllRows(N)), selection_of(train, valid)


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate)


def test_cosines_are_tried_beside_the_options_and_nothing_that_a_person_set_is_changed():
    assert candidates(DOT, {}, has_content=True) == (
        TowerChoice("catalog_ce", "cosine", 10.0, True, True),
        TowerChoice("catalog_bce", "cosine", 10.0, True, True),
        DOT,
    )
    assert not any(way.tower_features or way.principal_start for way in candidates(DOT, {}, has_content=False))
    keys = ("loss_type", "scoring", "scale_init", "tower_features")
    for given in (DOT, TowerChoice("catalog_ce", "cosine", 3.0, True)):
        for count in range(5):
            for explicit in itertools.combinations(keys, count):
                found = candidates(given, dict.fromkeys(explicit), has_content=True)
                assert found[-1] == given and len(set(found)) == len(found)
                assert all(getattr(way, key) == getattr(given, key) for way in found for key in explicit)
                assert not any(way.principal_start and not way.tower_features for way in found)
    assert candidates(DOT, dict.fromkeys(keys), has_content=True) == (DOT,)
    # a dot product does not start at the scale of a cosine
    assert {way.scale_init for way in candidates(DOT, {"scoring": "dot"}, has_content=True)} == {1.0}


def test_the_way_that_ranks_validation_best_is_taken_and_the_random_stream_stays(made, monkeypatch):
    data, validation = made
    ways = candidates(DOT, {}, has_content=True)
    values = iter([0.2, 0.4, 0.3])
    monkeypatch.setattr(tower_choice, "user_metric", lambda *a: torch.full((3,), next(values), dtype=torch.float64))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = choose_towers(ways, lambda way: towers_of(way, data), sgd(0.1), data, validation, 16)
    assert found == ways[1]
    assert torch.equal(torch.rand(3), expected)


def test_a_way_that_learns_is_taken_for_one_that_does_not(made):
    data, validation = made
    ways = (TowerChoice("catalog_bce", "dot", 1.0, False), TowerChoice("catalog_ce", "cosine", 10.0, False))

    def optimizer(parameters):
        made.append(len(parameters))
        return torch.optim.Adam(parameters, lr=0.0 if len(made) % 2 else 0.05)

    made = []
    for order in (ways, ways[::-1]):
        assert choose_towers(order, lambda way: towers_of(way, data), optimizer, data, validation, 4) == order[1]
    assert made


def test_a_trial_trains_on_no_more_pairs_than_stated(made, monkeypatch):
    data, validation = made
    monkeypatch.setattr(tower_choice, "TRIAL_PAIRS", 20 * N)
    trained = []
    of_users = TowerLoss.of_users
    monkeypatch.setattr(
        TowerLoss, "of_users", lambda self, users, rows: (trained.append(len(users)), of_users(self, users, rows))[1]
    )
    ways = candidates(DOT, {}, has_content=False)
    choose_towers(ways, lambda way: towers_of(way, data), sgd(0.1), data, validation, 8)
    assert trained == [8, 8, 4] * len(ways)
    assert choose_towers(ways[:1], None, None, data, validation, 8) == ways[0]


def test_maps_of_content_start_at_its_principal_axes(made):
    data, _ = made
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(N, 6, generator=generator) * torch.tensor([5.0, 3, 1, 0.5, 0.1, 0.01])
    present = torch.arange(N) % 3 != 0
    vectors[1] = 1e6  # of an item that nobody has
    count = data.popularity.clone()
    count[1] = 0
    trained = TrainingData(data.history, AllRows(N))
    trained.__dict__["popularity"] = count
    way = TowerChoice("catalog_ce", "cosine", 10.0, True, True)
    known = vectors[present & (count > 0)].double()
    axes = torch.linalg.svd(known, full_matrices=False).Vh
    for dim in (2, 6, 9):
        towers, _ = towers_of(way, trained, vectors, present, dim)
        for tower in (towers.target, towers.source):
            image = tower.adapters["text"](vectors)[present & (count > 0)].double()
            assert float(image.norm(dim=1).mean()) == pytest.approx(1.0, rel=1e-5)
            plane = known @ axes[:dim].T
            plane = plane / plane.norm(dim=1).mean()
            torch.testing.assert_close(image @ image.T, plane @ plane.T, rtol=1e-4, atol=1e-5)
    assert torch.equal(towers.target.adapters["text"].weight, towers.source.adapters["text"].weight)


def test_a_choice_is_kept_in_plain_values_and_an_unknown_one_is_refused():
    way = TowerChoice("catalog_ce", "cosine", 10.0, True, True)
    assert TowerChoice.from_state(way.to_state()) == way
    for change in ({"loss_type": "hinge"}, {"scoring": "euclid"}, {"scale_init": 0.0}):
        with pytest.raises(ValueError, match="knows no such way"):
            TowerChoice.from_state(way.to_state() | change)
