"""The metric, and what it hides, against a plain loop."""

import math

import pytest
import torch

from recbole_llm.fitting.blend import score_deviation
from recbole_llm.fitting.validation import CHUNK_ELEMENTS, TopKMetric, hide_seen, user_metric
from recbole_llm.scoring.rows import Rows, rows_from_pairs
from recbole_llm.scoring.score import LinearBlock


def random_rows(n_rows, n_items, density, seed, empty=()):
    mask = torch.rand(n_rows, n_items, generator=torch.Generator().manual_seed(seed)) < density
    mask[list(empty)] = False
    row, item = mask.nonzero(as_tuple=True)
    return rows_from_pairs(row, item, n_rows)


def items_of(rows, row):
    return rows.ids[rows.offsets[row] : rows.offsets[row + 1]].tolist()


def metric_by_hand(name, k, ranking, targets):
    hits = [item in targets for item in ranking[:k]]
    places = [place for place, hit in enumerate(hits, start=1) if hit]
    reachable = min(len(targets), k)
    return {
        "hit": float(bool(places)),
        "precision": len(places) / k,
        "recall": len(places) / len(targets),
        "mrr": 1 / places[0] if places else 0.0,
        "map": sum((n + 1) / place for n, place in enumerate(places)) / reachable,
        "ndcg": sum(1 / math.log2(p + 1) for p in places) / sum(1 / math.log2(p + 1) for p in range(1, reachable + 1)),
    }[name]


@pytest.mark.parametrize("name", ["hit", "map", "mrr", "ndcg", "precision", "recall"])
@pytest.mark.parametrize("k", [1, 5, 40])  # 40 places, 30 items: the ranking is shorter
def test_metric_is_that_of_a_plain_loop(name, k, monkeypatch):
    n_users, n_items = 23, 30
    monkeypatch.setattr(
        "recbole_llm.fitting.validation.CHUNK_ELEMENTS", 7 * n_items
    )  # four chunks, the last one ragged
    scores = torch.rand(n_users, n_items, generator=torch.Generator().manual_seed(1))
    targets = random_rows(n_users, n_items, 0.1, seed=2, empty=(0, 9))
    seen = random_rows(n_users, n_items, 0.3, seed=3, empty=(4,))  # overlaps the targets: those keep their place
    excluded = torch.zeros(n_items, dtype=torch.bool)
    excluded[[0, 7]] = True
    expected = []
    for user in range(n_users):
        wanted = set(items_of(targets, user))
        if wanted:
            gone = (set(items_of(seen, user)) - wanted) | {0, 7}
            ranking = sorted(set(range(n_items)) - gone, key=lambda i: -float(scores[user, i]))
            expected.append(metric_by_hand(name, k, ranking, wanted))
    got = user_metric(lambda rows: scores[rows], targets, seen, n_items, TopKMetric(name, k), excluded)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_a_chunk_bounds_the_scores_held(monkeypatch):
    n_users, n_items = 50, 40
    for module in ("validation", "blend"):
        monkeypatch.setattr(f"recbole_llm.fitting.{module}.CHUNK_ELEMENTS", 4 * n_items)
    largest = 0

    def scorer(rows):
        nonlocal largest
        largest = max(largest, len(rows))
        return torch.rand(len(rows), n_items)

    rows = random_rows(n_users, n_items, 0.2, seed=0)
    user_metric(scorer, rows, rows, n_items, TopKMetric("ndcg", 3))
    score_deviation(scorer, torch.arange(n_users), n_items)
    assert largest == 4
    assert CHUNK_ELEMENTS < 2**28


def test_items_without_a_place_are_hidden_and_targets_keep_theirs():
    """hide_seen against a plain loop, with rows that are empty."""
    scores = torch.rand(9, 12, generator=torch.Generator().manual_seed(0))
    targets, seen = random_rows(9, 12, 0.2, seed=1, empty=(3,)), random_rows(9, 12, 0.5, seed=2, empty=(5,))
    excluded = torch.zeros(12, dtype=torch.bool)
    excluded[4] = True
    for wanted, out in ((targets, excluded), (targets, None), (None, excluded), (None, None)):
        expected = scores.clone()
        for user in range(9):
            own = set() if wanted is None else set(items_of(wanted, user))
            for item in set(items_of(seen, user)) - own | (set() if out is None else {4}):
                expected[user, item] = -math.inf
        got = scores.clone()
        relevant = hide_seen(got, seen, wanted, out)
        assert torch.equal(got, expected)
        if wanted is None:
            assert relevant is None
        else:
            assert [relevant[user].nonzero()[:, 0].tolist() for user in range(9)] == [
                items_of(wanted, u) for u in range(9)
            ]


def test_metric_names_are_recboles():
    assert TopKMetric.parse("NDCG@10") == TopKMetric("ndcg", 10)
    assert str(TopKMetric.parse(" mrr@ 5")) == "MRR@5"
    for text in ("auc", "ndcg@0", "ndcg", "recall@-1"):
        with pytest.raises(ValueError, match="expected one of hit, map"):
            TopKMetric.parse(text)


def test_rows_must_match():
    with pytest.raises(ValueError, match="seen has 2 rows and targets 3"):
        user_metric(
            lambda rows: torch.rand(len(rows), 4),
            random_rows(3, 4, 0.5, 0),
            random_rows(2, 4, 0.5, 0),
            4,
            TopKMetric("hit", 1),
        )


@pytest.mark.parametrize("weighted", [False, True])
def test_the_scores_of_a_block_are_the_dense_product(weighted):
    history = random_rows(9, 12, 0.3, seed=5, empty=(2,))
    if weighted:
        history = Rows(history.offsets, history.ids, torch.rand(len(history.ids)))
    dense = torch.zeros(9, 12)
    dense[history.row_of_entry(), history.ids] = 1.0 if history.weights is None else history.weights
    source, target, bias = torch.randn(12, 5), torch.randn(12, 5), torch.randn(12)
    rows = torch.tensor([8, 2, 2, 0])
    got = LinearBlock("x", source, target, bias=bias).scorer(history)(rows)
    torch.testing.assert_close(got, (dense @ source @ target.T + bias)[rows])
    matrix = torch.randn(12, 12)
    torch.testing.assert_close(LinearBlock("x", matrix).scorer(history)(rows), (dense @ matrix)[rows])
