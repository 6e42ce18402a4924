"""The score against float64 sums over blocks, users, items and entries; every way to it agrees."""

import math
from dataclasses import replace

import pytest
import torch
from made_score import (
    HISTORIES,
    UNLISTED,
    N,
    U,
    close,
    expected_scores,
    made_blocks,
    made_history,
    made_score,
    normal,
    summands,
    targets_of,
)

from recbole_llm.scoring.block import Exceptions, LinearBlock
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import ColdRows, Score


@pytest.mark.parametrize("known", [True, False], ids=["known users", "new users"])
@pytest.mark.parametrize("kind", HISTORIES)
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "vectors"])
def test_every_way_to_the_score_gives_the_float64_sum(identity, kind, known):
    score, history = made_score(identity), made_history(kind)
    part = score.user_parts(torch.arange(U)) if known else None
    expected = expected_scores(score, history, part)
    found = score.scores(history, part)
    close(found, expected)
    assert found[:, list(UNLISTED)].eq(-math.inf).all() and found[:, score.listed].isfinite().all()

    query, table = score.queries(history, part), score.item_table()
    close(table.scores(query), expected)
    close(query @ table.dense().T + table.bias, expected)
    assert table.identity == identity == (not score.has_vectors)
    assert query.shape[1] == table.dense().shape[1] == (N if identity else 2 * N) + 4 + 3 + 2
    assert torch.equal(table.bias, score.item_bias)

    # pairs: unsorted, items and users that repeat, an unlisted item, the empty histories
    row = torch.tensor([5, 0, 5, 1, 1, 4, 5, 0, 2])
    items = torch.tensor([3, 12, 3, 1, 1, 8, 0, 11, 7])
    close(score.pairs(history, row, items, part), expected[row, items])

    for user in range(U):
        own = None if part is None else {name: rows[[user]] for name, rows in part.items()}
        asked = torch.tensor([7, 3, 7, 12, 8, 11, 1])
        parts = score.parts(history.select(torch.tensor([user])), asked, own)
        close(parts.total(), expected[user, asked])
        for block in score.counting:
            entries, rest = summands(block, history, user, part)
            if block.source is not None:
                close(parts.of_history[block.name], score.slope * entries[asked])
            close(parts.rest[block.name], score.slope * rest[asked])
        assert set(parts.rest) == {"closed_form", "learned", "next_item", "users", "plain"}
        assert set(parts.of_history) == set(parts.rest) - {"users"}
        close(parts.bias, score.item_bias[asked])


def test_known_users_are_asked_by_their_ids():
    score, history = made_score(), made_history("ranks")
    users = torch.tensor([5, 0, 5, 2])
    everyone = score.scores(history, score.user_parts(torch.arange(U)))
    close(score.of_users(users, history), everyone[users], atol=1e-5)
    rows = [score.block("learned"), score.block("users")]
    assert {name: part.tolist() for name, part in score.user_parts(users).items()} == {
        block.name: block.user_part[users].tolist() for block in rows
    }


def test_few_scores_are_held_at_once(monkeypatch):
    score, history = made_score(), made_history("ranks")
    row, items = torch.tensor([5, 3, 0, 5, 2]), torch.tensor([2, 2, 9, 5, 1])
    wanted = score.scores(history)[row, items]
    for most in (1, 2 * N, 100 * N):
        monkeypatch.setattr("recbole_llm.scoring.score.SCORES_AT_ONCE", most)
        close(score.pairs(history, row, items), wanted, atol=1e-5)


def test_nobody_and_nothing_asked():
    for identity in (True, False):
        score, history = made_score(identity), made_history("ranks")
        none = torch.zeros(0, dtype=torch.int64)
        nobody = history.select(none)
        assert score.scores(nobody).shape == (0, N)
        assert score.pairs(nobody, none, none).shape == (0,)
        assert score.pairs(history, none, none).shape == (0,)
        parts = score.parts(history.select(torch.tensor([1])), torch.tensor([3, 5]))  # an empty history
        assert parts.of_history["plain"].shape == (2, 0)
        close(parts.total(), score.scores(history)[1, [3, 5]])
        assert score.parts(history.select(torch.tensor([0])), none).total().shape == (0,)


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_block_scores_alone_as_in_the_sum(kind):
    history = made_history(kind)
    part = made_score().user_parts(torch.arange(U))
    users = torch.tensor([5, 5, 1, 0])
    newest = LinearBlock("newest", None, offset=normal(N, seed=17), bias=normal(N, seed=18))  # the same for everyone
    assert newest.dim == N
    for block in (newest, *made_blocks(True), *made_blocks(False)):
        alone = Score((block,), torch.ones(N, dtype=torch.bool))
        of_known, of_new = expected_scores(alone, history, part), expected_scores(alone, history, None)
        own = None if block.user_part is None else block.user_part
        close(block.scores(history, own), of_known)
        close(block.scorer(history, torch.arange(U))(users), of_known[users])
        close(block.scorer(history)(users), of_new[users])
        close(alone.scores(history, part), of_known)


def test_scores_are_the_callers_to_overwrite():
    """No way of writing into what is returned reaches a block's tensors or a later answer."""
    one = Rows(torch.tensor([0, 1]), torch.tensor([2]))
    user_part = normal(1, N, seed=40)
    blocks = [
        LinearBlock("x", None, offset=normal(N, seed=41), target=torch.eye(N)),
        LinearBlock("x", torch.zeros(N, N), offset=normal(N, seed=42), bias=normal(N, seed=43)),
        LinearBlock("x", normal(N, N, seed=44)),
        LinearBlock("x", None, offset=normal(N, seed=47), bias=normal(N, seed=48), scale=0.5),
        LinearBlock("x", normal(N, N, seed=45), scale=2.0, bias=normal(N, seed=46), user_part=user_part),
    ]
    for block in blocks:
        score = Score((block,), torch.ones(N, dtype=torch.bool))
        kept = {name: value.clone() for name, value in vars(block).items() if isinstance(value, torch.Tensor)}
        for ask in (block.scores, score.scores, lambda history, block=block: block.scores(history, block.user_part)):
            first = ask(one).clone()
            ask(one).fill_(7.0)
            assert torch.equal(ask(one), first)
        for name, value in kept.items():
            assert torch.equal(getattr(block, name), value), name


def test_blocks_that_do_not_count_leave_no_columns():
    score, history = made_score(), made_history("ranks")
    assert [block.name for block in score.counting] == ["closed_form", "learned", "next_item", "users", "plain"]
    off = score.with_blocks(*(replace(block, scale=0.0) for block in score.blocks if block.name != "plain"))
    assert off.queries(history).shape[1] == 2 and off.has_vectors
    close(off.scores(history), expected_scores(off, history, None))
    # a score of nothing is the intercept, and keeps the columns of its first block
    silent = score.with_blocks(*(replace(block, scale=0.0) for block in score.blocks))
    assert [block.name for block in silent.counting] == ["closed_form"]
    assert silent.scores(history)[:, silent.listed].eq(score.intercept).all()


def test_a_block_takes_the_place_of_that_of_its_name():
    score = made_score()
    other = replace(score.block("learned"), scale=9.0)
    found = score.with_blocks(other, None, LinearBlock("unheard of", normal(N, 1, seed=0), normal(N, 1, seed=1)))
    assert [block.name for block in found.blocks] == [block.name for block in score.blocks]
    assert found.block("learned") is other and found.block("closed_form") is score.block("closed_form")
    assert score.block("learned").scale == 1.3 and score.block("unheard of") is None


def test_queries_and_targets_come_apart_and_together_again():
    for identity in (True, False):
        score = made_score(identity)
        targets = {block.name: targets_of(block).float() for block in score.counting}
        together = score.side_by_side(targets)
        assert torch.equal(together, score.item_table().dense())
        for item in (0, 3, 12):
            apart = score.by_block(together[item])
            assert apart.keys() == targets.keys()
            assert all(torch.equal(apart[name], targets[name][item]) for name in apart)


def cold_rows(score, ids, joint=True):
    targets = {block.name: normal(len(ids), block.dim, seed=50 + i) for i, block in enumerate(score.counting)}
    if "next_item" in targets and not score.has_vectors:
        targets["next_item"] = targets["closed_form"]  # identity targets share their columns
    return ColdRows(
        ids,
        targets,
        {
            b.name: normal(len(ids), b.source.shape[1], seed=60 + i)
            for i, b in enumerate(score.counting)
            if b.source is not None
        },
        {b.name: normal(len(ids), seed=70 + i) for i, b in enumerate(score.counting) if b.bias is not None},
        joint=joint,
        kappa=0.5,
        mean_bias=-2.0,
        mu=0.3,
    )


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("identity", [True, False], ids=["identity", "vectors"])
def test_placed_items_have_their_own_rows(identity, joint):
    score, history = made_score(identity), made_history("ranks")
    part, ids = score.user_parts(torch.arange(U)), torch.tensor([11, 5, 3])  # one unlisted, one an exception before
    cold = cold_rows(score, ids, joint)
    placed = score.with_cold(cold)
    assert placed.listed[ids].eq(joint).all() and placed.cold is cold
    close(placed.scores(history, part), expected_scores(placed, history, part))
    for name, rows in cold.target.items():
        block = placed.block(name)
        assert torch.equal(targets_of(block).float()[ids], rows)
        if name in cold.source:
            assert torch.equal(block.source[ids], cold.source[name])
        if name in cold.bias:
            assert torch.equal(block.bias[ids], cold.bias[name])
    # the score it was made from is as it was
    close(score.scores(history, part), expected_scores(made_score(identity), history, part))
    assert score.cold is None and torch.equal(score.block("plain").source, made_blocks()[5].source)
    silent = made_blocks(identity)[1]
    assert torch.equal(placed.block("silent").target, silent.target) and placed.block("silent").bias.equal(silent.bias)


def test_a_refreshed_block_keeps_its_scale_and_the_placed_items():
    score, history = made_score(), made_history("ranks")
    ids = torch.tensor([11, 5])
    placed = score.with_cold(cold_rows(score, ids))
    learned = score.block("learned")
    tables = {"source": normal(N, 4, seed=80), "target": normal(N, 4, seed=81), "bias": normal(N, seed=82)}
    new = replace(learned, scale=1.0, temperature=5.0, **tables)
    found = placed.refreshed(new)
    block = found.block("learned")
    assert (block.scale, block.temperature) == (1.3, 5.0)
    for name in ("source", "target", "bias"):
        table, given = getattr(block, name), getattr(new, name)
        assert torch.equal(table[ids], getattr(placed.cold, name)["learned"])
        rest = torch.ones(N, dtype=torch.bool).index_fill(0, ids, False)
        assert torch.equal(table[rest], given[rest])
    part = found.user_parts(torch.arange(U))
    close(found.scores(history, part), expected_scores(found, history, part))
    assert torch.equal(score.refreshed(new).block("learned").target, new.target)  # none placed


def test_items_mapped_from_others_score_as_the_weighted_sum_of_their_scores():
    """The map is linear: a mapped item's score is the weighted sum of those of the known items, for every query."""
    for identity in (True, False):
        score, history = made_score(identity), made_history("ranks")
        score = replace(score, blocks=tuple(replace(block, exceptions=None) for block in score.blocks))
        part = score.user_parts(torch.arange(U))
        known, ids = torch.tensor([9, 2, 7, 4]), torch.tensor([11, 5])
        weights = normal(2, 4, seed=90)
        among = torch.arange(N) > 5
        rows, bias = score.mapped(known, weights, among)
        scores = score.scores(history, part, unlisted=True)
        raw = score.slope * score.plain_bias + score.intercept
        mean = raw[among].mean()
        own = weights @ (raw[known] - mean) + mean  # an item unlike all others gets the mean
        assert rows.mean_bias == pytest.approx(float(score.plain_bias[among].mean()))
        close(bias, own)
        placed = score.with_cold(replace(rows, ids=ids, joint=True))
        linear = (scores - raw)[:, known] @ weights.T
        query = score.queries(history, part)
        close(query @ score.side_by_side(rows.target).T, linear)
        close(placed.queries(history, part)[1] @ placed.item_table().dense()[ids].T, linear[1])  # an empty history
        blocks = [block for block in score.counting if block.bias is not None]
        total = sum(score.slope * block.scale * rows.bias[block.name] for block in blocks)
        close(total + score.intercept, own)
        for block in score.counting:
            if block.source is not None:
                close(rows.source[block.name], weights.double() @ block.source[known].double())
            close(rows.target[block.name], weights.double() @ targets_of(block)[known])


def test_probabilities_are_the_sigmoid_of_the_map():
    shown = ProbabilityMap(-3.0, 0.25, 0.4, -1.0, (2.0, 0.5), (0.5,))
    score, history = replace(made_score(), probability=shown), made_history("ranks")
    length = history.sizes.clamp(min=1).double().log()[:, None]
    scores = score.scores(history)
    wanted = torch.sigmoid(shown.logit(expected_scores(score, history, None), length))
    found = score.probabilities(scores, length)
    close(found, wanted)
    assert found[:, list(UNLISTED)].eq(0).all()


def test_a_score_moves_with_its_blocks():
    moved = [block.to("cpu") for block in made_blocks()]
    for block, other in zip(moved, made_blocks(), strict=True):
        for name, value in vars(other).items():
            found = getattr(block, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(found, value)
            elif isinstance(value, Exceptions):
                assert torch.equal(found.ids, value.ids) and torch.equal(found.rows, value.rows)
            else:
                assert found == value
    assert AllRows(N).listed().tolist() == [False] + [True] * (N - 1)
