"""What an interaction says beside that it happened: its confidence in fit, loss and histories, and dislikes."""

from dataclasses import dataclass, replace

import pytest
import torch
from made_interactions import interactions, rows_of

from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.ease import Setting, gram_diagonal, user_weights, weighted_gram
from recbole_llm.fitting.factors import Incidence, gram_product
from recbole_llm.fitting.neighbourhood import sparse_gram
from recbole_llm.fitting.refit import Chosen, ChosenBlock
from recbole_llm.fitting.signals import DISLIKES, Signals, choose_dislikes, choose_signals, surely_best
from recbole_llm.fitting.validation import TopKMetric, Validation
from recbole_llm.scoring.block import LinearBlock
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.rows import Rows, rows_from_pairs, union
from recbole_llm.scoring.score import Score


@dataclass
class Options:
    blocks: tuple = ("closed_form", "learned")
    weight_exponent: float | str = "auto"
    dislike_weight: float | str = "auto"


def confident(rows, seed=0):
    values = torch.rand(len(rows.ids), generator=torch.Generator().manual_seed(seed)) * 3 + 0.1
    return replace(rows, confidence=values / values.mean())


def dense(rows, values, n_items):
    out = torch.zeros(len(rows.sizes), n_items, dtype=torch.float64)
    out[rows.row_of_entry(), rows.ids] = values.double()
    return out


# ---------------------------------------------------------------- rows


def test_repeats_add_their_confidence_up_and_entries_keep_theirs():
    user, item = torch.tensor([2, 0, 2, 2, 0]), torch.tensor([1, 3, 1, 0, 3])
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0])
    rows = rows_from_pairs(user, item, 4, torch.tensor([5, 1, 2, 3, 9]), confidence=weight)
    assert rows.ids.tolist() == [3, 0, 1] and rows.confidence.tolist() == [9.0, 4.0, 2.5]
    assert rows.ranks.tolist() == [0, 1, 0]
    assert rows.select(torch.tensor([2, 1, 0, 2])).confidence.tolist() == [4.0, 2.5, 9.0, 4.0, 2.5]
    assert rows.keep(torch.tensor([True, False, True])).confidence.tolist() == [9.0, 2.5]
    assert rows.stretch(1, 3).confidence.tolist() == [4.0, 2.5]
    assert rows.to("cpu").confidence.tolist() == rows.confidence.tolist()


def test_the_confidence_of_pairs_is_looked_up_and_1_where_there_is_none():
    rows = confident(interactions()[0])
    table = dense(rows, rows.confidence, 25)
    held = torch.tensor([rows.offsets[-2], 4, 9, 4])
    user = torch.cat([torch.tensor([59, 3, 0]), rows.row_of_entry()[held]])
    item = torch.cat([torch.tensor([24, 0, 0]), rows.ids[held]])
    expected = torch.where(table[user, item] > 0, table[user, item], 1.0)
    assert (expected == 1).any() and (expected != 1).any()
    torch.testing.assert_close(rows.confidence_of(user, item, 25).double(), expected)
    assert replace(rows, confidence=None).confidence_of(user, item, 25) is None
    assert rows.confidence_of(user[:0], item[:0], 25).tolist() == []


def test_signals_are_exponents_of_the_confidence():
    rows = replace(confident(interactions()[0]), weights=torch.full((len(interactions()[0].ids),), 2.0))
    c = rows.confidence.double()
    both = Signals(0.5, 1.0).applied(rows)
    torch.testing.assert_close(both.confidence.double(), c.sqrt() / c.sqrt().mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(both.weights.double(), 2 * c, rtol=1e-5, atol=1e-6)
    none = Signals().applied(rows)
    assert none.confidence is None and none.weights is rows.weights
    plain = replace(rows, confidence=None)
    assert Signals(1.0, 1.0).applied(plain) is plain
    assert Signals.from_state(both_state := Signals(0.5, 1.0).to_state()) == Signals(0.5, 1.0) and both_state
    assert Signals.from_state(None) == Signals()
    empty = Rows(torch.zeros(3, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), confidence=torch.zeros(0))
    assert Signals(1.0, 1.0).applied(empty).confidence.tolist() == []


# ---------------------------------------------------------------- X'WX


def weighted_world(seed=0):
    train, _, _ = interactions(seed=seed)
    train = confident(train)
    c = dense(train, train.confidence, 25)
    entries = replace(train, weights=train.confidence.sqrt())
    mass = c.sum(1)
    w = torch.where(mass > 0, (mass.clamp(min=1e-300) / mass[mass > 0].mean()) ** -0.5, 0.0)
    return train, entries, c, w


def test_the_gram_matrix_is_x_w_x_in_float64():
    _, entries, c, w = weighted_world()
    found = user_weights(entries, 0.5)
    torch.testing.assert_close(found.double(), w, rtol=1e-5, atol=0)
    X = c.sqrt()
    expected = X.T @ torch.diag(w) @ X
    for chunk in (1, 4 * 60 * 7, 2**28):
        torch.testing.assert_close(weighted_gram(entries, found, 25, chunk).double(), expected, rtol=1e-5, atol=1e-6)
    sparse = torch.from_numpy(sparse_gram(entries, found, 25).toarray())
    torch.testing.assert_close(sparse.double(), expected, rtol=1e-5, atol=1e-6)
    # its diagonal is the weighed mass of each item: c itself, not its root
    torch.testing.assert_close(expected.diagonal(), (w[:, None] * c).sum(0))
    torch.testing.assert_close(gram_diagonal(entries, found, 25).double(), expected.diagonal(), rtol=1e-5, atol=1e-6)
    table = torch.randn(25, 3, dtype=torch.float64)
    torch.testing.assert_close(gram_product(entries, found, None, 25)(table), expected @ table, rtol=1e-5, atol=1e-5)
    incidence, users = Incidence(entries, 25), torch.randn(60, 2, dtype=torch.float64)
    torch.testing.assert_close(incidence.to_rows(table), X @ table, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(incidence.to_items(users), X.T @ users, rtol=1e-5, atol=1e-5)


def test_the_closed_form_is_that_of_the_weighed_gram_matrix():
    train, _, c, w = weighted_world(seed=3)
    setting = Setting(3.0, (), user_exponent=0.5, ridge_exponent=0.25, tilt=0.1)
    form = fit_closed_form(train, 25, dim="full", setting=setting)
    warm = torch.nonzero(c.sum(0) > 0).squeeze(1)
    X = c.sqrt()[:, warm]
    G = X.T @ torch.diag(w) @ X
    d, g = G.diagonal(), G.diagonal().mean()
    P = torch.linalg.inv(G + torch.diag(3.0 * g * (d / g) ** 0.25))
    B = -P / P.diagonal() * (d / g) ** -0.1
    B.fill_diagonal_(0)
    torch.testing.assert_close(form.source[warm[:, None], warm].double(), B, rtol=1e-4, atol=1e-6)
    ones = fit_closed_form(
        replace(train, confidence=torch.ones_like(train.confidence)), 25, dim="full", setting=setting
    )
    plain = fit_closed_form(replace(train, confidence=None), 25, dim="full", setting=setting)
    torch.testing.assert_close(ones.source, plain.source)
    assert not torch.allclose(form.source, plain.source, rtol=0.05)


@pytest.mark.parametrize("way", ["sharpened factors", "SVD form"])
def test_low_ranks_come_near_the_weighed_solution(way):
    """Not that of the unweighed one."""
    train, _, _, _ = weighted_world(seed=5)
    setting = Setting(2.0, ())
    full = fit_closed_form(train, 25, dim="full", setting=setting).source
    plain = fit_closed_form(replace(train, confidence=None), 25, dim="full", setting=setting).source
    fixed = {"dim": 22} if way == "sharpened factors" else {"dim": 23, "max_dense_items": 0}
    form = fit_closed_form(train, 25, setting=setting, **fixed)
    off = ~torch.eye(25, dtype=torch.bool)
    error = ((form.source @ form.target.T) - full)[off].norm()
    assert error < 0.3 * (full - plain)[off].norm()


# ---------------------------------------------------------------- the loss


def made_loss(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor([3, 0, 5, 1])
    ids = torch.cat([torch.randperm(11, generator=generator)[:size].sort().values + 1 for size in sizes.tolist()])
    offsets = torch.tensor([0, *sizes.cumsum(0).tolist()])
    query, item = (torch.randn(n, 6, generator=generator).requires_grad_() for n in (4, 12))
    bias = torch.randn(12, generator=generator)
    bias[0] = -torch.inf
    return query, item, offsets, ids, bias.requires_grad_(), torch.rand(9, generator=generator) * 2 + 0.1


@pytest.mark.parametrize("loss_type", ["catalog_bce", "catalog_ce"])
def test_a_target_of_a_catalogue_loss_counts_its_confidence(loss_type):
    """Loss and gradients, against float64."""
    query, item, offsets, ids, bias, c = made_loss()
    rows = AllRows(12)
    found = rows.catalog_loss(
        loss_type, query, item, offsets, ids, bias=bias, neg_weight=0.7, backend="torch", confidence=c
    )
    got = torch.autograd.grad(found, (query, item, bias))
    q, w, b = (x.detach().double().requires_grad_() for x in (query, item, bias))
    s = (q @ w.T + b)[:, 1:]
    row = torch.repeat_interleave(torch.arange(4), offsets.diff())
    hot = torch.zeros(4, 11, dtype=torch.bool)
    hot[row, ids - 1] = True
    weight = torch.zeros(4, 11, dtype=torch.float64)
    weight[row, ids - 1] = c.double()
    soft = torch.nn.functional.softplus
    if loss_type == "catalog_bce":
        wanted = (weight * soft(-s)).sum() + 0.7 * soft(s)[~hot].sum()
    else:
        wanted = (weight * (s.logsumexp(1, keepdim=True) - s)).sum()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for a, e in zip(got, torch.autograd.grad(wanted, (q, w, b)), strict=True):
        torch.testing.assert_close(a[-11:].double(), e[-11:], rtol=1e-4, atol=1e-5)
    ones = {"bias": bias, "neg_weight": 0.7, "backend": "torch"}
    plain = rows.catalog_loss(loss_type, query, item, offsets, ids, **ones)
    same = rows.catalog_loss(loss_type, query, item, offsets, ids, confidence=torch.ones_like(c), **ones)
    torch.testing.assert_close(plain, same)


# ---------------------------------------------------------------- what validation chooses


def noisy_world(telling, seed=0, n_users=240, n_items=40):
    """Half of the interactions are noise; where ``telling``, a low confidence says which."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(5, (n_users,), generator=generator)
    own = group[:, None] == torch.arange(n_items) % 5
    liked = own & (torch.rand(n_users, n_items, generator=generator) < 0.7)
    noise = ~own & (torch.rand(n_users, n_items, generator=generator) < 0.3)
    liked[:, 0] = noise[:, 0] = False
    held = liked & (torch.rand(liked.shape, generator=generator) < 0.3)
    train = rows_of((liked | noise) & ~held)
    true = liked[train.row_of_entry(), train.ids]
    sure = true if telling else torch.rand(len(true), generator=generator) < 0.5
    values = torch.where(sure, 1.8, 0.2)
    history = replace(train, confidence=values / values.mean())
    validation = Validation(replace(history, confidence=None), rows_of(held), train, TopKMetric("ndcg", 5))
    return TrainingData(history, AllRows(n_items)), validation


def test_weights_that_tell_are_taken_and_others_set_aside(caplog):
    caplog.set_level("INFO")
    data, validation = noisy_world(telling=True)
    chosen = choose_signals(data, validation, Options())
    assert chosen.fit > 0 and chosen.history > 0
    data, validation = noisy_world(telling=False)
    caplog.clear()
    assert choose_signals(data, validation, Options()) == Signals()
    assert "set aside" in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_where_nothing_can_choose_they_count_as_given_or_as_told():
    data, validation = noisy_world(telling=True)
    assert choose_signals(data, None, Options()) == Signals(1.0, 1.0)
    assert choose_signals(data, validation, Options(blocks=("learned",))) == Signals(1.0, 1.0)
    assert choose_signals(data, validation, Options(weight_exponent=0.25)) == Signals(0.25, 0.25)
    equal = replace(data, history=replace(data.history, confidence=torch.ones(len(data.history.ids))))
    assert choose_signals(equal, validation, Options()) == Signals()
    bare = replace(data, history=replace(data.history, confidence=None))
    assert choose_signals(bare, validation, Options(weight_exponent=1.0)) == Signals()


def test_ordered_histories_fade_while_exponents_are_chosen():
    data, validation = noisy_world(telling=True)
    ranks = torch.cat([torch.arange(size).flip(0) for size in data.history.sizes.tolist()]).float()
    data = replace(data, history=replace(data.history, ranks=ranks))
    assert choose_signals(data, validation, Options()).history > 0


def test_a_gain_within_its_error_is_none():
    plain, gain = torch.tensor([0.2, 0.4, 0.6, 0.1]), torch.tensor([0.3, 0.5, 0.7, 0.2])
    luck = torch.tensor([0.9, 0.4, 0.6, 0.0])
    assert surely_best({0: plain, 1: gain}, 0) == 1
    assert surely_best({0: plain, 1: luck}, 0) == 0
    assert surely_best({0: plain, 1: plain - 0.1}, 0) == 0
    assert surely_best({0: plain[:1], 1: gain[:1]}, 0) == 0


def disliking_world(telling):
    """Users dislike items of the group that their few liked items are mistaken for."""
    data, validation = noisy_world(telling=False, seed=3)
    data = replace(data, history=replace(data.history, confidence=None))
    generator = torch.Generator().manual_seed(1)
    likes = torch.zeros(240, 40)
    likes[data.history.row_of_entry(), data.history.ids] = 1
    targets = torch.zeros(240, 40)
    targets[validation.targets.row_of_entry(), validation.targets.ids] = 1
    home = torch.stack([(targets + likes)[:, torch.arange(40) % 5 == g].sum(1) for g in range(5)], 1).argmax(1)
    other = (torch.arange(40) % 5) != home[:, None]
    against = (other if telling else ~other) & (likes + targets == 0)
    against = against & (torch.rand(240, 40, generator=generator) < 0.4)
    against[:, 0] = against[::7] = False
    closed = fit_closed_form(data.history, 40, dim="full").block()
    score = Score((closed,), data.rows.listed(), rows=data.rows)
    disliked = rows_of(against)
    seen = union(data.history, disliked)
    return replace(data, disliked=disliked), replace(validation, history=data.history, seen=seen), score


def test_dislikes_are_evidence_where_validation_gains(caplog):
    caplog.set_level("INFO")
    data, validation, score = disliking_world(telling=True)
    chosen = choose_dislikes(score, data, validation, Options()).block("closed_form")
    assert chosen.dislikes in DISLIKES[1:] and chosen.disliked is data.disliked
    caplog.clear()
    data, validation, score = disliking_world(telling=False)
    assert choose_dislikes(score, data, validation, Options()) is score
    assert "set aside" in caplog.text
    agreed = choose_dislikes(score, data, validation, Options(), agree=lambda chosen: 0.1).block("closed_form")
    assert agreed.dislikes == 0.1  # what another process of the group has chosen
    told = choose_dislikes(score, data, validation, Options(dislike_weight=0.3)).block("closed_form")
    assert told.dislikes == 0.3
    assert choose_dislikes(score, data, None, Options()) is score
    assert choose_dislikes(score, replace(data, disliked=None), validation, Options()) is score


def test_the_part_of_a_user_is_minus_d_times_what_is_disliked():
    source = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    disliked = Rows(torch.tensor([0, 2, 2, 3]), torch.tensor([1, 4, 5]))
    own = torch.randn(3, 3)
    block = LinearBlock("closed_form", source, source, dislikes=0.5, disliked=disliked, user_part=own)
    expected = own.double() - 0.5 * torch.stack([source[1] + source[4], torch.zeros(3), source[5]]).double()
    torch.testing.assert_close(block.part_of(torch.tensor([2, 0, 1, 2])).double(), expected[[2, 0, 1, 2]])
    assert replace(block, dislikes=0.0, user_part=None).part_of(torch.tensor([0])) is None


def test_choices_of_earlier_checkpoints_have_no_signals():
    chosen = Chosen(
        (ChosenBlock("closed_form", 1.0, None, "full", {}, dislikes=0.25),),
        Setting(),
        3,
        None,
        1.0,
        0.0,
        ProbabilityMap(),
        signals=Signals(0.5, 1.0),
    )
    state = chosen.to_state()
    assert Chosen.from_state(state) == chosen
    del state["signals"], state["blocks"][0]["dislikes"]
    older = Chosen.from_state(state)
    assert older.signals == Signals() and older.blocks[0].dislikes == 0.0
