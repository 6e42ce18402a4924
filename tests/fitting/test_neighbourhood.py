"""Neighbourhood solves against dense solutions in float64, on ragged, empty and repeated input."""

import numpy as np
import pytest
import torch
from made_interactions import interactions, of_text, rows_of, texts
from scipy import sparse

from recbole_llm.fitting import neighbourhood
from recbole_llm.fitting.ease import Kernel, Setting, solve, user_weights
from recbole_llm.fitting.neighbourhood import (
    Neighbourhoods,
    local_inverse,
    neighbours,
    solve_columns,
    sparse_gram,
)
from recbole_llm.fitting.warm_items import warm_items
from recbole_llm.scoring.rows import Rows, rows_from_pairs


def made(n_users=90, n_items=37, seed=3, complete=False):
    """Warm items with texts, of which every seventh is missing and two are the same; ``complete``: one user has all."""
    train, _, X = interactions(n_users=n_users, n_items=n_items, seed=seed)
    if complete:
        X[0] = X.any(0)
        train = rows_of(X)
    E = torch.randn(n_items, 5, generator=torch.Generator().manual_seed(seed))
    E[3] = E[5]
    present = torch.arange(n_items) % 7 != 0
    return warm_items(train, {"text": (E, present), **{"image": texts(E.flip(0))["text"]}}, n_items)


def dense(items, setting):
    """The exact solution in float64, from a Gram matrix summed user by user."""
    n, weights = len(items.items), user_weights(items.train, setting.user_exponent).double()
    G = torch.zeros(n, n, dtype=torch.float64)
    for user, (start, stop) in enumerate(zip(items.train.offsets[:-1], items.train.offsets[1:], strict=True)):
        ids = items.train.ids[start:stop]
        G[ids[:, None], ids] += weights[user]
    content = {name: directions.double() for name, directions in items.content.items()}
    return solve(G, content, setting)


def local(items, setting, count):
    weights = user_weights(items.train, setting.user_exponent).double()
    content = {name: directions.double() for name, directions in items.content.items()}
    return Neighbourhoods(items.train, weights, content, len(items.items), count)


@pytest.mark.parametrize(
    "setting",
    [
        of_text(0.0),
        of_text(0.3, ridge=2.0),
        Setting(kernels=(Kernel("text", 0.1), Kernel("image", 0.4))),
        Setting.of_ease(4.0),
    ],
    ids=str,
)
def test_with_all_items_as_neighbours_it_is_the_exact_solution(setting, monkeypatch):
    monkeypatch.setattr(neighbourhood, "ENTRIES_PER_BATCH", 5000)
    monkeypatch.setattr(neighbourhood.solve_columns, "__defaults__", (1e-12,))
    items = made(complete=True)
    found = local(items, setting, len(items.items)).solve(setting)
    torch.testing.assert_close(found.dense(), dense(items, setting), rtol=1e-8, atol=1e-10)


def test_more_neighbours_come_closer_to_the_exact_solution():
    items, setting = made(n_users=60, n_items=120, seed=5), of_text(0.2)
    exact = dense(items, setting)
    errors = [
        float((local(items, setting, m).solve(setting).dense() - exact).norm() / exact.norm()) for m in (2, 8, 64)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < errors[0] / 3, errors


def test_settings_one_after_another_are_those_alone():
    items = made()
    settings = [of_text(0.2), of_text(0.0), of_text(0.05), of_text(0.05, ridge=2.0), of_text(0.2)]
    shared = local(items, settings[0], 9)
    for setting in settings:
        alone = local(items, setting, 9).solve(setting)
        torch.testing.assert_close(shared.solve(setting).dense(), alone.dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "setting", [of_text(0.0), of_text(0.3), Setting(kernels=(Kernel("text", 0.1), Kernel("image", 0.4)))], ids=str
)
def test_the_last_solution_is_the_same_and_gives_up_what_others_share(setting):
    items = made()
    kept, given = local(items, setting, 9), local(items, setting, 9)
    wanted = kept.solve(setting)
    torch.testing.assert_close(given.solve(setting, last=True).dense(), wanted.dense(), rtol=0, atol=0)
    assert given.gram is None and given._inverse is None and not given._images
    torch.testing.assert_close(kept.solve(setting).dense(), wanted.dense(), rtol=0, atol=0)  # nothing of it has changed


def test_systems_leave_the_table_of_places_as_it_was_and_batches_bound_it(monkeypatch):
    """Filled anew for every batch it would cost a pass over the catalogue for a few items."""
    gram = sparse.random(40, 40, 0.3, format="csr", random_state=0)
    gram = (gram @ gram.T).tocsr()
    gram.sort_indices()
    members = neighbours(gram, gram.diagonal() + 1, 6)
    places = np.full((5, 40), -1, np.int8)
    half = neighbourhood._half(gram)
    found = neighbourhood._systems(half, np.ones(40), members[7:12], places)
    assert (places == -1).all()
    dense = gram.toarray() + np.eye(40)
    for item, ids in enumerate(members[7:12]):
        count = (ids >= 0).sum()
        np.testing.assert_allclose(found[item, :count, :count], np.tril(dense[np.ix_(ids[:count], ids[:count])]))
        np.testing.assert_array_equal(found[item, count:, count:], np.eye(6 - count))
    both = half + half.T
    both.setdiag(half.diagonal())
    np.testing.assert_allclose(both.toarray(), gram.toarray())
    # its others have as many entries at least, and all together there are no more than nnz
    assert np.diff(half.indptr).max() <= gram.nnz**0.5
    monkeypatch.setattr(neighbourhood, "ENTRIES_PER_BATCH", 100)
    monkeypatch.setattr(neighbourhood, "ITEMS_PER_ENTRY", 20)
    alone = sparse.identity(1000, format="csr")
    batches = list(neighbourhood._batches(alone, neighbours(alone, np.ones(1000), 1)))
    assert [batch.stop for batch in batches] == list(range(2, 1001, 2)), "100 entries are 2 items of 1,000 places"


def test_scores_are_the_histories_times_the_matrix():
    items, setting = made(), of_text(0.2)
    found = local(items, setting, 6).solve(setting)
    history = Rows(
        torch.tensor([0, 3, 3, 5]), torch.tensor([1, 4, 9, 0, 2]), torch.tensor([1.0, 0.5, 0.25, 2.0, 1.0]).double()
    )
    X = torch.zeros(3, len(items.items), dtype=torch.float64)
    X[history.row_of_entry(), history.ids] = history.weights
    rows = torch.tensor([2, 0, 1, 2])
    off = found.sparse.toarray() + (found.source @ found.target.T).numpy()
    torch.testing.assert_close(found.scorer(history)(rows), X[rows] @ torch.from_numpy(off))
    assert not found.sparse.diagonal().any()


def test_neighbours_are_the_strongest_then_the_lowest_ids():
    G = np.array([[4.0, 2, 2, 0, 1], [2, 9, 0, 0, 0], [2, 0, 1, 0, 0], [0, 0, 0, 3, 0], [1, 0, 0, 0, 0.04]])
    A = G.diagonal() + np.array([0.0, 0, 3, 0, 0])
    # 0: 2 / 3 with item 1, 2 / 2 with item 2, 1 / .2 with item 4
    assert neighbours(sparse.csr_matrix(G), A, 3).tolist() == [
        [0, 4, 2],
        [1, 0, -1],
        [2, 0, -1],
        [3, -1, -1],
        [4, 0, -1],
    ]
    assert neighbours(sparse.csr_matrix(G), A, 1).tolist() == [[0], [1], [2], [3], [4]]
    tied = sparse.csr_matrix(np.ones((4, 4)))
    assert neighbours(tied, np.ones(4), 3).tolist() == [[0, 1, 2], [1, 0, 2], [2, 0, 1], [3, 0, 1]]


def test_local_inverses_of_islands_are_exact_and_symmetric():
    """Two items that share users, and one alone; entries that one side alone has stay."""
    G = np.array([[2.0, 1, 0, 0], [1, 2, 0, 0], [0, 0, 5, 0], [0, 0, 0, 1]])
    ridge = np.array([1.0, 2, 3, 4])
    found = local_inverse(sparse.csr_matrix(G), ridge, 4).toarray()
    np.testing.assert_allclose(found, np.linalg.inv(G + np.diag(ridge)), rtol=1e-12)
    chain = sparse.csr_matrix(np.array([[1.0, 0.5, 0], [0.5, 1.0, 0.4], [0, 0.4, 1.0]]))
    found = local_inverse(chain, np.ones(3), 2).toarray()
    assert (found == found.T).all()
    two = np.linalg.inv(np.array([[2.0, 0.4], [0.4, 2.0]]))
    assert found[2, 1] == pytest.approx(two[0, 1])  # item 1 chose item 0
    assert found[0, 2] == 0


def test_the_gram_matrix_counts_weighted_users():
    rows = rows_from_pairs(torch.tensor([3, 0, 0, 3, 0]), torch.tensor([2, 1, 2, 1, 1]), 5)
    weights = torch.tensor([2.0, 9, 9, 0.5, 9], dtype=torch.float64)
    expected = [[0, 0, 0, 0], [0, 2.5, 2.5, 0], [0, 2.5, 2.5, 0], [0, 0, 0, 0]]
    found = sparse_gram(rows, weights, 4)
    assert found.toarray().tolist() == expected and found.dtype == np.float64


def test_columns_are_solved_each_to_its_own_scale():
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(30, 30, generator=generator, dtype=torch.float64)
    A = root @ root.T + torch.diag(torch.linspace(1, 50, 30, dtype=torch.float64))
    wanted = torch.randn(30, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 1e-6, 1e6, 0.0])
    found = solve_columns(A.matmul, A.diagonal(), wanted, 1e-9)
    torch.testing.assert_close(found, torch.linalg.solve(A, wanted), rtol=1e-6, atol=0)
    assert solve_columns(A.matmul, A.diagonal(), wanted[:, :0]).shape == (30, 0)


def test_a_small_ridge_beside_large_counts_is_solved_in_float64():
    """In float32 the system of two items that the same many users have is singular."""
    n = 3
    G = np.full((n, n), 1e8, np.float32)
    ridge = np.ones(n, np.float32)
    found = local_inverse(sparse.csr_matrix(G), ridge, n).toarray()
    np.testing.assert_allclose(found, np.linalg.inv(G.astype(np.float64) + np.eye(n)), rtol=1e-3)


def test_the_squared_kernel_is_refused():
    items = made()
    with pytest.raises(ValueError, match="power 1"):
        local(items, of_text(0.2), 4).solve(of_text(0.2, 2))
