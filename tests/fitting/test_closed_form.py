"""The closed form against dense float64 algebra, its search on known curves, and what it does with degenerate data."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_interactions import interactions, of_text, rows_of, selection_of, texts

from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.ease import (
    Setting,
    content_centre,
    content_directions,
    solve,
    spectrum,
    user_weights,
    weighted_gram,
)
from recbole_llm.fitting.factors import FACTOR_FORMS, Incidence, _thinned, _top_places, factorise, gram_product, sharpen
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.rows import Rows

PLAIN = Setting.of_ease(2.0)


def dense_formula(X, E, present, s):
    """B of the module docstring in NumPy and float64, for a catalogue without cold items."""
    X, present = X.numpy().astype(float), present.numpy()
    count = X.sum(1)
    w = (np.maximum(count, 1) / count[count > 0].mean()) ** -s.user_exponent
    G = (X * w[:, None]).T @ X
    g = np.diag(G).mean()
    E = E.numpy().astype(float)
    E = (E - E[present].mean(0)) * present[:, None]
    K = E @ E.T / np.maximum(np.outer(np.linalg.norm(E, axis=1), np.linalg.norm(E, axis=1)), 1e-30)
    text = s.kernel("text")
    K = np.sign(K) * np.abs(K) ** text.power
    A = G + text.weight * s.ridge * g * K + s.ridge * g * np.diag((np.diag(G) / g) ** s.ridge_exponent)
    inverse = np.linalg.inv(A)
    B = (np.eye(len(A)) - inverse / np.diag(inverse)) * (np.diag(G) / g) ** -s.tilt
    np.fill_diagonal(B, 0.0)
    return torch.tensor(B, dtype=torch.float32)


def test_plain_setting_is_ease_and_meets_its_optimality_condition():
    train, _, X = interactions()
    warm = X.any(0)
    form = fit_closed_form(train, 25, dim="full", setting=PLAIN)
    G = (X.double().T @ X.double())[warm][:, warm]
    ridge = 2.0 * G.diagonal().mean()
    inverse = torch.linalg.inv(G + ridge * torch.eye(len(G), dtype=torch.float64))
    ease = -inverse / inverse.diagonal()
    ease.fill_diagonal_(0.0)
    torch.testing.assert_close(form.source[warm][:, warm].double(), ease, rtol=1e-4, atol=1e-6)
    # the gradient of ||X - XB||^2 + ridge ||B||^2 vanishes off the diagonal
    gradient = (G + ridge * torch.eye(len(G))) @ form.source[warm][:, warm].double() - G
    assert float((gradient - gradient.diagonal().diag()).abs().max()) < 1e-4 * float(G.abs().max())
    assert not form.source[~warm].any()
    assert not form.source[:, ~warm].any()
    assert form.target is None
    assert form.dim == 25


@pytest.mark.parametrize("power", [1, 2])
def test_every_constant_of_the_generalisation(power):
    train, _, X = interactions(seed=3)
    X, train = X[:, 1:-1], rows_of(X[:, 1:-1])
    present = torch.ones(23, dtype=torch.bool)
    present[[2, 11]] = False
    E = torch.randn(23, 6, generator=torch.Generator().manual_seed(4)) + 3.0  # far from the origin: must be centred
    E[~present] = 1e4  # not read
    setting = of_text(0.3, power, ridge=3.0, user_exponent=0.5, ridge_exponent=0.25, tilt=0.1)
    form = fit_closed_form(train, 23, texts(E, present), dim="full", setting=setting)
    torch.testing.assert_close(form.source, dense_formula(X, E, present, setting), rtol=1e-4, atol=1e-6)


def test_gram_is_the_dense_one_in_any_chunk():
    train, _, X = interactions(seed=1)
    weights = user_weights(train, 0.5)
    expected = (X.double().T * weights.double()) @ X.double()
    for chunk_bytes in (1, 4 * 60 * 7, 2**28):  # one column at a time; ragged; all at once
        got = weighted_gram(train, weights, 25, chunk_bytes)
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_users_count_alike_whatever_their_items():
    rows = Rows(torch.tensor([0, 1, 1, 5]), torch.tensor([0, 0, 1, 2, 3]))
    torch.testing.assert_close(user_weights(rows, 0.5), torch.tensor([(1 / 2.5) ** -0.5, 0.0, (4 / 2.5) ** -0.5]))
    torch.testing.assert_close(user_weights(rows, 0.0), torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("form", FACTOR_FORMS, ids=str)
@pytest.mark.parametrize("dim", [3, 12, 40])
def test_factors_are_the_best_of_their_metric(form, dim):
    """Against alternating eigendecompositions in float64."""
    generator = torch.Generator().manual_seed(7)
    n = 40
    B = torch.randn(n, n, generator=generator).double() * torch.linspace(2, 0.02, n).double()
    B.fill_diagonal_(0.0)
    X = (torch.rand(90, n, generator=generator) < 0.2).double()
    M = X.T @ X + 1e-6 * torch.eye(n) if form.metric == "data" else torch.eye(n).double()

    def error(T, product):
        return float(((T - product).T @ M @ (T - product)).trace())

    T = B.clone()
    for _ in range(400):
        V = torch.linalg.eigh(T.T @ M @ T).eigenvectors[:, -dim:]
        if form.free_diagonal:
            T.diagonal().copy_(((T @ V) * V).sum(1))
    best = error(T, T @ V @ V.T)
    source, target = factorise(B, dim, M.matmul if form.metric == "data" else None, form.free_diagonal, steps=200)
    torch.testing.assert_close(target.T @ target, torch.eye(dim).double())
    if not form.free_diagonal:
        assert error(B, source @ target.T) <= best * (1 + 1e-6) + 1e-9
    residual = B - source @ target.T
    if form.free_diagonal:
        off = residual - residual.diagonal().diag()
        assert float((off.T @ M @ off).trace()) <= best * 1.02 + 1e-9
    # strongest first: the first columns are the factors of a lower rank
    energy = ((M @ source) * source).sum(0)
    assert (energy[:-1] >= energy[1:] * (1 - 1e-9)).all()


def test_incidence_is_the_dense_product_both_ways():
    _, _, X = interactions(seed=2)
    X[7] = False
    incidence, X = Incidence(rows_of(X), 25), X.double()
    items, users, values = torch.randn(25, 3).double(), torch.randn(60, 3).double(), torch.randn(int(X.sum())).double()
    weighted = torch.zeros_like(X)
    weighted[X.bool()] = values
    torch.testing.assert_close(incidence.to_rows(items), X @ items)
    torch.testing.assert_close(incidence.to_items(users), X.T @ users)
    torch.testing.assert_close(incidence.to_rows(items, values), weighted @ items)
    torch.testing.assert_close(incidence.to_items(users, values), weighted.T @ users)


@pytest.mark.parametrize("density", [0.02, 0.5])  # from the histories, from the matrix
def test_gram_product_is_the_gram_matrix(density):
    X = torch.rand(80, 90, generator=torch.Generator().manual_seed(0)) < density
    weights = user_weights(rows_of(X), 0.5)
    gram = (X.double().T * weights.double()) @ X.double()
    product = gram_product(rows_of(X), weights, gram, 90)
    assert (product == gram.matmul) == (density == 0.5)
    table = torch.randn(90, 4).double()
    torch.testing.assert_close(product(table), gram @ table)


def sharpening_problem(n=60, n_users=150, dim=6):
    generator = torch.Generator().manual_seed(1)
    X = torch.rand(n_users, n, generator=generator) < 0.12
    X[0] = False
    B = torch.randn(n, n, generator=generator).double()
    B.fill_diagonal_(0.0)
    weights = user_weights(rows_of(X), 0.5)
    gram = (X.double().T * weights.double()) @ X.double()
    return rows_of(X), X.double(), B, weights, gram, factorise(B, dim, gram.matmul, False)


def sharpening_objective(X, B, weights, gram, P, Q, places=5, emphasis=30.0, single=0.2):
    rows = torch.cat([X[1:], torch.eye(len(B)).double()])
    w = torch.cat([weights[1:].double(), torch.full((len(B),), single * float(gram.diagonal().mean()))])
    full = rows @ B
    masked = full.masked_fill(rows.bool(), -torch.inf)
    counts = torch.zeros_like(full).scatter_(1, masked.topk(places).indices, emphasis) + 1
    return float((w[:, None] * counts * (full - rows @ P @ Q.T).square()).sum())


def test_sharpening_descends_to_the_minimum_of_its_objective():
    train, X, B, weights, gram, (P, Q) = sharpening_problem()

    def sharpened(sweeps, steps):
        return sharpen(B, P, Q, train, weights, gram.matmul, gram.diagonal(), places=5, sweeps=sweeps, steps=steps)

    def objective(factors):
        return sharpening_objective(X, B, weights, gram, *factors)

    start, once, twice = objective((P, Q)), objective(sharpened(1, 3)), objective(sharpened(2, 3))
    assert twice < once < start
    # one sweep with many steps is the exact solution of the systems in Q: no change of Q can improve on it
    source, target = sharpened(1, 60)
    best = objective((source, target))
    direction = torch.randn(target.shape, generator=torch.Generator().manual_seed(5)).double()
    for step in (1e-3, -1e-3):
        assert objective((source, target + step * direction)) > best
    torch.testing.assert_close(target.T @ target, torch.eye(6).double())


def test_sharpening_keeps_more_of_the_first_places():
    """Forty groups of items in sixteen directions: too few for an even approximation."""
    train, _, X = interactions(n_users=400, n_items=120, groups=40, seed=14)
    X, train = X[:, 1:-1], rows_of(X[:, 1:-1])
    B = fit_closed_form(train, 118, dim="full", setting=PLAIN).source
    weights = user_weights(train, 0.5)
    gram = weighted_gram(train, weights, 118)

    def kept(P, Q):
        def top(scores):
            return scores.masked_fill(X, -torch.inf).topk(5).indices

        return float((top(X.float() @ B)[:, :, None] == top(X.float() @ P @ Q.T)[:, None]).sum())

    P, Q = factorise(B, 16, gram.matmul, False)
    assert kept(*sharpen(B, P, Q, train, weights, gram.matmul, gram.diagonal(), places=20)) > 1.05 * kept(P, Q)


def test_sharpening_thins_out_its_rows_and_survives_short_catalogues(monkeypatch):
    train, X, B, weights, gram, (P, Q) = sharpening_problem()
    monkeypatch.setattr("recbole_llm.fitting.factors.MAX_PAIRS", 500)  # 100 of 209 rows
    emphasis = []

    def top_places(matrix, rows, row_weights, places):
        emphasis.append((len(row_weights), float(row_weights.sum())))
        return _top_places(matrix, rows, row_weights, places)

    monkeypatch.setattr("recbole_llm.fitting.factors._top_places", top_places)
    thin = sharpen(B, P, Q, train, weights, gram.matmul, gram.diagonal(), places=5)
    assert sharpening_objective(X, B, weights, gram, *thin) < sharpening_objective(X, B, weights, gram, P, Q)
    assert emphasis[0][0] == 100
    everyone = 30 * (float(weights[1:].sum()) + 60 * 0.2 * float(gram.diagonal().mean()))
    assert emphasis[0][1] == pytest.approx(everyone, rel=0.1), "the rows kept stand for all"
    every_place = sharpen(B, P, Q, train, weights, gram.matmul, gram.diagonal(), places=1000)
    assert every_place[0].isfinite().all()


def test_the_diagonal_never_changes_a_masked_ranking():
    train, valid, _ = interactions(seed=5)
    form = fit_closed_form(train, 25, dim="full", setting=PLAIN)
    other = form.source.clone()
    other.diagonal().copy_(torch.randn(25) * 100)

    def value(matrix):
        return user_metric(replace(form.block(), source=matrix).scorer(train), valid, train, 25, TopKMetric("ndcg", 5))

    assert torch.equal(value(form.source), value(other))


def spectral_problem(seed=15):
    train, valid, X = interactions(n_users=200, seed=seed)
    X = X[:, 1:-1]
    E = torch.randn(23, 4, generator=torch.Generator().manual_seed(seed))
    present = torch.ones(23, dtype=torch.bool)
    text = {"text": content_directions(E, present, content_centre(E, present))}
    weights = user_weights(rows_of(X), 0.5)
    return X, text, weights, weighted_gram(rows_of(X), weights, 23)


@pytest.mark.parametrize("ridge", [0.5, 8.0])
def test_the_svd_form_at_full_rank_is_the_exact_solution(ridge):
    X, text, weights, gram = spectral_problem()
    setting = Setting(ridge=ridge)
    metric = gram_product(rows_of(X), weights, None, 23)
    source, target = spectrum(metric, gram.diagonal(), text, setting, 23).factors(23)
    product = (source @ target.T).fill_diagonal_(0.0)
    torch.testing.assert_close(product, solve(gram, text, setting), rtol=1e-3, atol=1e-5)


def test_the_svd_form_below_full_rank_is_woodburys_identity():
    """Z replaced by its leading part and the rest of its diagonal, then inverted as a dense matrix in float64."""
    _, text, _, gram = spectral_problem()
    setting = Setting(ridge=2.0)
    found = spectrum(gram.matmul, gram.diagonal(), text, setting, 6, iterations=60)
    scale = gram.diagonal().mean()
    R = (setting.ridge * scale * (gram.diagonal() / scale) ** 0.25).double()
    Z = (gram + 0.05 * setting.ridge * scale * text["text"] @ text["text"].T).double() / (R[:, None] * R).sqrt()
    values, vectors = torch.linalg.eigh(Z)
    torch.testing.assert_close(found.values.double(), values.flip(0)[:6], rtol=1e-4, atol=1e-5)
    leading = (vectors[:, -6:] * values[-6:]) @ vectors[:, -6:].T
    A = (leading + (Z - leading).diagonal().diag() + torch.eye(23)) * (R[:, None] * R).sqrt()
    inverse = torch.linalg.inv(A)
    expected = -inverse / inverse.diagonal() * (gram.diagonal() / scale).double() ** -0.1
    source, target = found.factors(6)
    torch.testing.assert_close(
        (source @ target.T).double().fill_diagonal_(0.0), expected.fill_diagonal_(0.0), rtol=1e-3, atol=1e-5
    )


def test_the_svd_form_forms_no_matrix_of_all_items(monkeypatch):
    monkeypatch.setattr("recbole_llm.fitting.large_catalogue.SPECTRAL_DIMS", (2, 8, 16))
    monkeypatch.setattr(
        "recbole_llm.fitting.large_catalogue.SEARCH_DIM", 8
    )  # the constants are found at a lower rank than the last
    train, valid, _ = interactions(n_users=200, seed=6)
    E = torch.nn.functional.one_hot(torch.arange(25) % 5).float()
    form = fit_closed_form(train, 25, texts(E), validation=selection_of(train, valid), form="svd")
    dense = fit_closed_form(train, 25, texts(E), validation=selection_of(train, valid), dim="full")
    assert form.form == "SVD form"
    assert form.dim == 8, "five groups of items need five directions"
    assert form.value >= 0.98 * dense.value
    assert all(trial.setting.is_linear and trial.way == "SVD form of rank 8" for trial in form.trials)
    reached = user_metric(form.block().scorer(train), valid, train, 25, TopKMetric("ndcg", 5), ~form.warm).mean()
    assert float(reached) == pytest.approx(form.value)
    assert fit_closed_form(train, 25, texts(E), max_dense_items=10, dim=3).dim == 3
    small = fit_closed_form(train, 25, texts(E), form="svd", max_table_bytes=8 * 25 * 2)
    assert small.dim == 2
    assert small.value is None


def test_the_rank_of_the_svd_form_is_held_against_the_best_one(monkeypatch):
    """On ml-1m-text the largest rank is not the best: 1536 has .25135 of validation, 2048 .25105."""
    monkeypatch.setattr("recbole_llm.fitting.large_catalogue.SPECTRAL_DIMS", (2, 8, 16))
    by_rank = {2: 0.2506, 8: 0.25135, 16: 0.25105}
    monkeypatch.setattr(
        "recbole_llm.fitting.warm_items.WarmItems.value", lambda self, subset, P, Q: by_rank[P.shape[1]]
    )
    train, valid, _ = interactions(n_users=200, seed=6)
    form = fit_closed_form(train, 25, validation=selection_of(train, valid), form="svd")
    assert (form.dim, form.value) == (8, 0.25135)


def test_the_squared_kernel_has_no_svd_form():
    _, text, _, gram = spectral_problem()
    with pytest.raises(ValueError, match=r"kernels are .*power=2.*only power 1 can be had"):
        spectrum(gram.matmul, gram.diagonal(), text, of_text(0.05, 2), 4)


def test_constants_that_do_harm_give_way_to_plain_ease():
    train, valid, _ = interactions(n_users=200, seed=6)
    validation = selection_of(train, valid)
    harmful = Setting(user_exponent=3.0, ridge_exponent=-2.0, tilt=2.0)
    form = fit_closed_form(train, 25, validation=validation, dim="full", setting=harmful)
    assert form.setting == Setting.of_ease(form.setting.ridge)
    expected = fit_closed_form(train, 25, dim="full", setting=form.setting)
    torch.testing.assert_close(form.source, expected.source)
    assert form.value == max(trial.value for trial in form.trials)
    alone = max(trial.value for trial in form.trials if trial.setting.tilt)
    assert form.value > alone, "the constants did no harm"
    usual = fit_closed_form(train, 25, validation=validation)
    assert usual.setting.tilt == Setting().tilt and usual.value >= form.value


def test_auto_keeps_no_rank_below_ease_however_little_it_loses(monkeypatch):
    train, valid, _ = interactions(n_users=400, n_items=42, seed=6)
    monkeypatch.setattr("recbole_llm.fitting.closed_form.AUTO_DIMS", (1, 2, 4))
    validation = selection_of(train, valid)
    monkeypatch.setattr("recbole_llm.fitting.closed_form.RANK_TOLERANCE", 1.0)
    form = fit_closed_form(train, 42, validation=validation)
    ease = max(
        fit_closed_form(train, 42, validation=validation, dim="full", setting=replace(PLAIN, ridge=ridge)).value
        for ridge in (1.0, 2.0, 4.0)
    )
    assert form.dim > 1 and form.value >= ease - 1e-9


def test_a_rank_below_ease_is_called_out(caplog):
    train, valid, _ = interactions(n_users=200, seed=6)
    form = fit_closed_form(train, 25, validation=selection_of(train, valid), dim=1)
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"rank 1 has {form.value:.4f} on validation" in record.getMessage()
    assert "raise closed_form_dim" in record.getMessage()
    caplog.clear()
    fit_closed_form(train, 25, validation=selection_of(train, valid), dim=20)
    assert not caplog.records


def test_thinning_keeps_users_before_single_items():
    kept, shares = _thinned(100, 300, 200, torch.device("cpu"))
    assert int((kept < 100).sum()) == 100
    assert len(kept) == len(kept.unique()) == 200
    assert float(shares[kept >= 100].sum()) == pytest.approx(300)
    kept, shares = _thinned(1000, 50, 100, torch.device("cpu"))
    assert int((kept < 1000).sum()) == 50
    assert float(shares[kept < 1000].sum()) == pytest.approx(1000)
    kept, shares = _thinned(20, 30, 500, torch.device("cpu"))
    assert torch.equal(kept, torch.arange(50))
    assert shares.eq(1).all()


def test_the_rank_is_the_smallest_that_costs_little(monkeypatch):
    monkeypatch.setattr("recbole_llm.fitting.closed_form.AUTO_DIMS", (2, 5, 9))
    train, valid, _ = interactions(n_users=200, seed=6)
    validation = selection_of(train, valid)
    form = fit_closed_form(train, 25, validation=validation)
    full = fit_closed_form(train, 25, validation=validation, dim="full")
    assert form.dim == 5, "five groups of items need five directions"
    assert form.value >= 0.99 * full.value
    assert fit_closed_form(train, 25, validation=validation, dim=2).value < 0.99 * full.value
    reached = user_metric(form.block().scorer(train), valid, train, 25, TopKMetric("ndcg", 5), ~form.warm).mean()
    assert float(reached) == pytest.approx(form.value)


def test_a_number_a_large_number_and_a_small_budget(monkeypatch):
    train, valid, _ = interactions(seed=8)
    select = selection_of(train, valid)
    assert fit_closed_form(train, 25, validation=select, dim=4).dim == 4
    assert fit_closed_form(train, 25, validation=select, dim=600).target is None
    monkeypatch.setattr("recbole_llm.fitting.closed_form.AUTO_DIMS", (2, 3))
    monkeypatch.setattr("recbole_llm.fitting.closed_form.RANK_TOLERANCE", -9.0)
    assert fit_closed_form(train, 25, validation=select).target is None
    assert fit_closed_form(train, 25, validation=select, max_table_bytes=8 * 25 * 3).dim in (2, 3)


def test_the_same_data_give_the_same_bits():
    train, valid, _ = interactions(seed=9)
    E = torch.randn(25, 4, generator=torch.Generator().manual_seed(0))
    first, second = (
        fit_closed_form(train, 25, texts(E), validation=selection_of(train, valid), dim=6) for _ in range(2)
    )
    assert torch.equal(first.source, second.source)
    assert torch.equal(first.target, second.target)
    assert [t.value for t in first.trials] == [t.value for t in second.trials]


def test_text_helps_where_it_explains_the_interactions():
    train, valid, _ = interactions(n_users=40, n_items=60, seed=10)
    E = torch.nn.functional.one_hot(torch.arange(60) % 5).float() + 0.1 * torch.randn(60, 5)
    form = fit_closed_form(train, 60, texts(E), validation=selection_of(train, valid), dim="full")
    assert form.setting.kernel("text").weight > 0
    without = [trial.value for trial in form.trials if not trial.setting.kernel("text").weight]
    assert form.value > max(without)


def test_no_text_at_all_and_texts_that_are_all_the_same():
    train, valid, _ = interactions(seed=11)
    without = fit_closed_form(train, 25, validation=selection_of(train, valid), dim="full")
    same = fit_closed_form(train, 25, texts(torch.ones(25, 3)), validation=selection_of(train, valid), dim="full")
    nowhere = texts(torch.randn(25, 3), torch.zeros(25, dtype=torch.bool))
    absent = fit_closed_form(train, 25, nowhere, selection_of(train, valid), dim="full")
    assert without.setting.kernels == same.setting.kernels == absent.setting.kernels == ()
    assert torch.equal(without.source, same.source)
    assert torch.equal(without.source, absent.source)


def test_users_without_history_and_empty_validation():
    train, valid, X = interactions(seed=12)
    empty = Rows(torch.zeros_like(train.offsets), torch.empty(0, dtype=torch.int64))
    form = fit_closed_form(train, 25, validation=selection_of(train, empty), dim=4)
    assert form.value is None and form.trials == ()
    assert form.setting == Setting(ridge=8.0, kernels=())
    X[:5] = False
    form = fit_closed_form(rows_of(X), 25, validation=selection_of(rows_of(X), valid), dim=4)
    assert form.block().scorer(rows_of(X))(torch.arange(5)).eq(0).all()
    assert form.source.isfinite().all()


def test_an_indefinite_kernel_still_gives_the_formula():
    """The signed square of a kernel need not be positive semidefinite; a huge weight makes A indefinite."""
    _, _, X = interactions(seed=13)
    X = X[:, 1:-1]
    E = torch.randn(23, 3, generator=torch.Generator().manual_seed(2))
    present = torch.ones(23, dtype=torch.bool)
    setting = of_text(5.0, 2, ridge=8.0)
    text = content_directions(E, present, content_centre(E, present))
    gram = weighted_gram(rows_of(X), user_weights(rows_of(X), 0.5), 23)
    K = text @ text.T
    A = gram + 40 * gram.diagonal().mean() * K * K.abs()
    A.diagonal().add_(8 * gram.diagonal().mean() * (gram.diagonal() / gram.diagonal().mean()) ** 0.25)
    assert float(torch.linalg.eigvalsh(A)[0]) < 0, "this data no longer reaches the branch"
    expected = dense_formula(X, E, present, setting)
    torch.testing.assert_close(solve(gram, {"text": text}, setting), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"content": texts(torch.ones(24, 2))}, "text has 24 rows; expected one per item, n_items = 25"),
        ({"content": texts(torch.ones(25, 2), torch.ones(3, dtype=torch.bool))}, r"present of text has shape \(3,\)"),
        ({"dim": "big"}, "dim is 'big'; expected 'auto', 'full' or a positive number"),
        ({"dim": 0}, "dim is 0"),
        ({"dim": True}, "dim is True"),
        ({"n_items": 9}, "but n_items is 9"),
    ],
)
def test_mistakes_are_named(arguments, message):
    train, _, _ = interactions()
    with pytest.raises(ValueError, match=message):
        fit_closed_form(train, **{"n_items": 25, **arguments})


def test_no_interaction_is_an_error():
    empty = Rows(torch.zeros(4, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="train holds no interaction"):
        fit_closed_form(empty, 5)
