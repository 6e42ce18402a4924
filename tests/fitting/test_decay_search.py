"""The joint choice of decays and factors against every blend of the grid, ranked whole in float64."""

import itertools

import pytest
import torch

from recbole_llm.fitting.decay_search import FOLLOWS, LEARNED, choose_fading
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.rows import rows_from_pairs

CLOSED, FOLLOWING = (None, 1.0, 4.0), (1.0, 3.0)
METRIC = TopKMetric("ndcg", 5)


class Case:
    """Random blocks of a few users, the last of whom have no target; item 0 and one more are excluded."""

    def __init__(self, users=40, items=30, targets=1, seed=0):
        g = torch.Generator().manual_seed(seed)
        self.n_items = items
        self.closed = {tau: torch.randn(users, items, generator=g) * 7 for tau in CLOSED}
        self.following = {tau: torch.randn(users, items, generator=g) / 50 for tau in FOLLOWING}
        self.learned = torch.randn(users, items, generator=g) * 3 - 10
        rows = torch.arange(users - 5).repeat_interleave(targets)
        self.targets = rows_from_pairs(rows, torch.randint(1, items - 1, (len(rows),), generator=g), users)
        hidden = torch.randint(1, items - 1, (users * 4,), generator=g)
        self.seen = rows_from_pairs(torch.arange(users).repeat(4), hidden, users)
        self.excluded = torch.zeros(items, dtype=torch.bool)
        self.excluded[[0, items - 1]] = True
        self.learned[:, 0] = -torch.inf  # as the model's padding

    def choose(self, following=True, learned=True, metric=METRIC, scale=1.0):
        def scorer(scores):
            return lambda rows: scores[rows]

        return choose_fading(
            {tau: scorer(s) for tau, s in self.closed.items()},
            {tau: scorer(s) for tau, s in self.following.items()} if following else {},
            scorer(self.learned * scale) if learned else None,
            self.targets,
            self.seen,
            metric,
            self.excluded,
        )

    def value(self, tau, following, factors, metric=METRIC):
        """The mean of the metric at k and 2k places, of the whole catalogue ranked in float64."""
        score = factors[0] * self.closed[tau].double()
        if following is not None:
            score += factors[1] * self.following[following].double()
        if factors[2]:
            score += factors[2] * self.learned.double()
        both = [
            user_metric(lambda r: score[r].clone(), self.targets, self.seen, self.n_items, m, self.excluded).mean()
            for m in (metric, TopKMetric(metric.name, 2 * metric.k))
        ]
        return float(sum(both) / 2)

    def deviation(self, scores):
        return float(scores[: len(scores) - 5, ~self.excluded].double().std(correction=0))


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("targets", [1, 3])
def test_the_best_of_every_blend_is_chosen(targets, seed):
    case = Case(targets=targets, seed=seed)
    choice = case.choose()
    values = []
    for tau, after, f, share in itertools.product(CLOSED, FOLLOWING, (0.0, *FOLLOWS), LEARNED):
        factors = (
            1 / case.deviation(case.closed[tau]),
            f / case.deviation(case.following[after]),
            share / case.deviation(case.learned),
        )
        values.append(case.value(tau, after, factors))
    assert choice.value == pytest.approx(max(values), abs=1e-12)
    assert case.value(choice.closed, choice.following, choice.factors) == pytest.approx(choice.value, abs=1e-12)
    assert max(values) > min(values) + 0.05  # there was something to choose


@pytest.mark.parametrize("name", ["recall", "mrr", "map", "hit", "precision"])
def test_the_value_is_the_metric_of_the_whole_catalogue(name):
    # 300 items, of which each row's candidates are some hundred
    case, metric = Case(items=300, seed=3), TopKMetric(name, 3)
    choice = case.choose(metric=metric)
    assert choice.value == pytest.approx(case.value(choice.closed, choice.following, choice.factors, metric), abs=1e-12)


def test_a_block_that_knows_the_targets_is_found_and_its_scale_does_not_matter():
    case = Case()
    case.learned[case.targets.row_of_entry(), case.targets.ids] = 40.0
    choice, larger = case.choose(), case.choose(scale=1000.0)
    assert choice.learned > 0 and choice.value > 0.9
    assert (larger.closed, larger.following, larger.follows, larger.learned, larger.value) == (
        choice.closed,
        choice.following,
        choice.follows,
        choice.learned,
        choice.value,
    )
    assert larger.factors[2] == pytest.approx(choice.factors[2] / 1000)


def test_a_decay_that_knows_the_targets_is_found():
    case = Case(seed=4)
    case.closed[1.0][case.targets.row_of_entry(), case.targets.ids] = 200.0
    assert case.choose().closed == 1.0
    case.following[3.0][case.targets.row_of_entry(), case.targets.ids] = 2.0
    del case.closed[1.0]
    assert case.choose().following == 3.0


def test_blocks_that_are_not_there_do_not_count():
    case = Case(seed=5)
    alone = case.choose(following=False, learned=False)
    assert (alone.following, alone.follows, alone.learned, alone.factors[1:]) == (None, 0.0, 0.0, (0.0, 0.0))
    assert alone.value == pytest.approx(max(case.value(tau, None, (1.0, 0.0, 0.0)) for tau in CLOSED), abs=1e-12)
    assert case.choose(following=False).following is None and case.choose(learned=False).learned == 0


def test_of_equals_the_one_with_fewer_blocks_is_chosen():
    case = Case(seed=6)
    for scores in (*case.closed.values(), *case.following.values(), case.learned):
        scores[:, 1:] = torch.arange(1.0, case.n_items)
    choice = case.choose()
    assert (choice.closed, choice.following, choice.learned) == (None, None, 0.0)


def test_a_block_whose_scores_do_not_vary_counts_nothing():
    case = Case(seed=7)
    case.learned[:, 1:] = 3.0
    choice = case.choose()
    assert choice.factors[2] == 0 and choice.value == case.choose(learned=False).value
