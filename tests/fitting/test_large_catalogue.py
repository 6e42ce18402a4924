"""Forms without a matrix of items x items: against dense float64 solutions, and the choice between them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_interactions import interactions, of_text, rows_of, selection_of, texts
from scipy import sparse

from recbole_llm.fitting import large_catalogue, neighbourhood, next_item, next_item_local
from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.large_catalogue import allowed_bytes, local_bytes
from recbole_llm.fitting.neighbourhood import direct_rows, gram_entries, largest_of_rows
from recbole_llm.fitting.next_item import (
    NextItemSetting,
    directions_of,
    fit_next_item,
    next_item_blocks,
    solve_next_item,
)
from recbole_llm.fitting.next_item_local import LocalNextItem, _cut_product
from recbole_llm.fitting.next_item_rows import prefixes, ridge_of
from recbole_llm.scoring.rows import Rows, rows_from_pairs


def dense_of(block):
    """The item-item matrix of a block, in float64."""
    B = block.source.double() @ block.target.double().T
    B[block.direct.row_of_entry(), block.direct.ids] += block.direct.weights.double()
    return B


@pytest.fixture
def exact(monkeypatch):
    """Every neighbour counts, every entry stays, and conjugate gradients go on to the end."""
    monkeypatch.setattr(large_catalogue, "NEIGHBOURS_OF_FIT", 1000)
    monkeypatch.setattr(large_catalogue, "KEPT", 1000)
    monkeypatch.setattr(next_item_local, "KEPT", 1000)
    monkeypatch.setattr(neighbourhood.solve_columns, "__defaults__", (1e-7,))
    monkeypatch.setattr(neighbourhood, "COLUMNS_AT_ONCE", 2)
    monkeypatch.setattr(neighbourhood, "ENTRIES_PER_BATCH", 300)
    monkeypatch.setattr(neighbourhood, "ROWS_AT_ONCE", 7)
    monkeypatch.setattr(next_item_local, "PRODUCTS_AT_ONCE", 50)


def complete(X):
    """One user has touched every item that anybody has, so that all items are neighbours of each other."""
    X[0] = X.any(0)
    return rows_of(X)


def text_of(n, seed=2):
    E = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    E[3] = E[5]
    return texts(E, torch.arange(n) % 7 != 0)


@pytest.mark.parametrize("setting", [of_text(0.0), of_text(0.3, ridge=2.0)], ids=str)
def test_with_every_neighbour_it_is_the_dense_form(setting, exact):
    train = complete(interactions(n_users=80, n_items=31, seed=4)[2])
    content = text_of(31)
    local = fit_closed_form(train, 31, content, setting=setting, form="neighbourhoods")
    dense = fit_closed_form(train, 31, content, setting=setting, dim="full")
    block = local.block()
    found, wanted = dense_of(block), dense.source.double()
    off = ~torch.eye(31, dtype=torch.bool)
    torch.testing.assert_close(found[off], wanted[off], rtol=1e-3, atol=2e-5)
    assert not found[:, ~local.warm].any() and not found[~local.warm].any()
    assert block.direct.sizes.max() == int(local.warm.sum()) - 1, "the diagonal is no entry"
    assert block.constants == {"neighbours": 1000.0, "kept": 1000.0}


def test_confidences_count_as_in_the_dense_form(exact):
    train = complete(interactions(n_users=80, n_items=31, seed=4)[2])
    train = replace(train, confidence=torch.rand(len(train.ids), generator=torch.Generator().manual_seed(0)) + 0.2)
    content, setting = text_of(31), of_text(0.3, ridge=2.0)
    found = dense_of(fit_closed_form(train, 31, content, setting=setting, form="neighbourhoods").block())
    wanted = fit_closed_form(train, 31, content, setting=setting, dim="full").source.double()
    off = ~torch.eye(31, dtype=torch.bool)
    torch.testing.assert_close(found[off], wanted[off], rtol=1e-3, atol=2e-5)
    plain = fit_closed_form(replace(train, confidence=None), 31, content, setting=setting, dim="full").source.double()
    assert not torch.allclose(plain[off], wanted[off], rtol=1e-2, atol=1e-4)


def test_a_catalogue_beyond_the_limit_takes_what_validation_prefers(exact, monkeypatch, caplog):
    monkeypatch.setattr(large_catalogue, "SPECTRAL_DIMS", (2, 4))
    monkeypatch.setattr(large_catalogue, "SEARCH_DIM_OF_MANY", 2)
    train, valid, X = interactions(n_users=200, n_items=41, seed=6, groups=9)
    content = texts(torch.nn.functional.one_hot(torch.arange(41) % 9).float())
    chosen = fit_closed_form(train, 41, content, selection_of(train, valid), max_dense_items=10)
    forms = {
        name: fit_closed_form(train, 41, content, selection_of(train, valid), form=name)
        for name in ("neighbourhoods", "svd")
    }
    assert chosen.value == max(form.value for form in forms.values()) == forms["neighbourhoods"].value
    assert chosen.form == "neighbourhoods of 1000" and chosen.direct is not None
    # neighbourhoods of one item say nothing but the content
    monkeypatch.setattr(large_catalogue, "NEIGHBOURS_OF_FIT", 1)
    monkeypatch.setattr("recbole_llm.fitting.hyperparameters.NEIGHBOURS", 1)
    other = fit_closed_form(train, 41, None, selection_of(train, valid), max_dense_items=10)
    assert other.form == "SVD form" and other.direct is None and other.dim == 4
    assert other.value > 0


def test_without_validation_the_filled_share_decides(monkeypatch):
    train, _, _ = interactions(n_users=200, n_items=41, seed=6, groups=9)
    assert fit_closed_form(train, 41, None, max_dense_items=10).form == "SVD form"
    monkeypatch.setattr(large_catalogue, "SPARSE_GRAM", 2.0)
    assert fit_closed_form(train, 41, None, max_dense_items=10).direct is not None
    assert fit_closed_form(train, 41, None, max_dense_items=10, dim=3).form == "SVD form", "a rank is asked for"
    monkeypatch.setattr(large_catalogue, "MAX_BYTES", 10)
    monkeypatch.setattr(large_catalogue, "BYTES_PER_ITEM", 1)
    assert fit_closed_form(train, 41, None, max_dense_items=10).form == "SVD form"
    with pytest.raises(ValueError, match="form is 'dense'"):
        fit_closed_form(train, 41, None, form="dense")


def test_few_entries_of_a_row_stay():
    dense = np.array([[0.0, 3, -4, 1], [0, 0, 0, 0], [5, -1, 2, 0], [1, 0, 0, 2]], np.float32)
    M = sparse.csr_matrix((dense.ravel(), np.tile(np.arange(4), 4), np.arange(0, 17, 4)), shape=(4, 4))  # zeros stored
    found = largest_of_rows(M, 2)
    assert found.toarray().tolist() == [[0, 3, -4, 0], [0, 0, 0, 0], [5, 0, 2, 0], [1, 0, 0, 2]]
    assert found.nnz == 6 and M.nnz == 16
    rows = direct_rows(found)
    assert rows.offsets.tolist() == [0, 2, 2, 4, 6] and rows.ids.tolist() == [1, 2, 0, 2, 0, 3]
    assert rows.weights.tolist() == [3, -4, 5, 2, 1, 2]


def test_the_memory_is_estimated_before_it_is_taken():
    train, _, X = interactions(n_users=70, n_items=33, seed=8)
    entries = int(((X.double().T @ X.double()) > 0).sum())
    assert gram_entries(train, 33) == entries
    assert local_bytes(2000, 100, 128, 5) < local_bytes(4000, 100, 128, 5) < local_bytes(4000, 200, 128, 5)
    assert local_bytes(10**9, 25_000, 128, 384) > large_catalogue.MAX_BYTES > local_bytes(25 * 10**6, 109_000, 128, 384)
    # a million sparse items are solved for, and as many that share users with ten times as many others are not
    assert allowed_bytes(10**6) > local_bytes(160 * 10**6, 10**6, 128, 384)
    assert allowed_bytes(10**6) < local_bytes(1600 * 10**6, 10**6, 128, 384)
    assert allowed_bytes(25_000) == large_catalogue.MAX_BYTES


# ---------------------------------------------------------------- the next item


def walks(n_items=23, n_users=60, seed=1):
    """Ordered histories of 1 to 9 items; the first user has all of them in one prefix, and another one after it."""
    generator = torch.Generator().manual_seed(seed)
    users, items = [torch.zeros(n_items - 2, dtype=torch.int64)], [torch.arange(1, n_items - 1)]
    for user in range(1, n_users):
        size = int(torch.randint(1, 10, (1,), generator=generator))
        users.append(torch.full((size,), user))
        items.append(torch.randperm(n_items - 3, generator=generator)[:size] + 1)
    user, item = torch.cat(users), torch.cat(items)
    return rows_from_pairs(user, item, n_users, time=torch.arange(len(user)).float())


@pytest.mark.parametrize(
    "setting",
    [NextItemSetting(3.0, 2.0, 0.2), NextItemSetting(2.0, 4.0, 0.1, (("text", 0.3),)),
     NextItemSetting(2.0, 4.0, 0.05, (("text", 0.1), ("image", 0.2)))],
    ids=str,
)  # fmt: skip
def test_the_next_item_with_every_neighbour_is_the_dense_solution(setting, exact):
    n, train = 23, walks()
    content = {"text": text_of(n)["text"], "image": text_of(n, seed=9)["text"]}
    trained = torch.bincount(train.ids, minlength=n) > 0
    directions = {name: each for name, each in directions_of(content, trained).items()}
    solver = LocalNextItem(train, n, {name: directions[name] for name, _ in setting.content})
    found = solver.blocks(setting, 1000)
    z, y = (matrix.toarray().astype(np.float64) for matrix in prefixes(train, n, setting.tau, setting.floor))
    gram, follows = torch.from_numpy(z.T @ z), torch.from_numpy(z.T @ y)
    ridge, unit = ridge_of(gram.diagonal(), setting)
    A = gram + ridge.diag()
    right = follows.clone()
    for name, weight in setting.content:
        A += weight * unit * directions[name].double() @ directions[name].double().T
    T = torch.linalg.solve(A, right)
    torch.testing.assert_close(dense_of(found[0]), T, rtol=1e-3, atol=2e-5)
    assert len(found) == 1 + bool(setting.content)
    if setting.content:
        kernel = sum(w * unit * directions[m].double() @ directions[m].double().T for m, w in setting.content)
        C = found[1].source.double() @ found[1].target.double().T
        torch.testing.assert_close(C, torch.linalg.solve(A, kernel), rtol=1e-3, atol=2e-5)
        # the same two blocks as the dense way gives, so that each fades by its own decay
        dense = next_item_blocks(train, n, setting, None, directions)
        torch.testing.assert_close(dense[0].source.double(), T, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(dense[1].source @ dense[1].target.T, C.float(), rtol=1e-3, atol=2e-5)
    again = solver.blocks(replace(setting, ridge=9.0), 1000)
    anew = LocalNextItem(train, n, solver.directions).blocks(replace(setting, ridge=9.0), 1000)
    torch.testing.assert_close(dense_of(again[0]), dense_of(anew[0]), rtol=1e-4, atol=1e-6)


def test_a_product_is_cut_a_few_rows_at_a_time(monkeypatch):
    generator = np.random.default_rng(3)
    left, right = (sparse.random(40, 40, 0.2, "csr", np.float32, random_state=generator) for _ in range(2))
    whole = largest_of_rows(left @ right, 6)
    for most in (1, 60, 10**9):
        monkeypatch.setattr(next_item_local, "PRODUCTS_AT_ONCE", most)
        np.testing.assert_allclose(_cut_product(left, right, 6).toarray(), whole.toarray(), rtol=1e-5)


def test_beyond_the_limit_the_next_item_is_solved_by_neighbourhoods(exact, monkeypatch):
    n, users = 12, 40
    order = torch.arange(n - 2).repeat(users) + 1  # everybody goes round the same circle
    user = torch.arange(users).repeat_interleave(n - 2)
    start = torch.arange(users).repeat_interleave(n - 2)
    item = (order - 1 + start) % (n - 2) + 1
    train = rows_from_pairs(user[:-1], item[:-1], users, time=torch.arange(len(user) - 1).float())
    rows = torch.arange(users)

    def value(scorer):
        """The share of users whose newest item's successor is ranked first."""
        scores = scorer(rows)
        newest = torch.tensor(
            [
                int(train.ids[a:b][train.ranks[a:b].argmin()])
                for a, b in zip(train.offsets, train.offsets[1:], strict=False)
            ]
        )
        return float((scores[:, 1 : n - 1].argmax(1) + 1 == newest % (n - 2) + 1).float().mean())

    columns = torch.bincount(train.ids, minlength=n) > 0
    noise = torch.randn(users, n, generator=torch.Generator().manual_seed(0))
    asked = (train, train, n, lambda few: noise[few].clone(), value, None, columns)
    monkeypatch.setattr(next_item, "MAX_ITEMS", 5)
    monkeypatch.setattr(next_item, "NEIGHBOURS", 1000)
    (found,) = fit_next_item(*asked)
    assert found.direct is not None and found.constants["neighbours"] == 128 and found.scale
    assert value(found.scorer(train)) > 0.9
    monkeypatch.setattr(large_catalogue, "MAX_BYTES", 10)
    monkeypatch.setattr(large_catalogue, "BYTES_PER_ITEM", 1)
    assert fit_next_item(*asked) == ()
    assert "neighbourhoods would hold" in LocalNextItem(train, n, {}).refused


def test_items_without_a_prefix_say_nothing(exact):
    train = rows_from_pairs(torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), 3, time=torch.arange(3.0))
    (block,) = LocalNextItem(train, 6, {}).blocks(NextItemSetting(2.0, 1.0), 4)
    assert block.direct.row_of_entry().tolist() == [1] and block.direct.ids.tolist() == [2]
    gram, follows = (torch.from_numpy(m.toarray()) for m in (block_gram(train)))
    T, _ = solve_next_item(gram, follows.to_sparse(), NextItemSetting(2.0, 1.0))
    torch.testing.assert_close(dense_of(block).float(), T, rtol=1e-4, atol=1e-6)
    assert not block.scores(Rows(torch.tensor([0, 0]), torch.zeros(0, dtype=torch.int64))).any()


def block_gram(train):
    z, y = prefixes(train, 6, 2.0)
    return z.T @ z, z.T @ y
