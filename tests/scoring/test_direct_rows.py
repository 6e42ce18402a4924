"""Blocks with direct rows: sparse rows beside a product of vectors, against float64 sums everywhere that scores are made."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from made_score import (
    HISTORIES,
    N,
    U,
    close,
    dense_direct,
    direct_blocks,
    expected_scores,
    made_blocks,
    made_direct,
    made_history,
    made_score,
    normal,
    summands,
)
from test_numpy_twin import exported, padded

from recbole_llm.export.direct import DirectRows, read_direct, to_tensors
from recbole_llm.export.errors import ExportError
from recbole_llm.export.export_model import _refuse_direct_graphs
from recbole_llm.export.manifest import Block
from recbole_llm.export.model_tables import direct_of
from recbole_llm.export.pooling import Pooling
from recbole_llm.export.reader import load_export
from recbole_llm.loaded import LoadedModel
from recbole_llm.retrieval.audience import AskedItem, known_items, top_users
from recbole_llm.retrieval.exact import ExactRetriever
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.retrieval.remote import RemoteRetriever
from recbole_llm.scoring.block import LinearBlock, direct_entries
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import ColdRows
from recbole_llm.scoring.state import score_from_state, score_to_state


@pytest.mark.parametrize("known", [True, False], ids=["known users", "new users"])
@pytest.mark.parametrize("kind", HISTORIES)
@pytest.mark.parametrize("identity", [False, True], ids=["vectors", "beside identity"])
def test_every_way_to_the_score_gives_the_float64_sum(identity, kind, known):
    blocks = direct_blocks()
    if identity:  # another block with identity targets and exceptions, of which direct rows are no part
        blocks = (*blocks, replace(made_blocks()[3], name="wide"))
    score, history, users = made_score(blocks=blocks), made_history(kind), torch.arange(U)
    part = score.user_parts(users) if known else None
    expected = expected_scores(score, history, part)
    close(score.scores(history, part), expected)
    plain = made_score(blocks=tuple(replace(block, direct=None) for block in blocks))
    assert not torch.allclose(score.scores(history)[0, 1:5], plain.scores(history)[0, 1:5])
    assert not score.has_vectors and plain.has_vectors != identity
    close(score.add_direct(score.item_table().scores(score.queries(history, part)), history, part), expected)

    row = torch.tensor([5, 0, 5, 1, 1, 4, 5, 0, 2])
    items = torch.tensor([3, 12, 3, 1, 1, 8, 0, 11, 7])
    close(score.pairs(history, row, items, part), expected[row, items])
    if known:
        close(score.of_users(torch.tensor([5, 0, 5]), history), expected[[5, 0, 5]])
    for user in range(U):
        own = None if part is None else {name: rows[[user]] for name, rows in part.items()}
        asked = torch.tensor([7, 3, 7, 12, 8, 11, 1])
        parts = score.parts(history.select(torch.tensor([user])), asked, own)
        close(parts.total(), expected[user, asked])
        for block in score.counting:
            entries, rest = summands(block, history, user, part)
            close(parts.of_history[block.name], score.slope * entries[asked])
            close(parts.rest[block.name], score.slope * rest[asked])


@pytest.mark.parametrize("kind", HISTORIES)
def test_a_block_scores_alone_as_in_the_sum(kind):
    history, users = made_history(kind), torch.tensor([5, 5, 1, 0])
    for block in direct_blocks()[:2]:
        alone = made_score(blocks=(block,))
        alone = replace(alone, listed=torch.ones(N, dtype=torch.bool), slope=1.0, intercept=0.0)
        known = expected_scores(alone, history, alone.user_parts(torch.arange(U)))
        close(block.scorer(history, torch.arange(U))(users), known[users])
        close(block.scorer(history)(users), expected_scores(alone, history, None)[users])


def test_nobody_and_nothing_asked():
    score, history = made_score(blocks=direct_blocks()), made_history("ranks")
    none = torch.zeros(0, dtype=torch.int64)
    assert score.scores(history.select(none)).shape == (0, N)
    assert score.pairs(history, none, none).shape == (0,)
    parts = score.parts(history.select(torch.tensor([1])), torch.tensor([3, 5]))  # an empty history
    assert parts.of_history["closed_form"].shape == (2, 0)
    close(parts.total(), score.scores(history)[1, [3, 5]])
    empty = Rows(torch.zeros(N + 1, dtype=torch.int64), none, torch.zeros(0))
    bare = replace(direct_blocks()[0], direct=empty)
    close(bare.scores(history), replace(bare, direct=None).scores(history))
    found = direct_entries(made_direct(), torch.tensor([5, 5, 4]), torch.arange(N))
    close(found, dense_direct(made_direct())[[5, 5, 4]].T)


def test_what_direct_rows_cannot_be_beside_is_refused():
    block = direct_blocks()[0]
    for wrong in ({"cosine": True}, {"target": None}, {"source": None}):
        with pytest.raises(ValueError, match="closed_form block has direct rows"):
            replace(block, **wrong)
    with pytest.raises(ValueError, match="onnx"):
        _refuse_direct_graphs({0: direct_of(block.direct)}, True)
    _refuse_direct_graphs({}, True)
    with pytest.raises(ValueError, match="padding"):
        direct_of(Rows(torch.tensor([0, 1, 1]), torch.tensor([1]), torch.ones(1)))


def test_a_checkpoint_gives_the_same_score():
    score, history = made_score(blocks=direct_blocks()), made_history("both")
    state = score_to_state(score)
    assert all(value is None or torch.is_tensor(value) for value in state["blocks"][0]["direct"].values())
    learned = replace(direct_blocks()[2], scale=1.0)
    found = score_from_state({**state, "listed": score.listed}, learned, AllRows(N))
    # who dislikes what comes with the data, not with the score
    assert torch.equal(found.scores(history), score.scores(history))
    moved = replace(score, blocks=tuple(block.to("cpu") for block in score.blocks))
    assert torch.equal(moved.scores(history), score.scores(history))


def test_placed_items_have_the_mapped_vectors_and_no_direct_rows():
    """An item without interactions has no co-occurrences, so that its score is of the product of vectors alone."""
    score, history = made_score(blocks=direct_blocks()[:2]), made_history("ranks")
    cold, known = torch.tensor([11, 4]), torch.tensor([1, 2, 5])
    among = torch.ones(N, dtype=torch.bool).index_fill(0, torch.tensor([0, 11, 4]), False)
    for name in ("closed_form", "next_item"):  # 4 and 11 are in no direct row: nobody has touched them
        assert not dense_direct(score.block(name).direct)[[4, 11]].any()
    score = replace(
        score,
        blocks=tuple(
            replace(block, direct=block.direct.keep((block.direct.ids != 4) & (block.direct.ids != 11)))
            for block in score.blocks
        ),
    )
    weights = normal(2, 3, seed=70)
    rows, _ = score.mapped(known, weights, among)
    assert {name: table.shape[1] for name, table in rows.target.items()} == {"closed_form": 3, "next_item": 2}
    placed = score.with_cold(replace(rows, ids=cold, joint=True))
    untouched = history.keep((history.ids != 4) & (history.ids != 11))  # whose sources the map changes
    expected = 0.0
    for block in score.blocks:
        bare = replace(block, direct=None, dislikes=0.0)
        expected = expected + score.slope * bare.queries(untouched) @ (weights @ block.target[known]).T * block.scale
    close(placed.scores(untouched)[:, cold], expected + score.intercept)
    rest = [i for i in range(1, N) if i not in (4, 11)]
    close(placed.scores(untouched)[:, rest], score.scores(untouched)[:, rest])
    assert isinstance(placed.cold, ColdRows)


# ---------------------------------------------------------------- exports


@pytest.mark.parametrize("kind", HISTORIES)
def test_an_export_scores_explains_and_ranks_as_the_score(tmp_path, kind):
    score, history = made_score(blocks=direct_blocks()), padded(made_history(kind))
    if kind not in ("ranks", "both"):  # an export's blocks fade where its histories have ranks
        score = replace(score, blocks=tuple(replace(block, decay=None) for block in score.blocks))
    disliked, users = score.blocks[0].disliked, torch.arange(U)
    part = score.user_parts(users)
    part = {name: rows.index_fill(0, torch.tensor([0]), 0.0) for name, rows in part.items()}
    export = exported(score, history, tmp_path / "export", disliked)
    assert export.manifest.min_reader == 6 and set(export.direct) == {0, 1}
    scores = expected_scores(score, history, part)

    pooling, items = Pooling.of(export), np.arange(N - 1)
    recommender, model = Recommender(export), LoadedModel(export)
    for user in range(1, U):
        own = {name: table[[user]] for name, table in part.items()}
        parts = score.parts(history.select(torch.tensor([user])), torch.arange(1, N), own)
        rows, query = model._of_user(user - 1)
        by_block = pooling.parts(query, export.vector[items], items)
        for name, added in parts.of_history.items():
            np.testing.assert_allclose(by_block[name], added.numpy(), rtol=3e-4, atol=3e-4)
        np.testing.assert_allclose(
            pooling.contributions(query, export.vector[items], items), sum(by_block.values()), atol=1e-9
        )
        hated = disliked.select(torch.tensor([user])).ids.tolist()
        for k in (1, 3, N):
            asked = Request(user=f"u{user}", k=k, exclude_seen=False, explain=max(len(rows), 1))
            answer = recommender.recommend(asked)
            allowed = [i for i in range(1, N) if score.listed[i] and i not in hated]
            best = sorted(allowed, key=lambda i: -float(scores[user, i]))[:k]
            assert [int(item.id[1:]) for item in answer.items] == best
            close(torch.tensor([item.score for item in answer.items]), scores[user, best])
            for item in answer.items:
                total = item.rest + item.bias + sum(reason.contribution for reason in item.reasons)
                assert total == pytest.approx(item.score, abs=1e-5)
        unseen = [i for i in range(1, N) if score.listed[i] and i not in hated and i - 1 not in rows]
        answer = recommender.recommend(Request(user=f"u{user}", k=N))
        assert {int(item.id[1:]) for item in answer.items} == set(unseen)
        told = model.explain("i5", user=f"u{user}")
        assert told.contribution.sum() == pytest.approx(float(scores[user, 5]), abs=1e-3)

    (reached,) = top_users(export, known_items(export, ["i5"]), k=U, exclude_seen=False)
    hates = {user for user in range(1, U) if 5 in disliked.select(torch.tensor([user])).ids}
    assert {int(one.user[1:]): pytest.approx(one.score, rel=1e-3, abs=1e-3) for one in reached} == {
        user: float(scores[user, 5]) for user in range(1, U) if user not in hates
    }
    new = AskedItem("new", "new", export.vector[4], float(export.bias[4]))  # the vectors alone
    (reached,) = top_users(export, [new], k=U, exclude_seen=False)
    bare = replace(score, blocks=tuple(replace(block, direct=None) for block in score.blocks)).scores(history, part)
    assert {int(one.user[1:]): pytest.approx(one.score, rel=1e-3, abs=1e-3) for one in reached} == {
        user: float(bare[user, 5]) for user in range(1, U)
    }


def test_a_new_user_is_answered_by_direct_rows_too(tmp_path):
    blocks = tuple(replace(block, decay=None, dislikes=0.0, disliked=None) for block in direct_blocks()[:2])
    score = made_score(blocks=blocks)
    export = exported(score, padded(made_history("plain")), tmp_path / "export")
    liked = torch.tensor([2, 5, 9])
    wanted = score.scores(Rows(torch.tensor([0, 3]), liked))[0]
    answer = Recommender(export).recommend(Request(items=["i9", "i2", "i5", "i2", "unknown"], k=N))
    assert answer.unknown == ("unknown",)
    ids = [int(item.id[1:]) for item in answer.items]
    assert set(ids) == {i for i in range(1, N) if score.listed[i] and i not in (2, 5, 9)}
    close(torch.tensor([item.score for item in answer.items]), wanted[ids])
    assert wanted[ids].tolist() == sorted(wanted[ids].tolist(), reverse=True)
    # conditions hold for what direct rows add to
    few = Recommender(export).recommend(Request(items=["i9", "i2", "i5"], k=2, exclude=[answer.items[0].id]))
    assert [item.id for item in few.items] == [item.id for item in answer.items[1:3]]


def test_vectors_alone_are_said_to_be_no_scores(tmp_path):
    model = LoadedModel(exported(made_score(blocks=direct_blocks()), padded(made_history("both")), tmp_path / "export"))
    for ask in (model.item_vectors, model.user_vectors):
        with pytest.raises(ValueError, match="direct rows"):
            ask(bias=True)
        assert ask().vectors.shape[1] == 3 + 2 + 4


def test_likeness_reads_direct_rows_where_there_is_no_content(tmp_path):
    blocks = (replace(direct_blocks()[0], source=torch.zeros(N, 1), target=torch.zeros(N, 1)),)
    export = exported(made_score(blocks=blocks), padded(made_history("both")), tmp_path / "export")
    M = dense_direct(blocks[0].direct)[1:, 1:]
    unit = M / M.norm(dim=1, keepdim=True).clamp(min=1e-12)
    cosine = (unit @ unit.T)[4]
    answer = Recommender(export).similar("i5", k=3)
    for item in answer.items:
        assert item.score == pytest.approx(float(cosine[int(item.id[1:]) - 1]), abs=1e-5)
    listed = [i for i in range(1, N) if made_score(blocks=blocks).listed[i] and i != 5]
    assert answer.items[0].score == pytest.approx(max(float(cosine[i - 1]) for i in listed), abs=1e-5)


def rows_of(offsets, items, values=None):
    items = np.array(items, np.int32)
    values = np.ones(len(items), np.float32) if values is None else np.array(values, np.float32)
    return DirectRows(np.array(offsets, np.int64), items, values)


DAMAGED = {
    "another number of rows": (lambda t: t.update({"0.offsets": np.array([0, 1, 2, 2], np.int64)}), "expected int64"),
    "offsets fall": (lambda t: t.update({"0.offsets": np.array([0, 2, 1, 2, 3], np.int64)}), "do not divide"),
    "offsets end early": (lambda t: t.update({"0.offsets": np.array([0, 1, 2, 2, 2], np.int64)}), "do not divide"),
    "outside": (lambda t: t.update({"0.items": np.array([1, 4, 0], np.int32)}), "outside the catalogue of 4"),
    "negative": (lambda t: t.update({"0.items": np.array([1, -1, 0], np.int32)}), "outside the catalogue of 4"),
    "repeated": (lambda t: t.update({"0.items": np.array([1, 1, 0], np.int32)}), "ascending and unique"),
    "unsorted": (lambda t: t.update({"0.items": np.array([2, 1, 0], np.int32)}), "ascending and unique"),
    "not finite": (lambda t: t.update({"0.values": np.array([1, np.nan, 0], np.float32)}), "NaN or infinity"),
    "short values": (lambda t: t.update({"0.values": np.ones(2, np.float32)}), "expected float32"),
    "other kind": (lambda t: t.update({"0.items": np.array([1, 2, 0], np.int64)}), "expected int32"),
    "no items": (lambda t: t.pop("0.items"), "lacks the tensor '0.items'"),
    "of no block": (lambda t: t.update({"2.offsets": t.pop("0.offsets")}), "do not belong there"),
    "of a cosine": (lambda t: t.update({"1.offsets": t.pop("0.offsets")}), "scores by cosine"),
    "nothing": (lambda t: t.clear(), "no rows of any block"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_direct_rows_are_refused(case):
    from safetensors.numpy import save

    tensors = to_tensors({0: rows_of([0, 2, 2, 3, 3], [1, 2, 0], [0.5, 1, 2])})
    blocks = [Block("closed_form", 3, 0.0, 1.0), Block("learned", 2, 0.5, 1.0, "cosine")]
    found = read_direct(memoryview(save(tensors)), 4, blocks)[0]
    assert found.between(np.array([0, 2, 9]), np.array([2, 0, 7])).tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 0]]
    assert found.into(0)[0].tolist() == [2] and found.entries(np.array([3, 0, 4]))[1].tolist() == [1, 2]
    change, message = DAMAGED[case]
    change(tensors)
    with pytest.raises(ExportError, match=message):
        read_direct(memoryview(save(tensors)), 4, blocks)


class Server(RemoteRetriever):
    """A server that finds the best vectors by looking at all of them."""

    def __init__(self, export, catalog):
        super().__init__(export, catalog)
        self.export, self.hidden = export, []

    def ranked(self, query, n, hidden):
        self.hidden.append(set(hidden.tolist()))
        scores = np.where(self.export.listed, self.export.vector @ query + self.export.bias, -np.inf)
        scores[hidden] = -np.inf
        return np.argsort(-scores)[: min(n, int(np.isfinite(scores).sum()))]


def test_a_server_is_asked_for_what_direct_rows_do_not_touch(tmp_path):
    score = made_score(blocks=direct_blocks())
    export = exported(score, padded(made_history("both")), tmp_path / "export")
    servers = []

    def through(export, catalog):
        servers.append(Server(export, catalog))
        return servers[0]

    request = Request(user="u2", k=2, exclude_seen=False)
    recommender = Recommender(export, through)
    assert recommender.recommend(request) == Recommender(export).recommend(request)
    touched = set(recommender._prepare(request).query.touched.tolist())
    assert touched and all(touched & set(np.flatnonzero(export.listed)) <= hidden for hidden in servers[0].hidden)


def test_an_index_finds_what_exact_scoring_finds(tmp_path):
    """Rows that direct rows touch never come from the index: they are kept out of its search, and scored by themselves."""
    export = exported(made_score(blocks=direct_blocks()), padded(made_history("both")), tmp_path / "export")
    asked = []

    class Index:
        def __init__(self, catalog):
            self.catalog = catalog

        def search(self, query, k, exclude, allow):
            asked.append(exclude)
            return ExactRetriever(self.catalog.segments()).search(query, k, exclude, allow)

    through = Recommender(export, lambda export, catalog: Index(catalog))
    request = Request(user="u2", k=4, exclude_seen=False)
    assert through.recommend(request) == Recommender(export).recommend(request)
    touched = through._prepare(request).query.touched
    assert len(touched) and set(touched.tolist()) <= set(asked[0][0].tolist())
    assert math.isfinite(through.recommend(request).items[0].score)


def test_exports_without_direct_rows_are_as_before(tmp_path):
    blocks = (replace(made_blocks(identity=False)[0], decay=None),)
    exported(made_score(blocks=blocks), padded(made_history("plain")), tmp_path / "export")
    assert not (tmp_path / "export" / "direct.safetensors").exists()
    assert load_export(tmp_path / "export").direct == {}


def test_a_block_is_a_value():
    assert LinearBlock("x", torch.zeros(2, 1), torch.zeros(2, 1)).direct is None
