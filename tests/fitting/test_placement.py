"""Cold items get vectors, bias and sources from their content, and a place chosen by what validation or hidden items show."""

import math
from dataclasses import replace

import pytest
import torch

from recbole_llm.fitting.cold_start import placement
from recbole_llm.fitting.cold_start.boost import OFFSETS, ColdBoost, deviation_direction
from recbole_llm.fitting.cold_start.kernel_ridge import MU
from recbole_llm.fitting.cold_start.placement import (
    Evidence,
    choose_place,
    hidden_trials,
    hide,
    map_items,
    place,
    validation_trials,
)
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.rows import pool, rows_from_pairs
from recbole_llm.scoring.score import LinearBlock, Score

N, U, F, V = 120, 300, 16, 6
METRIC = TopKMetric("ndcg", 5)
COLD = torch.arange(100, 120)


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
    content = {"text": (features, torch.ones(N, dtype=torch.bool))}
    evidence = Evidence(train, valid, METRIC, content, trained, popularity)
    bias = torch.full((N,), -3.0) + 0.1 * truth[:, 0]
    block = LinearBlock(
        "learned",
        source=truth * 2,
        target=torch.where(trained[:, None], truth, 0.0),
        bias=torch.where(trained, bias, 0.0),
        user_part=users - pool(truth * 2, train),  # so that the training histories give the users' own vectors
    )
    return evidence, Score((block,), trained.clone()), users, truth


def queries(score, history, users):
    return score.queries(history.select(users), score.user_parts(users))


def refuse(left):
    raise AssertionError("fitted again although validation decides")


def test_a_text_that_is_not_trusted_gets_the_mean_bias_and_no_vector(world):
    evidence, score, *_ = world
    block, mean = score.blocks[0], float(score.blocks[0].bias[:100].mean())
    # a ridge that large trusts no text
    found, bias = map_items(score, evidence, evidence.trained, COLD, mu=1e6)
    assert bias == pytest.approx(mean, abs=1e-2)
    torch.testing.assert_close(found.bias["learned"], bias)
    assert float(found.target["learned"].abs().max()) < 1e-2 and float(found.source["learned"].abs().max()) < 1e-2
    assert found.mean_bias == pytest.approx(mean)
    assert (found.ids.tolist(), found.mu) == (COLD.tolist(), 1e6)
    near, _ = map_items(score, evidence, evidence.trained, torch.arange(10), mu=1e-4)
    torch.testing.assert_close(near.target["learned"], block.target[:10], rtol=0.02, atol=0.02)
    torch.testing.assert_close(near.source["learned"], block.source[:10], rtol=0.02, atol=0.02)


def test_where_validation_holds_cold_targets_they_decide(world):
    evidence, score, *_ = world
    mu, boost, shares = choose_place(evidence, COLD, score, refuse)
    assert mu in placement.MUS and boost.joint and boost.gain > 0 and boost.warm_share >= 0.995


def without_cold_targets(evidence):
    return replace(evidence, targets=evidence.targets.keep(evidence.trained[evidence.targets.ids]))


def ranks(score, evidence, mu, boost, metric=METRIC):
    """Warm metric of validation's warm targets without and with the cold items at a place."""
    trial = validation_trials(evidence, COLD, score, (mu,))[mu]
    deviations = trial.deviations()
    padding = torch.zeros(N, dtype=torch.bool)

    def scorer(rows):
        scores = trial.scores(rows)
        scores[:, COLD] = boost.kappa * scores[:, COLD] + boost.offset * deviations[rows, None]
        return scores

    return [
        float(user_metric(scorer, trial.targets, trial.seen, N, metric, out).mean())
        for out in (~evidence.trained, padding)
    ]


@pytest.mark.parametrize("floor", [0.9, 0.998])
def test_without_a_cold_target_hidden_items_decide_and_the_cold_ones_take_part(world, floor, monkeypatch):
    evidence, score, users, truth = world
    warm, asked = without_cold_targets(evidence), []
    monkeypatch.setattr(placement, "UNTOLD_WARM_FLOOR", floor)

    def refit(left):
        asked.append(left)
        part = users - pool(truth * 2, left)  # so that what is left of the histories gives the users' own vectors too
        return score.with_blocks(replace(score.blocks[0], user_part=part)), left

    mu, boost, shares = choose_place(warm, COLD, score, refit)
    assert len(asked) == 1 and mu in placement.MUS
    assert boost.joint and boost.gain > 0 and boost.warm_share >= floor
    alone, present = ranks(score, warm, mu, boost)
    assert present >= (0.85 if floor == 0.9 else 0.99) * alone  # by other items than those that the place was chosen by


def test_too_few_interactions_to_tell_a_place_by(world, monkeypatch, caplog):
    evidence, score, *_ = world
    monkeypatch.setattr(placement, "LEAST_EVENTS", 10**6)
    warm = without_cold_targets(evidence)
    with caplog.at_level("INFO"):
        mu, boost, shares = choose_place(warm, COLD, score, refuse)
    assert mu == MU and boost.joint and boost.kappa == 1.0 and math.isnan(boost.gain)
    hidden = hide(warm, len(COLD))
    told = f"{len(hidden.ids)} hidden items of 100 have {hidden.events} interactions, and 1000000 are needed"
    assert told in caplog.text
    alone, present = ranks(score, warm, mu, boost)
    assert present / alone == pytest.approx(boost.warm_share, abs=2e-3) and boost.warm_share >= 0.998
    higher = [offset for offset in OFFSETS if offset > boost.offset]
    if higher:  # the next place costs the trained items more than they may lose
        alone, present = ranks(score, warm, mu, replace(boost, offset=min(higher)))
        assert present / alone < 0.999


@pytest.mark.parametrize("n_cold", [1, 20, 90])
def test_hidden_items_are_enough_to_tell_by_and_no_more_than_a_share(world, n_cold, monkeypatch):
    evidence = without_cold_targets(world[0])
    monkeypatch.setattr(placement, "LEAST_EVENTS", 300)
    found = hide(evidence, n_cold)
    lost = evidence.history.ids[torch.isin(evidence.history.ids, found.ids)]
    assert len(found.left.ids) == len(evidence.history.ids) - len(lost)
    assert not torch.isin(found.left.ids, found.ids).any()
    assert len(found.ids) <= 30 and (len(found.ids) >= n_cold or len(found.ids) == 30)
    hits = found.targets.ids[torch.isin(found.targets.ids, found.ids)]
    assert len(hits) == found.events >= 300
    # as often as the others, where that is more than the least
    rate = (len(found.targets.ids) - found.events) / len(found.left.ids)
    assert found.events == max(300, round(rate * len(lost)))
    if n_cold == 1:  # one more than it takes is not hidden
        assert len(lost) - int(evidence.popularity[found.ids].max()) < 300


def few_targets(evidence, count):
    cold = torch.nonzero(~evidence.trained[evidence.targets.ids]).squeeze(1)
    kept = torch.ones(len(evidence.targets.ids), dtype=torch.bool)
    kept[cold[count:]] = False
    return replace(evidence, targets=evidence.targets.keep(kept))


def test_where_they_are_few_hidden_items_decide_and_their_interactions_are_gone(world):
    evidence, score, *_ = world
    few, train = few_targets(evidence, 50), evidence.history
    asked = []

    def refit(left):
        asked.append(left)
        return score, left

    choose_place(few, COLD, score, refit)
    assert len(asked) == 1
    hidden = set(train.ids.tolist()) - set(asked[0].ids.tolist())
    assert len(hidden) == 20

    trial = hidden_trials(few, hide(few, 20), refit, (1.0,))[1.0]
    assert set(trial.ids.tolist()) == hidden and not trial.trained[trial.ids].any()
    assert not set(trial.seen.ids.tolist()) & hidden
    # users are asked with the histories that are left
    of_all = queries(score, asked[1], torch.arange(U))
    users = (trial.queries[:, None] == of_all).all(2).float().argmax(1)
    assert torch.equal(trial.queries, of_all[users]) and len(users.unique()) == len(users) > 250
    left = asked[1].select(users)
    assert torch.equal(trial.seen.ids, left.ids) and torch.equal(trial.seen.offsets, left.offsets)
    # the tables' own rows of hidden items are not read: their scores come from their texts
    scores = trial.scores(torch.arange(5))
    expected = trial.queries[:5] @ trial.target.T + trial.bias
    torch.testing.assert_close(scores[:, trial.ids], expected)


def two_blocks(world, identity):
    """The learned block at half its scale beside a closed form, whose targets are the identity or vectors."""
    evidence, score, users, truth = world
    matrix = (truth @ truth.T / 20 * evidence.trained).mul(evidence.trained[:, None])
    target = None if identity else torch.eye(N)
    closed = LinearBlock("closed_form", matrix, target, scale=0.8)
    learned = replace(score.blocks[0], scale=0.5)
    return evidence, replace(score, blocks=(closed, learned))


@pytest.mark.parametrize("identity", [False, True])
def test_placed_items_score_as_the_trial_that_chose_them_said(world, identity):
    evidence, score = two_blocks(world, identity)
    mu, boost, shares = choose_place(evidence, COLD, score, refuse)
    assert boost.joint
    boost = replace(boost, offset=-0.5)  # so that there is a shift
    placed = place(evidence, COLD, score, boost, mu)
    assert placed.listed.all() and not score.listed[COLD].any() and score.cold is None
    cold = placed.cold
    assert (cold.kappa, cold.mu, cold.joint) == (boost.kappa, mu, True)
    mapped, bias = map_items(score, evidence, evidence.trained, COLD, mu)
    widths = {"closed_form": N, "learned": V}
    for name, width in widths.items():
        assert cold.target[name].shape == cold.source[name].shape == (20, width)
        torch.testing.assert_close(cold.target[name], boost.kappa * mapped.target[name] + cold.shift[name])
        torch.testing.assert_close(cold.source[name], mapped.source[name])
    torch.testing.assert_close(cold.bias["learned"], boost.kappa * mapped.bias["learned"])
    torch.testing.assert_close(0.5 * mapped.bias["learned"], bias)  # units of the score, and of the block
    assert cold.mean_bias == mapped.mean_bias

    users = torch.arange(U)
    x = queries(score, evidence.history, users)
    trial = validation_trials(evidence, COLD, score, (mu,))[mu]
    of_trial = trial.scores(torch.arange(len(trial.queries)))[:, COLD]
    asked = torch.nonzero(evidence.targets.sizes).squeeze(1)
    shift = torch.cat([cold.shift[name] for name in widths])
    expected = boost.kappa * of_trial + (x[asked] @ shift)[:, None]
    # the histories hold no cold item, so that the queries are the same ones
    torch.testing.assert_close(
        placed.of_users(asked, evidence.history)[:, COLD], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
    deviations = score.of_users(users, evidence.history)[:, :100].std(1, correction=0)
    wanted = boost.offset * deviation_direction(x, deviations)
    torch.testing.assert_close(x @ shift, x @ wanted, rtol=1e-3, atol=1e-4)
    # trained items stand where they stood
    torch.testing.assert_close(
        placed.of_users(users, evidence.history)[:, :100], score.of_users(users, evidence.history)[:, :100]
    )


def test_an_identity_that_is_not_stored_is_the_identity(world):
    evidence, short = two_blocks(world, identity=True)
    _, stored = two_blocks(world, identity=False)
    users = torch.arange(U)
    torch.testing.assert_close(
        short.of_users(users, evidence.history), stored.of_users(users, evidence.history), rtol=1e-4, atol=1e-4
    )
    (first, bias), (second, same) = (map_items(each, evidence, evidence.trained, COLD, 1.0) for each in (short, stored))
    torch.testing.assert_close(bias, same)
    for name in ("closed_form", "learned"):
        torch.testing.assert_close(first.target[name], second.target[name], rtol=1e-4, atol=1e-5)
    rows = first.target["closed_form"]
    assert rows.shape == (20, N) and not rows[:, ~evidence.trained].any()
    boost = ColdBoost(True, 1.5, -0.25)
    one, two = (place(evidence, COLD, each, boost, 1.0) for each in (short, stored))
    torch.testing.assert_close(
        one.of_users(users, evidence.history), two.of_users(users, evidence.history), rtol=1e-3, atol=1e-3
    )


def test_items_left_out_have_their_rows_and_no_place(world):
    evidence, score = two_blocks(world, identity=True)
    users = torch.arange(7)
    out = place(evidence, COLD, score, ColdBoost(joint=False), 1.0)
    assert out.of_users(users, evidence.history)[:, COLD].eq(-torch.inf).all()
    assert not out.listed[COLD].any() and not out.cold.joint
    among = out.scores(evidence.history.select(users), out.user_parts(users), unlisted=True)[:, COLD]
    joint = place(evidence, COLD, score, ColdBoost(joint=True), 1.0)
    torch.testing.assert_close(among, joint.of_users(users, evidence.history)[:, COLD])
