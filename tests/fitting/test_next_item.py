"""Order in a history: ranks, the next-item statistics against a plain count, and what validation makes of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from recbole_llm.fitting import next_item, next_item_rows
from recbole_llm.fitting.next_item import (
    CONTENT,
    FLOOR,
    SPARSE_START,
    NextItemSetting,
    choose_decay,
    directions_of,
    fit_next_item,
    next_item_blocks,
    next_item_gram,
    solve_next_item,
)
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
    assert rows.decayed(None) is rows
    weighted = Rows(rows.offsets, rows.ids, torch.tensor([3.0, 1.0, 2.0, 5.0]), rows.ranks)
    torch.testing.assert_close(weighted.decayed(2.0).weights, weighted.weights * by_decay.weights)
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


@pytest.mark.parametrize("tau, floor", [(3.0, 0.0), (8.0, 0.0), (1.0, 0.1), (2.0, 0.3)])
def test_the_statistics_are_those_of_decayed_prefixes(tau, floor):
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randperm(12, generator=generator)[:n].tolist() for n in (1, 2, 7, 12, 0, 9)]
    gram, follows = next_item_gram(histories(sequences), 12, tau, floor)
    expected_gram, expected_follows = torch.zeros(12, 12), torch.zeros(12, 12)
    for sequence in sequences:
        for place in range(1, len(sequence)):
            z = torch.zeros(12)
            for back, item in enumerate(reversed(sequence[:place])):
                z[item] = max(math.exp(-back / tau), floor)
            expected_gram += z[:, None] * z
            expected_follows[:, sequence[place]] += z
    torch.testing.assert_close(gram, expected_gram, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(follows.to_dense(), expected_follows, rtol=1e-4, atol=1e-5)


def weighted(rows, seed=0):
    """The same histories with history weights and a confidence, both unlike 1."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: 0.2 + 2 * torch.rand(len(rows.ids), generator=generator)  # noqa: E731
    return replace(rows, weights=draw(), confidence=draw())


@pytest.mark.parametrize("tau, floor", [(3.0, 0.0), (2.0, 0.3)])
def test_the_statistics_weigh_items_by_the_history_and_steps_by_what_follows(tau, floor):
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randperm(12, generator=generator)[:n].tolist() for n in (1, 2, 7, 12, 0, 9)]
    rows = weighted(histories(sequences))
    told = {
        (user, item): (weight, confidence)
        for user, item, weight, confidence in zip(
            rows.row_of_entry().tolist(), rows.ids.tolist(), rows.weights.double().tolist(),
            rows.confidence.double().tolist(), strict=True,
        )
    }  # fmt: skip
    gram, follows = next_item_gram(rows, 12, tau, floor)
    expected_gram, expected_follows = torch.zeros(12, 12).double(), torch.zeros(12, 12).double()
    for user, sequence in enumerate(sequences):
        for place in range(1, len(sequence)):
            z = torch.zeros(12).double()
            for back, item in enumerate(reversed(sequence[:place])):
                z[item] = max(math.exp(-back / tau), floor) * told[user, item][0]
            counts = told[user, sequence[place]][1]
            expected_gram += counts * z[:, None] * z
            expected_follows[:, sequence[place]] += counts * z
    torch.testing.assert_close(gram.double(), expected_gram, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(follows.to_dense().double(), expected_follows, rtol=1e-5, atol=1e-5)


def test_neutral_weights_change_no_bit_of_the_statistics():
    sequences = [torch.randperm(12, generator=torch.Generator().manual_seed(s))[:9].tolist() for s in range(30)]
    rows, ones = histories(sequences), torch.ones(270)
    plain = next_item_gram(rows, 13, 3.0)
    for neutral in (
        replace(rows, weights=ones),
        replace(rows, confidence=ones),
        replace(rows, weights=ones, confidence=ones),
    ):
        gram, follows = next_item_gram(neutral, 13, 3.0)
        assert torch.equal(gram, plain[0]) and torch.equal(follows.to_dense(), plain[1].to_dense())
    assert not torch.equal(next_item_gram(weighted(rows), 13, 3.0)[0], plain[0])


def test_steps_beyond_the_longest_prefix_are_weighed_by_their_own_interactions(monkeypatch):
    """Thinned and cut, every step keeps the confidence of its own target."""
    monkeypatch.setattr(next_item, "MAX_STEPS", 40)
    monkeypatch.setattr(next_item_rows, "MAX_PREFIX", 2)
    sequences = [torch.randperm(12, generator=torch.Generator().manual_seed(s))[:9].tolist() for s in range(12)]
    rows = weighted(histories(sequences))
    kept = np.linspace(0, 12 * 8 - 1, 40).astype(int)
    expected = torch.zeros(12, 12).double()
    for user, place in ((step // 8, step % 8 + 1) for step in kept.tolist()):
        first, last = rows.offsets[user : user + 2].tolist()
        own = dict(zip(rows.ids[first:last].tolist(), range(first, last), strict=True))
        counts = float(rows.confidence[own[sequences[user][place]]])
        for back, item in enumerate(reversed(sequences[user][max(place - 2, 0) : place])):
            weight = max(math.exp(-back / 8.0), FLOOR) * float(rows.weights[own[item]])
            expected[item, sequences[user][place]] += counts * weight
    _, follows = next_item_gram(rows, 12, 8.0, FLOOR)
    torch.testing.assert_close(follows.to_dense().double(), expected, rtol=1e-5, atol=1e-5)


def test_the_solution_is_the_ridge_regression():
    sequences = [torch.randperm(12, generator=torch.Generator().manual_seed(s))[:9].tolist() for s in range(30)]
    gram, follows = next_item_gram(histories(sequences), 13, 3.0)
    C, content = solve_next_item(gram, follows, NextItemSetting(3.0, 2.0))
    assert content is None
    diagonal = gram.diagonal()
    g = diagonal[diagonal > 0].mean()
    ridge = 2.0 * g * (diagonal / g) ** 0.25
    torch.testing.assert_close((gram + torch.diag(ridge)) @ C, follows.to_dense(), rtol=1e-3, atol=1e-3)
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
    (block,) = fit_next_item(ranked, ranked, 20, closed, value, dim, everything)
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


@pytest.mark.parametrize("most", [100, 3], ids=["dense", "neighbourhoods"])
def test_steps_that_are_not_read_are_said(monkeypatch, caplog, most):
    ranked, targets = cycle(n_users=30)
    everything, closed = torch.ones(20, dtype=torch.bool), LinearBlock("closed_form", torch.eye(20)).scorer(ranked)
    monkeypatch.setattr(next_item, "MAX_ITEMS", most)
    steps = int((ranked.sizes - 1).sum())
    for read, said in ((steps, 0), (steps - 1, 1)):
        for name in ("MAX_STEPS", "LOCAL_STEPS"):
            monkeypatch.setattr(next_item, name, read)
        caplog.clear()
        with caplog.at_level("INFO"):
            fit_next_item(ranked, ranked, 20, closed, lambda scorer: 1.0, None, everything)
        assert caplog.text.count(f"of {steps} steps from an item to the next, {read} are read, evenly taken") == said


def test_a_block_that_adds_nothing_is_left_out():
    ranked, targets = cycle()
    everything = torch.ones(20, dtype=torch.bool)
    closed = LinearBlock("closed_form", torch.eye(20)).scorer(Rows(ranked.offsets, ranked.ids))
    asked = []

    def value(scorer):
        asked.append(scorer)
        return 1.0

    assert fit_next_item(ranked, ranked, 20, closed, value, None, everything) == ()
    assert len(asked) > 5, "blends were tried"


@pytest.mark.parametrize("most", [100, 3], ids=["dense", "neighbourhoods"])
def test_histories_of_one_item_have_no_next_item(monkeypatch, most):
    monkeypatch.setattr(next_item, "MAX_ITEMS", most)
    ranked = histories([[1], [2], [3], [2]])
    content = {"text": (torch.eye(5), torch.arange(5) > 0)}
    closed = LinearBlock("closed_form", torch.eye(5)).scorer(ranked)
    value = lambda scorer: pytest.fail("nothing is solved for")  # noqa: E731
    assert fit_next_item(ranked, ranked, 5, closed, value, None, torch.arange(5) > 0, content) == ()


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


# ---------------------------------------------------------------- content on both sides


def made_content(n=13, f=5, seed=3):
    """Vectors of n items; item 1 has none, item 12 nobody has touched."""
    vectors = torch.randn(n, f, generator=torch.Generator().manual_seed(seed))
    present, trained = torch.ones(n, dtype=torch.bool), torch.ones(n, dtype=torch.bool)
    present[1], trained[12] = False, False
    return {"text": (vectors, present)}, trained


def test_directions_are_centred_and_zero_where_there_is_nothing_to_say():
    content, trained = made_content()
    (directions,) = directions_of(content, trained).values()
    vectors, present = content["text"]
    centred = vectors - vectors[present].mean(0)
    expected = centred / centred.norm(dim=1, keepdim=True)
    torch.testing.assert_close(directions[present & trained], expected[present & trained])
    assert not directions[[1, 12]].any()


def test_content_enters_both_sides_as_prefixes_that_are_followed_by_themselves():
    sequences = [torch.randperm(12, generator=torch.Generator().manual_seed(s))[:4].tolist() for s in range(9)]
    content, trained = made_content()
    content["image"] = made_content(f=3, seed=8)[0]["text"]
    directions = directions_of(content, trained)
    setting = NextItemSetting(2.0, 8.0, 0.1, (("text", 0.05), ("image", 0.2)))
    gram, follows = next_item_gram(histories(sequences), 13, setting.tau, setting.floor)
    diagonal = gram.diagonal().double()
    g = diagonal[diagonal > 0].mean()
    ridge = torch.where(diagonal > 0, 8.0 * g * (diagonal / g).clamp(min=1e-6) ** 0.25, 8.0 * g)
    kernel = sum(weight * 8.0 * g * directions[m].double() @ directions[m].double().T for m, weight in setting.content)
    A = gram.double() + kernel + torch.diag(ridge)
    transitions, source = solve_next_item(gram, follows, setting, directions)
    own = torch.cat([directions["text"], directions["image"]], 1).double()
    torch.testing.assert_close(A @ transitions.double(), follows.to_dense().double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(A @ (source.double() @ own.T), kernel, rtol=1e-3, atol=1e-4)
    first, second = next_item_blocks(histories(sequences), 13, setting, None, directions)
    torch.testing.assert_close(first.source, transitions)
    torch.testing.assert_close(second.source @ second.target.T, source @ own.T.float())
    assert (first.name, second.name) == ("next_item", CONTENT) and second.decay == 2.0
    assert first.constants == second.constants
    assert NextItemSetting.from_constants(second.constants) == setting
    assert not second.target[[1, 12]].any() and not first.source[12].any()


def test_constants_of_older_checkpoints_have_neither_floor_nor_content():
    assert NextItemSetting.from_constants({"tau": 3.0, "ridge": 4.0}) == NextItemSetting(3.0, 4.0, 0.0, ())
    assert NextItemSetting(3.0, 4.0).with_content("text", 0.05).with_content("text", 0.0) == NextItemSetting(3.0, 4.0)


def likeness_world(n_users=300, n_items=60, length=3, informative=True):
    """Few interactions, whose next item is one of eight items that are like the last one."""
    generator = torch.Generator().manual_seed(0)
    kind = torch.arange(n_items) % 8
    walks = []
    for _ in range(n_users):
        here = int(torch.randint(8, (1,), generator=generator))
        like = torch.nonzero(kind == here).squeeze(1)
        walks.append(like[torch.randperm(len(like), generator=generator)[: length + 1]].tolist())
    vectors = torch.randn(8, 6, generator=generator)[
        kind if informative else torch.randint(8, (n_items,), generator=generator)
    ]
    vectors = vectors + 0.1 * torch.randn(n_items, 6, generator=generator)
    ranked = histories([walk[:-1] for walk in walks])
    targets = rows_from_pairs(torch.arange(n_users), torch.tensor([walk[-1] for walk in walks]), n_users)
    return ranked, targets, {"text": (vectors, torch.ones(n_items, dtype=torch.bool))}


@pytest.mark.parametrize("informative", [True, False])
@pytest.mark.parametrize("many", [False, True], ids=["all settings", "few settings"])
def test_content_is_chosen_where_it_says_what_comes_next(monkeypatch, informative, many):
    if many:
        monkeypatch.setattr(next_item, "FULL_SEARCH_ITEMS", 10)
    ranked, targets, content = likeness_world(n_users=40, informative=informative)
    everything = torch.ones(60, dtype=torch.bool)
    metric, seen = TopKMetric("ndcg", 3), Rows(ranked.offsets, ranked.ids)
    asked = []

    def value(scorer):
        asked.append(scorer)
        return float(user_metric(scorer, targets, seen, 60, metric).mean())

    noise = torch.randn(60, 60, generator=torch.Generator().manual_seed(1))
    closed = LinearBlock("closed_form", noise).scorer(seen)
    blocks = fit_next_item(ranked, ranked, 60, closed, value, None, everything, content)
    without = fit_next_item(ranked, ranked, 60, closed, value, None, everything)
    reached = [
        value(lambda rows, b=b: sum((x.scorer(ranked)(rows) for x in b), closed(rows))) for b in (blocks, without)
    ]
    assert reached[0] >= reached[1] > value(closed)
    assert len({block.scale for block in blocks}) == 1
    if informative:
        assert [block.name for block in blocks] == ["next_item", CONTENT] and reached[0] > reached[1] + 0.05
    if many:
        settings = [NextItemSetting.from_constants(block.constants) for block in blocks]
        assert settings[0].ridge == SPARSE_START.ridge and settings[0].floor in (0.0, FLOOR)
