"""The search of the closed form's constants: on known curves, and on many items against exact solutions of every setting."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from made_interactions import interactions, of_text, selection_of, texts

from recbole_llm.fitting import closed_form, hyperparameters
from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.ease import Kernel, Setting, inverse_in_place, solve, user_weights, weighted_gram
from recbole_llm.fitting.factors import factorise
from recbole_llm.fitting.hyperparameters import KERNELS, kernel_candidates, search_setting
from recbole_llm.fitting.validation import user_metric
from recbole_llm.fitting.warm_items import WarmItems, warm_items
from recbole_llm.scoring.score import LinearBlock

TEXT = {"text": [Kernel("text", weight, power) for weight, power in KERNELS]}


def text_of(setting):
    kernel = setting.kernel("text")
    return kernel.weight, kernel.power


def test_search_walks_to_the_best_ridge_beyond_its_start():
    tried = []

    def value(setting):
        weight = setting.kernel("text").weight
        tried.append((weight, setting.ridge))
        peak = {0.05: 64.0, 0.2: 16.0, 0.0: 1.0}[weight]
        height = {0.05: 0.9, 0.2: 1.0, 0.0: 0.3}[weight]
        return height - 0.02 * abs(np.log2(setting.ridge / peak))

    best = search_setting(value, Setting(), TEXT)
    assert (best.ridge, best.kernels) == (16.0, (Kernel("text", 0.2, 2),))
    assert len(tried) == len(set(tried)), "a setting was solved twice"
    assert sum(text == 0.0 for text, _ in tried) == 1, "a hopeless kernel gets one ridge"


def test_search_gives_the_second_kernel_a_chance_at_the_ridge_found():
    heights = {(0.05, 8): 0.5, (0.05, 16): 0.6, (0.05, 32): 0.55, (0.2, 8): 0.4, (0.2, 16): 0.7, (0.0, 8): 0.1}
    best = search_setting(lambda setting: heights[text_of(setting)[0], int(setting.ridge)], Setting(), TEXT)
    assert (text_of(best), best.ridge) == ((0.2, 2), 16.0)


BOTH = TEXT | {"image": [Kernel("image", weight, power) for weight, power in KERNELS]}


def curve(peaks):
    """A value of (text weight, image weight) pairs: a height, and the ridge at which it is reached."""
    tried = []

    def value(setting):
        key = setting.kernel("text").weight, setting.kernel("image").weight
        height, peak = peaks.get(key, (0.0, 8.0))
        tried.append((*key, setting.ridge))
        return height - 0.02 * abs(np.log2(setting.ridge / peak))

    return value, tried


def test_a_further_modality_is_searched_at_a_ridge_of_its_own():
    """Text helps with a small ridge and nothing at the large one that is best without it."""
    peaks = {(0.0, 0.0): (0.8, 64.0), (0.05, 0.0): (0.6, 8.0), (0.0, 0.05): (0.85, 4.0), (0.0, 0.2): (0.5, 8.0)}
    value, tried = curve(peaks)
    best = search_setting(value, Setting(kernels=()), BOTH)
    assert (best.ridge, text_of(best)[0], best.kernel("image").weight) == (4.0, 0.0, 0.05)
    assert value(replace(best, ridge=64.0)) < 0.8
    tried.pop()
    assert len(tried) == len(set(tried)), "a setting was solved twice"
    # and beside a kernel at the ridge of both
    value, _ = curve({(0.05, 0.0): (0.7, 16.0), (0.05, 0.2): (0.9, 16.0)})
    best = search_setting(value, Setting(kernels=()), BOTH)
    assert (best.ridge, best.kernels) == (16.0, (Kernel("text", 0.05), Kernel("image", 0.2, 2)))


def test_a_modality_that_another_makes_needless_is_left_out():
    value, _ = curve({(0.05, 0.0): (0.7, 8.0), (0.05, 0.05): (0.8, 8.0), (0.0, 0.05): (0.85, 8.0)})
    best = search_setting(value, Setting(kernels=()), BOTH)
    assert (text_of(best)[0], best.kernel("image").weight) == (0.0, 0.05)
    value, _ = curve({(0.05, 0.0): (0.7, 8.0), (0.05, 0.05): (0.8, 8.0), (0.0, 0.05): (0.79, 8.0)})
    assert search_setting(value, Setting(kernels=()), BOTH).kernels == (Kernel("text", 0.05), Kernel("image", 0.05))


def test_a_modality_that_enters_from_the_start_can_be_left_out():
    """Where the search starts from a setting with kernels of its own."""
    value, _ = curve({(0.05, 0.05): (0.5, 8.0), (0.0, 0.05): (0.6, 8.0), (0.0, 0.0): (0.7, 8.0)})
    start = Setting(kernels=(Kernel("text", 0.05), Kernel("image", 0.05)))
    best = search_setting(value, start, BOTH)
    assert (text_of(best)[0], best.kernel("image").weight) == (0.0, 0.0)
    assert search_setting(lambda setting: 0.0, start, {}) == start


def test_search_keeps_the_other_constants():
    base = Setting(tilt=0.3, user_exponent=0.1, ridge_exponent=0.0)
    best = search_setting(lambda setting: 0.0, base, TEXT)
    assert best == base


def test_popular_items_are_a_catalogue_of_their_own():
    train, valid, X = interactions(n_users=80, seed=3)
    E = torch.randn(25, 4, generator=torch.Generator().manual_seed(1))
    items = warm_items(train, texts(E), 25)
    part, places = items.popular(16)
    count = X.sum(0)
    assert len(part.items) == 16
    assert int(count[part.items].min()) >= int(count[~part.warm].max())
    assert torch.equal(part.items, items.items[places])
    assert torch.equal(part.warm.nonzero().squeeze(1), part.items)
    assert torch.equal(part.content["text"], items.content["text"][places])
    held = torch.zeros(80, 16, dtype=torch.bool)
    held[part.train.row_of_entry(), part.train.ids] = True
    assert torch.equal(held, X[:, part.items])
    # the popular items score as given, the others get no place: targets among these are missed
    users = torch.nonzero(held.any(1) & (valid.sizes > 0)).squeeze(1)  # without a popular item all scores are tied
    subset = selection_of(train.select(users), valid.select(users))
    scores = torch.rand(16, 16, generator=torch.Generator().manual_seed(2))
    full = torch.zeros(25, 25)
    full[part.items[:, None], part.items] = scores
    found = part.value(subset, scores, None)
    inside = subset.targets.keep(part.warm[subset.targets.ids])
    scorer = LinearBlock("x", full).scorer(subset.history.keep(part.warm[subset.history.ids]))
    values = user_metric(scorer, inside, subset.seen, 25, subset.metric, excluded=~part.warm)
    assert found == pytest.approx(float(values.sum()) / int((subset.targets.sizes > 0).sum()))


def test_a_part_is_solved_in_the_units_of_the_whole():
    """The inverse of a principal submatrix of A, in float64."""
    train, _, X = interactions(n_users=200, n_items=42, seed=4)
    E = torch.randn(42, 6, generator=torch.Generator().manual_seed(1))
    items = warm_items(train, texts(E), 42)
    setting = of_text(0.2, 2, ridge=3.0)
    gram = weighted_gram(items.train, user_weights(items.train, 0.5), len(items.items))
    part, places = items.popular(17)
    found = solve(gram[places][:, places], part.content, setting, gram.diagonal().mean())
    G, T = gram.double(), items.content["text"].double()
    g, K = G.diagonal().mean(), T @ T.T
    A = G + 0.2 * setting.ridge * g * K * K.abs()
    A += torch.diag(setting.ridge * g * (G.diagonal() / g) ** setting.ridge_exponent)
    inverse = torch.linalg.inv(A[places][:, places])
    expected = -inverse / inverse.diagonal() * (G.diagonal()[places] / g) ** -setting.tilt
    expected.fill_diagonal_(0.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("n", [1, 511, 513, 1100])
def test_the_inverse_takes_no_memory_of_its_own_and_is_symmetric(n):
    """Either side of the blocks in which the other triangle is filled."""
    X = torch.randn(n, n + 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = X @ X.T / n + torch.eye(n, dtype=torch.float64)
    taken = A.float()
    found = inverse_in_place(taken)
    assert found.data_ptr() == taken.data_ptr()
    assert torch.equal(found, found.T)
    torch.testing.assert_close(found.double(), torch.linalg.inv(A), rtol=1e-4, atol=1e-5)
    assert inverse_in_place(-torch.eye(n)) is None


@pytest.fixture
def many(monkeypatch):
    """The 40 items below are many; the exact solutions made of all of them, and of fewer."""
    monkeypatch.setattr(hyperparameters, "EXACT_ITEMS", 20)
    monkeypatch.setattr("recbole_llm.fitting.closed_form.EXACT_ITEMS", 20)
    monkeypatch.setattr(hyperparameters, "DIM", 12)
    solved = []

    def counted(gram, content, setting, scale=None):
        solved.append((len(gram), setting))
        if len(gram) == 20:  # popular items have a larger mean of their own
            assert scale is not None and 0 < scale < gram.diagonal().mean()
        return solve(gram, content, setting, scale)

    monkeypatch.setattr(hyperparameters, "solve", counted)
    return solved


def made(seed, text=True):
    train, valid, _ = interactions(n_users=400, n_items=42, seed=seed)
    noise = torch.randn(42, 5, generator=torch.Generator().manual_seed(seed))
    E = torch.nn.functional.one_hot(torch.arange(42) % 5).float() + 0.3 * noise
    return train, selection_of(train, valid), texts(E) if text else None


@pytest.mark.parametrize("seed", [6, 7, 8])
def test_many_items_are_searched_cheaply_and_lose_nothing(many, monkeypatch, seed):
    train, validation, content = made(seed)
    found = fit_closed_form(train, 42, content, validation, dim="full")
    whole = [setting for n, setting in many if n == 40]
    assert 1 <= len(whole) <= 4
    assert {n for n, _ in many} == {20, 40}
    assert found.value == max(trial.value for trial in found.trials if trial.way == "all items")
    monkeypatch.setattr(hyperparameters, "EXACT_ITEMS", 4096)
    exact = fit_closed_form(train, 42, content, validation, dim="full")
    assert found.value >= 0.98 * exact.value


@pytest.fixture
def few_share(monkeypatch):
    """Catalogues of which this is taken to be a small share of filled pairs."""
    monkeypatch.setattr(hyperparameters, "SPARSE_GRAM", 2.0)
    monkeypatch.setattr(hyperparameters, "DENSE_FROM", 3.0)
    monkeypatch.setattr(hyperparameters, "NEIGHBOURS", 12)


@pytest.mark.parametrize("seed", [6, 7, 8])
def test_sparse_catalogues_are_searched_by_neighbourhoods_and_lose_nothing(many, few_share, monkeypatch, seed):
    train, validation, content = made(seed)
    found = fit_closed_form(train, 42, content, validation, dim="full")
    assert {trial.way for trial in found.trials if trial.setting.tilt} <= {
        "neighbourhoods of 12",
        "20 popular items",
        "all items",
    }
    at_start = [
        t.setting for t in found.trials if t.way.startswith("neigh") and t.setting.ridge == 8 and t.setting.tilt
    ]
    assert {text_of(setting)[0] for setting in at_start} >= {0.0, 0.05, 0.2, 0.8, 3.2}
    assert found.value == max(trial.value for trial in found.trials if trial.way == "all items")
    monkeypatch.setattr(hyperparameters, "EXACT_ITEMS", 4096)
    exact = fit_closed_form(train, 42, content, validation, dim="full")
    assert found.value >= 0.98 * exact.value


def test_neighbourhoods_rank_settings_as_exact_solutions_of_the_same_users(few_share, monkeypatch):
    """With all items as neighbours both are the same, weights of the content above and below included."""
    monkeypatch.setattr(hyperparameters, "NEIGHBOURS", 42)
    train, validation, content = made(6)
    items = warm_items(train, content, 42)
    weights = user_weights(items.train, 0.5)
    gram = weighted_gram(items.train, weights, len(items.items))
    form = hyperparameters.Local(items, weights, validation.subset())
    exact = hyperparameters.Exact(items, gram, form.subset)
    for setting in (of_text(0.05), of_text(0.8), of_text(0.0), of_text(0.05, ridge=2.0), Setting.of_ease(8.0)):
        assert form(setting) == pytest.approx(exact(setting), rel=0.01)


@pytest.mark.parametrize(
    ("below", "dense", "forms"), [(0.01, 0.02, "S"), (1.1, 1.2, "L"), (0.01, 1.1, "LS"), (0.01, 1.1, "SL")]
)
def test_the_share_of_filled_pairs_chooses_the_form_and_validation_between(monkeypatch, below, dense, forms):
    monkeypatch.setattr(hyperparameters, "SPARSE_GRAM", below)
    monkeypatch.setattr(hyperparameters, "DENSE_FROM", dense)
    asked = []

    def value_of(letter):
        return lambda self, setting: (asked.append((letter, setting)), float(forms[0] == letter))[1]

    monkeypatch.setattr(hyperparameters.Local, "__call__", value_of("L"))
    monkeypatch.setattr(hyperparameters.Spectral, "__call__", value_of("S"))
    train, validation, content = made(6)
    items = warm_items(train, content, 42)
    gram = weighted_gram(items.train, user_weights(items.train, 0.5), len(items.items))
    base = of_text(0.2, 2)
    form, words = hyperparameters.search_form(items, gram, validation.subset(), base)
    assert isinstance(form, hyperparameters.Local if forms[0] == "L" else hyperparameters.Spectral)
    assert words.startswith("neighbourhoods" if forms[0] == "L" else "SVD form")
    assert sorted(asked) == ([] if len(forms) == 1 else [("L", base.linear()), ("S", base.linear())])


def test_content_weights_are_followed_and_then_the_ridge():
    tried = []

    def value(setting):
        weight = setting.kernel("text").weight
        tried.append((round(weight, 6), setting.ridge))
        peak = {0.05: 8.0, 0.2: 8.0, 0.8: 4.0, 3.2: 8.0}.get(round(weight, 6), 8.0)
        height = {0.05: 0.5, 0.2: 0.6, 0.8: 0.7, 3.2: 0.65}.get(round(weight, 6), 0.1)
        return height - 0.02 * abs(np.log2(setting.ridge / peak))

    best = hyperparameters.follow_weights(value, of_text(0.05), ["text", "image"])
    assert (text_of(best), best.ridge) == ((pytest.approx(0.8), 1), 4.0)
    assert len(tried) == len(set(tried)), "a setting was solved twice"
    falls = lambda setting: setting.kernel("text").weight  # noqa: E731
    assert hyperparameters.follow_weights(falls, of_text(16.0), ["text"]) == of_text(16.0)
    rises = lambda setting: -abs(setting.kernel("text").weight - 0.0125)  # noqa: E731
    assert text_of(hyperparameters.follow_weights(rises, of_text(0.05), ["text"]))[0] == pytest.approx(0.0125)
    assert hyperparameters.follow_weights(rises, of_text(0.0), ["text"]) == of_text(0.0)


def test_plain_ease_is_taken_on_many_items_too(many):
    train, validation, _ = made(6, text=False)
    harmful = Setting(user_exponent=3.0, ridge_exponent=-2.0, tilt=2.0)
    form = fit_closed_form(train, 42, validation=validation, dim="full", setting=harmful)
    assert form.setting == Setting.of_ease(form.setting.ridge)
    torch.testing.assert_close(form.source, fit_closed_form(train, 42, dim="full", setting=form.setting).source)


def test_ease_that_is_clearly_worse_is_not_solved_for_in_full(many, monkeypatch):
    train, validation, content = made(6)
    monkeypatch.setattr(hyperparameters, "CLOSE_EASE", -1.0)  # clearly worse, whatever its value
    form = fit_closed_form(train, 42, content, validation, dim="full")
    ease = [n for n, setting in many if setting == Setting.of_ease(setting.ridge)]
    assert ease and set(ease) == {20}, "it was compared on the popular items alone"
    assert form.setting.tilt


@pytest.mark.parametrize("better", [True, False])
def test_the_squared_kernel_is_solved_for_in_full_where_popular_items_prefer_it(many, monkeypatch, better):
    train, validation, content = made(6)
    value = WarmItems.value

    def changed(self, subset, source, target):
        squared = bool(many) and len(self.items) == 20 and many[-1][1].kernel("text").power == 2
        return value(self, subset, source, target) + (1.0 if better else -0.1) * squared

    monkeypatch.setattr(WarmItems, "value", changed)
    fit_closed_form(train, 42, content, validation, dim="full")
    assert {n for n, setting in many if setting.kernel("text").power == 2} == ({20, 40} if better else {20})


@pytest.mark.parametrize("far", [True, False])
def test_plain_ease_is_solved_for_on_sparse_data_unless_it_is_far_in_neighbourhoods(many, few_share, monkeypatch, far):
    monkeypatch.setattr(hyperparameters, "FAR_EASE", -1.0 if far else 1.0)
    train, validation, content = made(6)
    fit_closed_form(train, 42, content, validation, dim="full")
    ease = [n for n, setting in many if setting == Setting.of_ease(setting.ridge)]
    assert ease == ([] if far else [40])


def test_which_data_are_sparse():
    dense, few = torch.ones(5, 5), torch.eye(40)
    assert not hyperparameters.is_sparse(dense) and hyperparameters.is_sparse(few)


def test_sparse_data_keep_the_full_form_without_trying_ranks(many, monkeypatch):
    tried = []
    factorise_ = closed_form.factorise
    monkeypatch.setattr(closed_form, "factorise", lambda *a: (tried.append(a[1]), factorise_(*a))[1])
    monkeypatch.setattr(closed_form, "AUTO_DIMS", (3, 5, 8))
    monkeypatch.setattr(closed_form, "RANK_TOLERANCE", -9.0)
    monkeypatch.setattr(hyperparameters, "SPARSE_GRAM", 2.0)
    train, validation, content = made(6)
    assert fit_closed_form(train, 42, content, validation).target is None and tried == []
    # where the full form does not fit, ranks are tried, and on dense data they are too
    assert fit_closed_form(train, 42, content, validation, max_table_bytes=8 * 42 * 8).target is not None
    assert set(tried) == {3, 5, 8}
    tried.clear()
    monkeypatch.setattr(hyperparameters, "SPARSE_GRAM", 0.0)
    assert fit_closed_form(train, 42, content, validation).target is None and set(tried) == {3, 5, 8}


def test_many_items_keep_the_first_factors_that_lose_little(many, monkeypatch):
    tried = []
    monkeypatch.setattr("recbole_llm.fitting.closed_form.factorise", lambda *a: (tried.append(a[1]), factorise(*a))[1])
    monkeypatch.setattr("recbole_llm.fitting.closed_form.SHARPEN_ABOVE", 1.0)
    train, validation, content = made(6)
    fit_closed_form(train, 42, content, validation, dim=20)
    assert tried == [20]
    monkeypatch.setattr("recbole_llm.fitting.closed_form.SHARPEN_ABOVE", -9.0)
    tried.clear()
    fit_closed_form(train, 42, content, validation, dim=20)
    assert tried == [20, 20, 20]


@pytest.mark.parametrize(("missing", "kernels"), [(0, 3), (2, 3), (6, 4), (60, 1)])
def test_gaps_in_the_texts_are_counted_and_bring_a_lighter_kernel(missing, kernels):
    train, valid, _ = interactions(n_users=40, n_items=62, seed=10)
    vectors = torch.randn(62, 5, generator=torch.Generator().manual_seed(0))
    present = torch.ones(62, dtype=torch.bool)
    present[1 : 1 + missing] = False
    content = texts(vectors, present)
    form = fit_closed_form(train, 62, content, selection_of(train, valid), dim="full")
    tried = {text_of(trial.setting) for trial in form.trials if trial.setting.tilt}
    assert len(tried) == kernels
    assert (hyperparameters.LIGHT_KERNEL in tried) == (kernels == 4)
    found = kernel_candidates(warm_items(train, content, 62).content)
    assert {(kernel.weight, kernel.power) for kernel in found.get("text", [Kernel("text", 0.0)])} == tried
