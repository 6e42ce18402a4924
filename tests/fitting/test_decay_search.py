"""The joint choice of decays and factors against every blend of the grid, ranked whole in float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from recbole_llm.fitting.decay_search import CONTENT, FOLLOWS, LEARNED, choose_fading
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


@pytest.mark.parametrize("rounded", [0, 1])
def test_a_block_whose_scores_do_not_vary_counts_nothing(rounded):
    case = Case(seed=7)
    up = torch.tensor(3.0).nextafter(torch.tensor(4.0)) - 3.0
    case.learned[:, 1:] = 3.0 + rounded * up * (torch.rand(case.learned[:, 1:].shape) < 0.5)
    choice = case.choose()
    assert choice.factors[2] == 0 and choice.value == case.choose(learned=False).value


def with_content(case, seed=9):
    g = torch.Generator().manual_seed(seed)
    return {tau: torch.randn(case.following[tau].shape, generator=g) / 50 for tau in FOLLOWING}


def choose_with_content(case, content, learned=True):
    def scorer(scores):
        return lambda rows: scores[rows]

    return choose_fading(
        {tau: scorer(s) for tau, s in case.closed.items()},
        {tau: scorer(s) for tau, s in case.following.items()},
        scorer(case.learned) if learned else None,
        case.targets,
        case.seen,
        METRIC,
        case.excluded,
        {tau: scorer(s) for tau, s in content.items()},
    )


def value_with_content(case, choice, content):
    """The whole catalogue ranked in float64, as ``Case.value``."""
    plain, kept = case.learned, case.learned
    if choice.content is not None:  # the learned block's place carries the content beside it
        kept = choice.factors[2] * plain.double() + choice.content_factor * content[choice.content].double()
        kept[:, 0] = -torch.inf
        case.learned = kept
        found = case.value(choice.closed, choice.following, (*choice.factors[:2], 1.0))
        case.learned = plain
        return found
    return case.value(choice.closed, choice.following, choice.factors)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("learned", [True, False])
def test_content_is_weighed_beside_the_transitions_and_no_single_change_is_better(seed, learned):
    case = Case(seed=seed)
    content = with_content(case, seed + 9)
    choice = choose_with_content(case, content, learned)
    assert value_with_content(case, choice, content) == pytest.approx(choice.value, abs=1e-12)
    # at least the best in which content fades with its transitions at their weight
    best = 0.0
    for tau, after, f, share in itertools.product(CLOSED, FOLLOWING, FOLLOWS, LEARNED if learned else (0.0,)):
        unit = f / case.deviation(case.following[after])
        total = case.following[after] + content[after]
        beside = dict(case.following)
        case.following = beside | {after: total}
        found = case.value(
            tau, after, (1 / case.deviation(case.closed[tau]), unit, share / case.deviation(case.learned))
        )
        case.following = beside
        best = max(best, found)
    assert choice.value >= best - 1e-12
    # and no other decay or weight of the content alone is better
    if choice.following is not None:
        for tau, weight in itertools.product(FOLLOWING, CONTENT):
            factor = weight * choice.factors[1]
            other = replace(choice, content=tau, content_factor=factor)
            assert value_with_content(case, other, content) <= choice.value + 1e-12


def test_content_that_knows_the_targets_is_found_with_its_decay():
    case = Case(seed=11)
    content = with_content(case)
    content[3.0][case.targets.row_of_entry(), case.targets.ids] = 2.0
    choice = choose_with_content(case, content)
    assert choice.content == 3.0 and choice.content_factor > 0 and choice.value > 0.9


def test_content_that_misleads_is_left_out():
    case = Case(seed=12)
    case.following[1.0][case.targets.row_of_entry(), case.targets.ids] = 2.0
    content = {tau: torch.randn(40, 30, generator=torch.Generator().manual_seed(3)) * 5 for tau in FOLLOWING}
    choice = choose_with_content(case, content)
    assert (choice.following, choice.content, choice.content_factor) == (1.0, None, 0.0) and choice.value > 0.9


def test_content_of_other_decays_is_refused():
    case = Case()
    with pytest.raises(ValueError, match=r"content has the decays \[3.0\]; expected those of following, \[1.0, 3.0\]"):
        choose_with_content(case, {3.0: with_content(case)[3.0]})
