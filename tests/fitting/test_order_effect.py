"""The shuffle test: made data with a strong order lose much, data without one lose about nothing."""

from dataclasses import replace

import pytest
import torch
from test_next_item import histories
from test_pipeline import Options, world

from recbole_llm.fitting import order_effect as module
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.next_item import NextItemSetting, local_blocks, next_item_blocks
from recbole_llm.fitting.order_effect import order_effect, shuffled
from recbole_llm.fitting.pipeline import fit
from recbole_llm.fitting.validation import TopKMetric, Validation
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.rows import Rows, rows_from_pairs

METRIC = TopKMetric("ndcg", 3)


def test_a_shuffle_moves_ranks_within_their_history_and_nothing_else():
    walks = [
        (1 + torch.randperm(99, generator=torch.Generator().manual_seed(n))[: 7 + n % 5]).tolist() for n in range(60)
    ]
    ranked = histories([[], [4], *walks, []])
    found = shuffled(ranked, torch.Generator().manual_seed(3))
    assert torch.equal(found.ids, ranked.ids) and torch.equal(found.offsets, ranked.offsets)
    moved = 0
    for row in range(len(ranked.sizes)):
        span = slice(*ranked.offsets[row : row + 2].tolist())
        assert sorted(found.ranks[span].tolist()) == sorted(ranked.ranks[span].tolist())
        moved += not torch.equal(found.ranks[span], ranked.ranks[span])
    assert moved == 60
    newest = found.ids[found.ranks == 0].tolist() == ranked.ids[ranked.ranks == 0].tolist()
    assert not newest and torch.equal(shuffled(ranked, torch.Generator().manual_seed(3)).ranks, found.ranks)


def pairs(n_users=300, half=30, seed=0):
    """Users take items of the first half. Each has a partner in the second, taken at once or not; the last one's is next."""
    draw = torch.Generator().manual_seed(seed)
    walks = []
    for _ in range(n_users):
        taken = (1 + torch.randperm(half, generator=draw)[:10]).tolist()
        walks.append(
            [each for n, item in enumerate(taken) for each in ([item, half + item] if n in (2, 5, 7, 9) else [item])]
        )
    targets = rows_from_pairs(torch.arange(n_users), torch.tensor([walk[-1] for walk in walks]), n_users)
    return TrainingData(histories([walk[:-1] for walk in walks]), AllRows(2 * half + 1)), targets


def tasters(n_users=400, n_items=30, seed=0):
    """Users draw items of their own half of the catalogue: no order."""
    draw = torch.Generator().manual_seed(seed)
    half = torch.arange(n_users) % 2 * (n_items // 2)
    walks = [
        [int(h) + 1 + i for i in torch.randperm(n_items // 2 - 1, generator=draw)[:8].tolist()] for h in half.tolist()
    ]
    targets = rows_from_pairs(torch.arange(n_users), torch.tensor([walk[-1] for walk in walks]), n_users)
    return TrainingData(histories([walk[:-1] for walk in walks]), AllRows(n_items)), targets


def measured(data, targets, options=None):
    seen = Rows(data.history.offsets, data.history.ids)
    validation = Validation(data.history, targets, seen, METRIC)
    fitted = fit(data, validation, options or Options(blocks=("closed_form",)), lambda: pytest.fail("no towers"))
    return order_effect(fitted, data, validation, data.history, targets, seen, METRIC), fitted, validation


def test_a_strong_order_is_lost_and_none_is_missed():
    found, _, _ = measured(*pairs())
    assert float(found.ordered.mean()) > 0.9 and found.lost > 0.4
    assert found.lost == pytest.approx(1 - float(found.shuffled.mean() / found.ordered.mean()))
    data, targets = tasters()
    found, _, _ = measured(data, targets)
    error = float((found.ordered - found.shuffled).std() / len(found.ordered) ** 0.5 / found.ordered.mean())
    assert abs(found.lost) < max(3 * error, 0.05) and len(found.ordered) == 400


def test_what_the_order_is_worth_is_measured_on_refitted_blocks():
    """Not refitted, the block of the next item points at where the walk no longer is, and more is lost than need be."""
    data, targets = pairs()
    found, fitted, validation = measured(data, targets)
    seen = Rows(data.history.offsets, data.history.ids)
    histories_without = shuffled(data.history, torch.Generator().manual_seed(0))
    score = fitted.score
    from recbole_llm.fitting.validation import user_metric

    stale = user_metric(
        lambda rows: score.scores(histories_without.select(rows), unlisted=True),
        targets,
        seen,
        20,
        METRIC,
        ~data.trained,
    )
    assert float(stale.mean()) < float(found.shuffled.mean()) < float(found.ordered.mean())


def test_the_next_item_block_is_solved_once_more_with_its_constants():
    data, _ = pairs()
    without = replace(data, history=shuffled(data.history, torch.Generator().manual_seed(1)))
    (block,) = next_item_blocks(data.history, data.n_items, NextItemSetting(3.0, 4.0, 0.1), None, {})
    block = replace(block, scale=7.0, decay=2.0)
    (found,) = module._solve_again((block,), without)
    (expected,) = next_item_blocks(without.history, data.n_items, NextItemSetting(3.0, 4.0, 0.1), None, {})
    assert torch.equal(found.source, expected.source) and (found.scale, found.decay) == (7.0, 2.0)
    assert not torch.allclose(found.source, block.source, atol=0.01) and module._solve_again((), without) == ()


def test_neighbourhoods_are_solved_once_more_as_neighbourhoods():
    """A rank is no part of them: their vectors hold content, and one column of zeros without."""
    data, _ = pairs()
    without = replace(data, history=shuffled(data.history, torch.Generator().manual_seed(1)))
    setting = NextItemSetting(3.0, 4.0, 0.1)
    (block,) = local_blocks(data.history, data.n_items, setting, {})
    (found,) = module._solve_again((replace(block, scale=7.0, decay=2.0),), without)
    (expected,) = local_blocks(without.history, data.n_items, setting, {})
    assert found.direct is not None and torch.equal(found.direct.ids, expected.direct.ids)
    assert torch.equal(found.direct.weights, expected.direct.weights) and (found.scale, found.decay) == (7.0, 2.0)


def test_users_are_chosen_evenly_and_nothing_is_measured_where_there_is_no_order(monkeypatch):
    data, targets = tasters()
    monkeypatch.setattr(module, "MAX_USERS", 50)
    found, fitted, validation = measured(data, targets)
    assert len(found.ordered) == len(found.shuffled) == 50
    ask = lambda fitted, data, validation, targets: order_effect(  # noqa: E731
        fitted, data, validation, data.history, targets, targets, METRIC
    )
    assert ask(fitted, data, None, targets) is None
    nobody = Rows(torch.zeros_like(targets.offsets), targets.ids[:0])
    assert ask(fitted, data, validation, nobody) is None
    unordered = replace(data, history=replace(data.history, ranks=None))
    assert ask(fitted, unordered, validation, targets) is None
    silent = replace(fitted, score=replace(fitted.score, blocks=fitted.score.blocks[1:]))
    assert ask(silent, data, validation, targets) is None


def test_content_and_placed_items_take_no_part_in_the_comparison():
    made = world(ordered=True)
    options = Options(blocks=("closed_form", "learned"))
    fitted = fit(made.data, made.validation, options, made.train_towers)
    before = fitted.score.blocks
    valid = made.validation
    found = order_effect(fitted, made.data, valid, made.data.history, valid.targets, valid.seen, valid.metric)
    assert len(found.ordered) == int((valid.targets.sizes > 0).sum()) and 0 < float(found.ordered.mean()) < 1
    assert fitted.score.blocks is before
