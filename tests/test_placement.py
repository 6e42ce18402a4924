"""Cold items get vectors, bias and sources from their texts, and a place chosen by what validation or hidden items show."""

import pytest
import torch

from recbole_llm import placement
from recbole_llm.fitting.cold_start.placement import Evidence, ItemTables, choose_place, hidden_trials, map_items, place
from recbole_llm.fitting.validation import TopKMetric
from recbole_llm.scoring.rows import rows_from_pairs

N, U, F, V = 120, 300, 16, 6
METRIC = TopKMetric("ndcg", 5)


@pytest.fixture
def world():
    """Items whose vectors follow from their texts; 20 cold ones, whose interactions are all in validation."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(N, F, generator=generator)
    truth = features @ torch.randn(F, V, generator=generator) / F**0.5
    users = torch.randn(U, V, generator=generator)
    scores = users @ truth.T + 0.3 * torch.randn(U, N, generator=generator)
    top = scores.topk(30, 1).indices
    user = torch.arange(U).repeat_interleave(30)
    item = top.flatten()
    trained = torch.ones(N, dtype=torch.bool)
    trained[100:] = False
    late = ~trained[item] | (torch.rand(len(item), generator=generator) < 0.2)
    train = rows_from_pairs(user[~late], item[~late], U)
    valid = rows_from_pairs(user[late], item[late], U)
    popularity = torch.bincount(train.ids, minlength=N)
    evidence = Evidence(train, valid, METRIC, features, torch.ones(N, dtype=torch.bool), trained, popularity)
    bias = torch.full((N,), -3.0) + 0.1 * truth[:, 0]
    tables = ItemTables(torch.where(trained[:, None], truth, 0.0), torch.where(trained, bias, 0.0), (truth * 2,))
    return evidence, tables, lambda rows: users[rows], truth, train


def refuse(left):
    raise AssertionError("fitted again although validation decides")


def test_a_text_that_is_not_trusted_gets_the_mean_bias_and_no_vector(world):
    evidence, tables, *_ = world
    # a ridge that large trusts no text
    found = map_items(tables, evidence, evidence.trained, torch.arange(100, 120), mu=1e6)
    assert found.bias == pytest.approx(float(tables.bias[:100].mean()), abs=1e-2)
    assert float(found.target.abs().max()) < 1e-2 and float(found.source.abs().max()) < 1e-2
    assert found.mean_bias == pytest.approx(float(tables.bias[:100].mean()))
    near = map_items(tables, evidence, evidence.trained, torch.arange(10), mu=1e-4)
    torch.testing.assert_close(near.target, tables.target[:10], rtol=0.02, atol=0.02)
    torch.testing.assert_close(near.source, tables.sources[0][:10], rtol=0.02, atol=0.02)


def test_where_validation_holds_cold_targets_they_decide(world):
    evidence, tables, queries, *_ = world
    told = []
    mu, boost = choose_place(evidence, torch.arange(100, 120), tables, queries, refuse, told.append)
    assert mu in placement.MUS and boost.joint and boost.gain > 0 and boost.warm_share >= 0.995
    assert "cold targets of validation" in told[0]


def test_without_a_cold_target_nothing_is_tried(world):
    evidence, tables, queries, *_ = world
    warm = evidence.targets.keep(evidence.trained[evidence.targets.ids])
    told = []
    no_target = Evidence(**(vars(evidence) | {"targets": warm}))
    _, boost = choose_place(no_target, torch.arange(100, 120), tables, queries, refuse, told.append)
    assert not boost.joint and "nothing to gain" in told[0]


def few_targets(evidence, count):
    cold = torch.nonzero(~evidence.trained[evidence.targets.ids]).squeeze(1)
    dropped = torch.ones(len(evidence.targets.ids), dtype=torch.bool)
    dropped[cold[count:]] = False
    return Evidence(**(vars(evidence) | {"targets": evidence.targets.keep(dropped)}))


def test_where_they_are_few_hidden_items_decide_and_their_interactions_are_gone(world):
    evidence, tables, queries, truth, train = world
    asked = []

    def refit(left):
        asked.append(left)
        return tables, queries

    told = []
    choose_place(few_targets(evidence, 50), torch.arange(100, 120), tables, queries, refit, told.append)
    assert len(asked) == 1 and "20 hidden items" in told[0]
    hidden = set(train.ids.tolist()) - set(asked[0].ids.tolist())
    assert len(hidden) == 20

    trials = hidden_trials(few_targets(evidence, 50), 20, refit, (1.0,))
    trial = trials[1.0]
    assert set(trial.ids.tolist()) == hidden and not trial.trained[trial.ids].any()
    assert not set(trial.seen.ids.tolist()) & hidden
    cold = torch.isin(trial.targets.ids, trial.ids)
    share = 50 / (len(few_targets(evidence, 50).targets.ids) - 50)  # as many of the targets as in validation
    assert int(cold.sum()) == pytest.approx(share * int((~cold).sum()), rel=0.35)
    # the tables' own rows of hidden items are not read: their scores come from their texts
    scores = trial.scores(torch.arange(5))
    expected = trial.queries[:5] @ trial.placed.target.T + trial.placed.bias
    torch.testing.assert_close(scores[:, trial.ids], expected)


def test_placed_items_score_as_the_trial_that_chose_them_said(world):
    evidence, tables, queries, *_ = world
    ids = torch.arange(100, 120)
    mu, boost = choose_place(evidence, ids, tables, queries, refuse, lambda text: None)
    cold = place(evidence, ids, tables, queries, boost, mu, (2, 3), bias_unit=0.5)
    assert cold.closed.shape == (20, 2) and cold.learned.shape == (20, V - 2)
    assert cold.closed_source.shape == (20, 3) and cold.learned_source.shape == (20, V - 3)
    assert (cold.kappa, cold.mu, cold.joint) == (boost.kappa, mu, True)
    mapped = map_items(tables, evidence, evidence.trained, ids, mu)
    torch.testing.assert_close(torch.cat([cold.closed, cold.learned], 1), boost.kappa * mapped.target + cold.shift)
    torch.testing.assert_close(cold.bias * 0.5, boost.kappa * mapped.bias)
    assert cold.mean_bias * 0.5 == pytest.approx(mapped.mean_bias)
    torch.testing.assert_close(torch.cat([cold.closed_source, cold.learned_source], 1), mapped.source)


def test_an_identity_that_is_not_stored_is_the_identity(world):
    evidence, tables, queries, truth, _ = world
    mask = evidence.trained[:, None]
    stored = ItemTables(torch.cat([torch.eye(N), tables.target], 1), tables.bias, tables.sources)
    short = ItemTables(tables.target, tables.bias, tables.sources, identity=True)
    x = torch.randn(7, N + V, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(short.scores(x), stored.scores(x), rtol=1e-4, atol=1e-4)
    ids = torch.arange(100, 120)
    first, second = (map_items(each, evidence, evidence.trained, ids, 1.0) for each in (short, stored))
    torch.testing.assert_close(first.target, second.target, rtol=1e-4, atol=1e-5)
    assert first.target.shape == (20, N + V) and not first.target[:, :N][:, ~mask[:, 0]].any()
