"""Order in a history: ranks, the next-item statistics against a plain count, and what validation makes of them."""

import math

import pytest
import torch

from recbole_llm.fitting.next_item import MAX_ITEMS, choose_decay, fit_next_item, next_item_gram, solve_next_item
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.rows import Rows, rows_from_pairs
from recbole_llm.scoring.score import LinearBlock


def histories(sequences):
    """Rows with ranks of sequences, oldest first."""
    user = torch.tensor([u for u, s in enumerate(sequences) for _ in s])
    item = torch.tensor([i for s in sequences for i in s])
    return rows_from_pairs(user, item, len(sequences), torch.arange(len(user)))


def test_ranks_count_from_the_newest_and_a_repeated_item_counts_at_its_latest():
    rows = rows_from_pairs(
        torch.tensor([0, 0, 0, 1, 0]), torch.tensor([5, 3, 4, 9, 5]), 3, torch.tensor([1, 2, 3, 1, 9])
    )
    assert rows.offsets.tolist() == [0, 3, 4, 4]
    assert rows.ids.tolist() == [3, 4, 5, 9]
    assert rows.ranks.tolist() == [2, 1, 0, 0] and rows.weights is None
    by_decay = rows_from_pairs(rows.row_of_entry(), rows.ids, 3, -rows.ranks, decay=2.0)
    torch.testing.assert_close(rows.decayed(2.0).weights, by_decay.weights)
    torch.testing.assert_close(by_decay.weights, torch.tensor([2.0, 1.0, 0.0, 0.0]).div(-2).exp())
    assert rows.decayed(2.0).decayed(None).weights is None
    with pytest.raises(ValueError, match="decay is 2, and the histories have no ranks"):
        Rows(rows.offsets, rows.ids).decayed(2.0)


def test_ranks_stay_with_their_entries():
    rows = histories([[3, 1, 2], [], [5, 4], [0]])
    assert rows.ranks.tolist() == [1, 0, 2, 0, 1, 0]
    assert rows.select(torch.tensor([2, 0, 2])).ranks.tolist() == [0, 1, 1, 0, 2, 0, 1]
    assert rows.stretch(2, 4).ranks.tolist() == [0, 1, 0]
    assert rows.keep(rows.ids != 2).ranks.tolist() == [1, 2, 0, 1, 0]  # as they were, with a gap
    assert rows.to("cpu").ranks.tolist() == rows.ranks.tolist()
    torch.manual_seed(0)
    some = rows.select(torch.arange(4), dropout=0.5)
    rank_of = dict(zip(rows.ids.tolist(), rows.ranks.tolist(), strict=True))
    assert 0 < len(some.ids) < 6 and some.ranks.tolist() == [rank_of[i] for i in some.ids.tolist()]


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

    closed = LinearBlock("closed_form", together).scorer(seen)
    everything = torch.ones(20, dtype=torch.bool)
    block = fit_next_item(ranked, ranked, 20, closed, value, dim, everything)
    scores = block.scorer(ranked)  # its scale is the one beside a closed form of scale 1
    reached = value(lambda rows: closed(rows) + scores(rows))
    assert value(closed) < 0.5 < 0.8 < reached
    for factor in (0.25, 4.0):  # a share that validation tried and did not take, or one beyond those
        assert value(lambda rows: closed(rows) + factor * scores(rows)) <= reached  # noqa: B023
    assert (block.name, block.exponent, block.bias) == ("next_item", 0.0, None) and block.decay in (3.0, 8.0)
    by_hand = block.source if dim is None else block.source @ block.target.T
    faded = torch.zeros(80, 20)
    faded[ranked.row_of_entry(), ranked.ids] = (-ranked.ranks / block.decay).exp()
    torch.testing.assert_close(scores(torch.arange(80)), block.scale * faded @ by_hand, rtol=1e-4, atol=1e-5)
    assert block.source.shape == (20, 20 if dim is None else dim)


def test_a_block_that_adds_nothing_is_left_out():
    ranked, targets = cycle()
    everything = torch.ones(20, dtype=torch.bool)
    closed = LinearBlock("closed_form", torch.eye(20)).scorer(Rows(ranked.offsets, ranked.ids))
    asked = []

    def value(scorer):
        asked.append(scorer)
        return 1.0

    assert fit_next_item(ranked, ranked, 20, closed, value, None, everything) is None
    assert len(asked) > 5, "blends were tried"
    asked.clear()
    assert fit_next_item(ranked, ranked, MAX_ITEMS + 1, closed, value, None, everything) is None
    assert not asked, "too many items are not solved for"


def test_the_decay_is_the_one_that_validation_prefers():
    # the next item depends on the newest one alone: B is the step, so any older item only disturbs
    ranked, targets = cycle(length=6)
    step = torch.zeros(20, 20)
    step[torch.arange(20), (torch.arange(20) + 1) % 20] = 1.0
    step += 0.4 * torch.rand(20, 20, generator=torch.Generator().manual_seed(0))
    seen = Rows(ranked.offsets, ranked.ids)

    def value(scorer):
        return float(user_metric(scorer, targets, seen, 20, TopKMetric("ndcg", 1)).mean())

    tau, best = choose_decay(LinearBlock("closed_form", step), ranked, value)
    assert tau is not None and tau <= 4 and best == 1.0
    assert choose_decay(LinearBlock("closed_form", step), ranked, lambda scorer: 0.5) == (None, 0.5)
