"""Order in a history: ranks, the next-item statistics against a plain count, and what validation makes of them."""

import math

import pytest
import torch
from recbole_llm.UNKNOWN import LinearScorer, ranked_rows

from recbole_llm.fitting.next_item import (
    choose_decay,
    decayed,
    fit_next_item,
    next_item_gram,
    solve_next_item,
)
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.rows import Rows, rows_from_pairs


def histories(sequences):
    """Rows with ranks of sequences, oldest first."""
    user = torch.tensor([u for u, s in enumerate(sequences) for _ in s])
    item = torch.tensor([i for s in sequences for i in s])
    return ranked_rows(user, item, len(sequences), torch.arange(len(user)))


def test_ranks_count_from_the_newest_and_a_repeated_item_counts_at_its_latest():
    rows = ranked_rows(torch.tensor([0, 0, 0, 1, 0]), torch.tensor([5, 3, 4, 9, 5]), 3, torch.tensor([1, 2, 3, 1, 9]))
    assert rows.offsets.tolist() == [0, 3, 4, 4]
    assert rows.ids.tolist() == [3, 4, 5, 9]
    assert rows.weights.tolist() == [2, 1, 0, 0]
    by_decay = rows_from_pairs(rows.row_of_entry(), rows.ids, 3, -rows.weights, decay=2.0)
    torch.testing.assert_close(decayed(rows, 2.0).weights, by_decay.weights)
    assert decayed(rows, None).weights is None


@pytest.mark.parametrize("tau", [3.0, 8.0])
def test_the_statistics_are_those_of_decayed_prefixes(tau):
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randperm(12, generator=generator)[:n].tolist() for n in (1, 2, 7, 12, 0, 9)]
    gram, follows = next_item_gram(histories(sequences), 12, tau)
    expected_gram, expected_follows = torch.zeros(12, 12), torch.zeros(12, 12)
    for sequence in sequences:
        for place in range(1, len(sequence)):
            z = torch.zeros(12)
            for back, item in enumerate(reversed(sequence[:place])):
                z[item] = math.exp(-back / tau)
            expected_gram += z[:, None] * z
            expected_follows[:, sequence[place]] += z
    torch.testing.assert_close(gram, expected_gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(follows, expected_follows, rtol=1e-4, atol=1e-5)


def test_the_solution_is_the_ridge_regression():
    sequences = [torch.randperm(12, generator=torch.Generator().manual_seed(s))[:9].tolist() for s in range(30)]
    gram, follows = next_item_gram(histories(sequences), 13, 3.0)
    C = solve_next_item(gram, follows, 2.0)
    diagonal = gram.diagonal()
    g = diagonal[diagonal > 0].mean()
    ridge = 2.0 * g * (diagonal / g) ** 0.25
    torch.testing.assert_close((gram + torch.diag(ridge)) @ C, follows, rtol=1e-3, atol=1e-3)
    assert not C[12].any()  # in no history


def cycle(n_users=80, n_items=20, length=9, noise=0.0, seed=0):
    """Users walk a circle of items; train, validation (the step after)."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(n_items, (n_users,), generator=generator)
    walks = [[(int(s) + t) % n_items for t in range(length + 1)] for s in start]
    ranked = histories([walk[:-1] for walk in walks])
    targets = rows_from_pairs(torch.arange(n_users), torch.tensor([walk[-1] for walk in walks]), n_users)
    return ranked, targets


@pytest.mark.parametrize("dim", [None, 12])
def test_what_comes_next_is_learned_where_the_order_says_it(dim):
    ranked, targets = cycle()
    together = torch.randn(20, 20, generator=torch.Generator().manual_seed(1))  # a closed form that knows nothing
    metric, seen = TopKMetric("ndcg", 3), Rows(ranked.offsets, ranked.ids)

    def value(scorer):
        return float(user_metric(scorer, targets, seen, 20, metric).mean())

    closed = LinearScorer(seen, together)
    everything = torch.ones(20, dtype=torch.bool)
    told = []
    block = fit_next_item(ranked, ranked, 20, closed, value, dim, everything, told.append)
    assert block is not None and value(closed) < 0.5 < 0.8 < block.value
    scores = LinearScorer(decayed(ranked, block.decay), block.source, block.target)
    both = lambda rows: closed(rows) + block.scale * scores(rows)  # noqa: E731
    assert value(both) == pytest.approx(block.value)
    assert block.source.shape == (20, 20 if dim is None else dim)


def test_a_block_that_adds_nothing_is_left_out_and_it_is_said():
    ranked, targets = cycle()
    told = []
    n = torch.ones(20, dtype=torch.bool)
    rows = Rows(ranked.offsets, ranked.ids)
    assert (
        fit_next_item(ranked, ranked, 20, LinearScorer(rows, torch.eye(20)), lambda s: 1.0, None, n, told.append)
        is None
    )
    assert "adds nothing" in told[-1]
    assert (
        fit_next_item(ranked, ranked, 9000, LinearScorer(rows, torch.eye(20)), lambda s: 1.0, None, n, told.append)
        is None
    )
    assert "9000 items" in told[-1]


def test_the_decay_is_the_one_that_validation_prefers():
    # the next item depends on the newest one alone: B is the step, so any older item only disturbs
    ranked, targets = cycle(length=6)
    step = torch.zeros(20, 20)
    step[torch.arange(20), (torch.arange(20) + 1) % 20] = 1.0
    step += 0.4 * torch.rand(20, 20, generator=torch.Generator().manual_seed(0))
    seen = Rows(ranked.offsets, ranked.ids)

    def value(scorer):
        return float(user_metric(scorer, targets, seen, 20, TopKMetric("ndcg", 1)).mean())

    tau, best = choose_decay(ranked, step, None, value)
    assert tau is not None and tau <= 4 and best == 1.0
    assert choose_decay(ranked, step, None, lambda scorer: 0.5) == (None, 0.5)
