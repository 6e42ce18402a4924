"""Agreement of content and behaviour, against a loop in float64, and what it finds of swapped texts."""

import math

import numpy as np
import pytest
import torch

from recbole_llm.fitting import disagreement
from recbole_llm.fitting.disagreement import agreements
from recbole_llm.scoring.rows import rows_from_pairs

TOPICS, N_USERS, N_ITEMS = 4, 300, 121


@pytest.fixture(scope="module")
def made():
    """Interactions of users of four topics, and vectors of items near their topics; row 0 is padding."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, TOPICS, N_ITEMS)
    users, items = [], []
    for user in range(N_USERS):
        own = np.flatnonzero((topic == user % TOPICS) & (np.arange(N_ITEMS) > 0))
        some = np.unique(np.concatenate([rng.choice(own, 14), rng.integers(1, N_ITEMS, 4)]))
        users += [user] * len(some)
        items += some.tolist()
    history = rows_from_pairs(torch.tensor(users), torch.tensor(items), N_USERS)
    vectors = torch.from_numpy(np.eye(TOPICS)[topic] + 0.3 * rng.standard_normal((N_ITEMS, TOPICS))).float()
    present = torch.ones(N_ITEMS, dtype=torch.bool)
    present[[0, 5]] = False
    return history, vectors, present, topic


def oracle(history, vectors, present, neighbours):
    """The module's formulas, item by item."""
    X = np.zeros((N_USERS, N_ITEMS))
    X[history.row_of_entry().numpy(), history.ids.numpy()] = 1
    known = present.numpy() & (X.sum(0) >= disagreement.LEAST_USERS)
    kept = X * known
    G = kept.T @ (kept / np.maximum(kept.sum(1, keepdims=True), 1))
    E = vectors.numpy().astype(np.float64) - vectors.numpy()[known].mean(0)
    E /= np.linalg.norm(E, axis=1, keepdims=True)
    items = np.flatnonzero(known)
    found = np.full(N_ITEMS, np.nan)
    for i in items:
        others = items[items != i]
        near = others[np.argsort(-G[i, others] / np.sqrt(G[others, others]), kind="stable")[:neighbours]]
        likeness = E[others] @ E[i]
        places = [(likeness < E[j] @ E[i] - 1e-12).mean() * len(others) / (len(others) - 1) for j in near]
        found[i] = np.mean(places)
    return found


def test_agreement_is_the_mean_place_of_the_neighbours_by_behaviour(made, monkeypatch):
    history, vectors, present, _ = made
    monkeypatch.setattr(disagreement, "NEIGHBOURS", 8)
    monkeypatch.setattr(disagreement, "CHUNK_BYTES", 4 * N_USERS * 17)  # several chunks, the last one shorter
    found = agreements(history, {"text": (vectors, present)}, N_ITEMS)["text"]
    expected = oracle(history, vectors, present, 8)
    assert np.isnan(found.values[[0, 5]].numpy()).all()
    close = np.isclose(found.values.numpy(), expected, atol=2e-3, equal_nan=True)
    assert close.mean() > 0.95  # neighbours that are equally near may be others
    assert np.nanmedian(expected) == pytest.approx(float(found.values.nanmedian()), abs=2e-3)


def test_another_items_content_is_a_yardstick_near_chance(made):
    history, vectors, present, _ = made
    found = agreements(history, {"text": (vectors, present)}, N_ITEMS)["text"]
    assert float(found.of_others.nanmean()) == pytest.approx(0.5, abs=0.06)
    assert float(found.values.nanmedian()) > 0.7
    again = agreements(history, {"text": (vectors, present)}, N_ITEMS)["text"]
    assert torch.equal(again.of_others.nan_to_num(), found.of_others.nan_to_num())


def test_swapped_content_comes_first(made, monkeypatch):
    monkeypatch.setattr(disagreement, "NEIGHBOURS", 15)
    history, vectors, present, topic = made
    swapped = [10, 40, 70]
    mixed = vectors.clone()
    for item in swapped:
        other = np.flatnonzero((topic != topic[item]) & present.numpy())[item % 20]
        mixed[item] = vectors[other]
    found = agreements(history, {"text": (mixed, present)}, N_ITEMS)["text"]
    assert set(found.values.nan_to_num(2.0).argsort()[:3].tolist()) == set(swapped)
    assert found.suspects(1000) == sorted(found.suspects(1000), key=lambda item: float(found.values[item]))
    assert set(found.suspects(1000)) <= set(swapped) and found.suspects(1) == [70]
    assert 0.35 < found.threshold < 0.55 < float(found.values.nanmedian())


def test_what_cannot_be_told_is_nan_and_huge_catalogues_are_left_out(made, monkeypatch):
    history, vectors, present, _ = made
    few = torch.zeros_like(present)
    few[1:20] = True
    found = agreements(history, {"text": (vectors, few)}, N_ITEMS)["text"]
    assert bool(found.values.isnan().all()) and math.isnan(found.threshold) and found.suspects(10) == []
    monkeypatch.setattr(disagreement, "MAX_ITEMS", 50)
    assert agreements(history, {"text": (vectors, present)}, N_ITEMS) == {}
