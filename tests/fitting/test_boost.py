"""The place of cold items among the others against an exhaustive search."""

import itertools
import math

import pytest
import torch

from recbole_llm.fitting.cold_start.boost import (
    KAPPAS,
    OFFSETS,
    ColdBoost,
    choose_cold_boost,
    deviation_direction,
    highest_place,
)
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.rows import rows_from_pairs

N_ITEMS = 30


def test_few_users_give_the_direction_that_many_columns_would():
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(20, 50, generator=generator), torch.rand(20, generator=generator)
    wide = x.double()
    gram = wide.T @ wide
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    expected = torch.linalg.solve(gram, wide.T @ d.double()).float()
    torch.testing.assert_close(deviation_direction(x, d), expected, rtol=1e-3, atol=1e-5)


def test_the_deviation_is_found_where_it_is_linear_in_the_user_vector():
    generator = torch.Generator().manual_seed(4)
    pooled, wanted = torch.rand(200, 6, generator=generator), torch.rand(6, generator=generator)
    torch.testing.assert_close(deviation_direction(pooled, pooled @ wanted, ridge=1e-9), wanted, rtol=1e-4, atol=1e-4)
    assert deviation_direction(torch.zeros(5, 3), torch.zeros(5)).eq(0).all()


def joint_problem(seed, cold_quality, n_users=80):
    """Scores whose cold columns are too small by a factor and as good as ``cold_quality`` says."""
    generator = torch.Generator().manual_seed(seed)
    cold = torch.arange(N_ITEMS) >= 22
    scale = torch.rand(n_users, 1, generator=generator) + 0.5
    truth = torch.randn(n_users, N_ITEMS, generator=generator)
    noise = torch.randn(n_users, N_ITEMS, generator=generator)
    scores = truth + 0.7 * noise
    scores[:, cold] = (cold_quality * truth + noise)[:, cold] * 0.4 + 0.5
    excluded = torch.zeros(N_ITEMS, dtype=torch.bool)
    excluded[0] = True
    relevant = (truth > 1.3) & ~excluded
    relevant[:4] = False
    seen = (torch.rand(n_users, N_ITEMS, generator=generator) < 0.15) & ~cold  # hidden items are not in the history
    rows = [rows_from_pairs(*mask.nonzero(as_tuple=True), n_users) for mask in (relevant, seen)]
    return scale * scores, rows[0], rows[1], cold, scale.squeeze(1), excluded


def exhaustive(scores, targets, seen, cold, deviations, excluded, metric, floor):
    """The same choice by the plain metric on whole score matrices."""
    warm_targets = targets.keep(~cold[targets.ids])

    def mean(matrix, wanted, out):
        return float(user_metric(lambda rows: matrix[rows].clone(), wanted, seen, N_ITEMS, metric, out).mean())

    joint_without, warm_without = (mean(scores, wanted, excluded | cold) for wanted in (targets, warm_targets))
    best = None
    for kappa, offset in itertools.product(KAPPAS, OFFSETS):
        boosted = scores.clone()
        boosted[:, cold] = boosted[:, cold] * kappa + offset * deviations[:, None]
        gain = mean(boosted, targets, excluded) / joint_without - 1
        share = mean(boosted, warm_targets, excluded) / warm_without
        if share >= floor and gain > (best[2] if best else 0):
            best = (kappa, offset, gain, share)
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("floor", [0.9, 0.97])
def test_boost_is_that_of_an_exhaustive_search(seed, floor, monkeypatch):
    monkeypatch.setattr("recbole_llm.fitting.cold_start.boost.CHUNK_ELEMENTS", 13 * N_ITEMS)
    scores, targets, seen, cold, deviations, excluded = joint_problem(seed, cold_quality=1.5)
    metric = TopKMetric("ndcg", 5)
    expected = exhaustive(scores, targets, seen, cold, deviations, excluded, metric, floor)
    got = choose_cold_boost(
        lambda rows: scores[rows].clone(), targets, seen, cold, metric, deviations, excluded, warm_floor=floor
    )
    if expected is None:
        assert got == ColdBoost(joint=False)
    else:
        assert got.joint
        assert (got.kappa, got.offset) == expected[:2]
        assert (got.gain, got.warm_share) == pytest.approx(expected[2:])


def test_boost_cases_reach_both_answers():
    metric = TopKMetric("ndcg", 5)
    assert any(exhaustive(*joint_problem(seed, 1.5), metric, 0.9) is not None for seed in range(4))
    scores, targets, seen, cold, deviations, excluded = joint_problem(0, cold_quality=-3.0)
    harmful = choose_cold_boost(lambda rows: scores[rows].clone(), targets, seen, cold, metric, deviations, excluded)
    assert harmful == ColdBoost(joint=False)
    assert "left out" in str(harmful)


def test_nothing_to_measure_leaves_cold_items_out():
    scores, targets, seen, cold, deviations, excluded = joint_problem(1, 1.5)
    metric = TopKMetric("recall", 5)

    def scorer(rows):
        return scores[rows].clone()

    only_warm = targets.keep(~cold[targets.ids])
    only_cold = targets.keep(cold[targets.ids])
    assert not choose_cold_boost(scorer, only_warm, seen, cold, metric, deviations, excluded).joint
    assert not choose_cold_boost(scorer, only_cold, seen, cold, metric, deviations, excluded).joint
    nothing = targets.keep(torch.zeros(len(targets.ids), dtype=torch.bool))
    assert not choose_cold_boost(scorer, nothing, seen, cold, metric, deviations, excluded).joint
    assert math.isnan(ColdBoost(True).gain)
    assert "factor 1, offset 0" in str(ColdBoost(True))


@pytest.mark.parametrize("seed", range(3))
def test_the_highest_place_is_the_largest_offset_that_keeps_the_warm_items(seed):
    scores, targets, seen, cold, deviations, excluded = joint_problem(seed, 1.5)
    metric, wanted = TopKMetric("ndcg", 5), targets.keep(~cold[targets.ids])

    def warm(offset):
        matrix = scores.clone()
        matrix[:, cold] += offset * deviations[:, None]
        out = excluded if offset > -math.inf else excluded | cold
        return float(user_metric(lambda rows: matrix[rows].clone(), wanted, seen, N_ITEMS, metric, out).mean())

    for floor in (0.9, 0.97, 1.1):
        kept = [offset for offset in OFFSETS if warm(offset) >= floor * warm(-math.inf)]
        got = highest_place(
            lambda rows: scores[rows].clone(), wanted, seen, cold, metric, deviations, excluded, warm_floor=floor
        )
        assert (got.joint, got.kappa, got.offset) == (True, 1.0, max(kept, default=min(OFFSETS)))
        if kept:
            assert got.warm_share == pytest.approx(warm(got.offset) / warm(-math.inf))
            assert "warm " in str(got) and "joint metric" not in str(got)
    nothing = wanted.keep(torch.zeros(len(wanted.ids), dtype=torch.bool))
    lowest = highest_place(lambda rows: scores[rows].clone(), nothing, seen, cold, metric, deviations, excluded)
    assert (lowest.joint, lowest.offset) == (True, min(OFFSETS))
