"""The gate of a fine-tuning: what differs by chance is left out, what is better stays."""

import math

import pytest
import torch

from recbole_llm.fitting.encoder_gate import interval, judge
from recbole_llm.fitting.finetune_recipe import Recipe
from recbole_llm.fitting.validation import TopKMetric, user_metric
from tests.fitting.made_interactions import rows_of

RECIPE = Recipe("text")
USERS, ITEMS, DIM, HIDDEN = 600, 80, 12, 2
NULLS = 40


def a_world(seed):
    """Users' queries, items' true vectors and the hidden items, drawn by the true scores."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(USERS, DIM, generator=generator)
    items = torch.randn(ITEMS, DIM, generator=generator) / math.sqrt(DIM)
    scores = 1.5 * queries @ items.T - torch.empty(USERS, ITEMS).exponential_(generator=generator).log()
    hidden = torch.zeros(USERS, ITEMS, dtype=torch.bool).scatter_(1, scores.topk(HIDDEN).indices, True)
    return queries, items, hidden, generator


def values_of(queries, items, hidden):
    """NDCG@10 of each user."""
    targets = rows_of(hidden)
    seen = rows_of(torch.zeros_like(hidden))
    return user_metric(lambda rows: queries[rows] @ items.T, targets, seen, ITEMS, TopKMetric("ndcg", 10))


def verdict_of(seed, noise, control_noise):
    """Two models whose item vectors are the true ones with noise of their own; all users see the same noise."""
    queries, items, hidden, generator = a_world(seed)
    tuned, control = (
        values_of(queries, items + each * torch.randn(items.shape, generator=generator) / math.sqrt(DIM), hidden)
        for each in (noise, control_noise)
    )
    return judge(tuned, control, torch.zeros_like(control), RECIPE, "NDCG@10")


@pytest.mark.slow
def test_of_forty_encoders_that_differ_by_chance_at_most_one_is_kept():
    kept = [seed for seed in range(NULLS) if verdict_of(seed, 0.3, 0.3).kept]
    assert len(kept) <= 1
    better = [verdict_of(seed, 0.3, 0.3).gain > 0 for seed in range(NULLS)]
    assert sum(better) > NULLS / 4  # a gate by "validation has risen" keeps these


def test_an_encoder_that_is_better_is_kept():
    verdict = verdict_of(0, 0.1, 0.6)
    assert verdict.kept and 0 < verdict.low < verdict.gain < verdict.high
    assert verdict.gain == pytest.approx(verdict.tuned - verdict.control)


def test_an_encoder_that_is_worse_than_before_the_fine_tuning_is_not_kept():
    tuned, control, start = (torch.full((600,), value, dtype=torch.float64) for value in (0.4, 0.3, 0.5))
    verdict = judge(tuned, control, start, RECIPE, "NDCG@10")
    assert verdict.low > 0 and not verdict.kept and "worse than before" in verdict.reason
    assert judge(tuned, control, control, RECIPE, "NDCG@10").kept


@pytest.mark.parametrize("users", [0, 1, 499])
def test_too_few_users_keep_nothing_however_large_the_gain(users):
    tuned = torch.full((users,), 0.9, dtype=torch.float64)
    verdict = judge(tuned, tuned - 0.5, tuned - 0.5, RECIPE, "NDCG@10")
    assert not verdict.kept and verdict.users == users and "too few" in verdict.reason


def test_the_interval_is_that_of_the_mean():
    generator = torch.Generator().manual_seed(1)
    difference = torch.randn(800, generator=generator, dtype=torch.float64)
    low, high = interval(difference, 0.05)
    error = float(difference.std()) / math.sqrt(800)
    assert low == pytest.approx(float(difference.mean()) - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(float(difference.mean()) + 1.96 * error, abs=0.15 * error)
    wider = interval(difference, 0.01)
    assert wider[0] < low and wider[1] > high
