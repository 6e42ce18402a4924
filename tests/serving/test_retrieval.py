"""Exact top-k against a full sort."""

import itertools

import numpy as np
import pytest
from made_export import make_contents

from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.reader import ItemRecord
from recbole_llm.retrieval import exact as retrieval
from recbole_llm.retrieval.exact import ExactRetriever, Segment, top_rows
from recbole_llm.retrieval.item_catalog import Catalog, MappedItem

NONE = np.zeros(0, np.int64)


def oracle(query, vector, bias, k, exclude, allow):
    scores = (vector.astype(np.float64) * query.astype(np.float64)).sum(1) + bias
    scores[exclude] = -np.inf
    if allow is not None:
        scores[~allow] = -np.inf
    order = np.lexsort((np.arange(len(scores)), -scores))
    order = order[scores[order] > -np.inf][:k]
    return order, scores[order]


# (items, cut between segments, tile): below a block; ragged; several tiles; a second segment; a tile per block
@pytest.mark.parametrize(
    ("n", "cut", "tile"), [(5, 5, 16384), (300, 300, 16384), (5000, 5000, 512), (5000, 4990, 1000), (700, 0, 256)]
)
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("k", [1, 10, 1000])
def test_equals_a_full_sort(monkeypatch, n, cut, tile, batch, k):
    monkeypatch.setattr(retrieval, "TILE", tile)
    rng = np.random.default_rng(n + batch + k)
    vector = rng.standard_normal((n, 12)).astype(np.float32)
    vector[n // 2 :] = vector[: n - n // 2]  # exact ties throughout
    bias = np.zeros(n, np.float32)
    bias[rng.integers(0, n, n // 5)] = -np.inf
    query = rng.standard_normal((batch, 12)).astype(np.float32)
    exclude = [rng.integers(0, n, rng.integers(0, n)) for _ in range(batch)]
    share = [None, 0.5, 0.02, 0.0]
    allow = [None if share[b % 4] is None else rng.random(n) < share[b % 4] for b in range(batch)]
    hits = ExactRetriever([Segment(0, vector[:cut], bias[:cut]), Segment(cut, vector[cut:], bias[cut:])]).search(
        query, [k] * batch, exclude, allow
    )
    for b, (rows, scores) in enumerate(hits):
        expected_rows, expected = oracle(query[b], vector, bias, k, exclude[b], allow[b])
        np.testing.assert_array_equal(rows, expected_rows)
        np.testing.assert_allclose(scores, expected, rtol=1e-12)


def test_an_answer_does_not_depend_on_its_batch():
    rng = np.random.default_rng(0)
    vector, bias = rng.standard_normal((3000, 64)).astype(np.float32), np.zeros(3000, np.float32)
    query = rng.standard_normal((33, 64)).astype(np.float32)
    retriever = ExactRetriever([Segment(0, vector, bias)])
    together = retriever.search(query, [10] * 33, [NONE] * 33, [None] * 33)
    for b in range(33):
        alone = retriever.search(query[b : b + 1], [10], [NONE], [None])[0]
        np.testing.assert_array_equal(alone.rows, together[b].rows)
        np.testing.assert_array_equal(alone.scores, together[b].scores)


def test_everything_masked_gives_nothing():
    vector, bias = np.ones((600, 2), np.float32), np.full(600, -np.inf, np.float32)
    assert len(ExactRetriever([Segment(0, vector, bias)]).search(vector[:1], [3], [NONE], [None])[0].rows) == 0


@pytest.mark.parametrize("n_allowed", [3, 60])  # gathered, masked
def test_a_part_of_the_catalogue_answers_for_its_own_rows(n_allowed):
    rng = np.random.default_rng(0)
    vector, bias = rng.standard_normal((100, 4)).astype(np.float32), np.zeros(100, np.float32)
    allow = np.zeros(100, bool)
    allow[[*range(n_allowed - 1), 97]] = True
    last = ExactRetriever([Segment(40, vector[40:], bias[40:])])
    query = rng.standard_normal((1, 4)).astype(np.float32)
    (hits,) = last.search(query, [10], [np.array([97])[:0]], [allow])
    wanted = np.flatnonzero(allow[40:]) + 40
    scores = vector[wanted].astype(np.float64) @ query[0].astype(np.float64)
    assert hits.rows.tolist() == wanted[np.argsort(-scores)][:10].tolist()


def test_top_rows_keeps_ties():
    scores = np.zeros(2000, np.float32)
    scores[[3, 900, 1999]] = 1
    assert set(top_rows(scores, 2)) >= {3, 900, 1999}
    assert len(top_rows(scores, 4)) == 2000
    assert len(top_rows(np.full(10, -np.inf, np.float32), 3)) == 0


def test_top_rows_finds_all_k_where_each_is_alone_in_its_block():
    scores = np.random.default_rng(0).uniform(0, 1, 256 * 40 + 7).astype(np.float32)
    best = np.arange(9) * (2 * 40 + 1) + 11  # 40 blocks
    scores[best] = np.arange(9) + 2
    assert set(best) <= set(top_rows(scores, 9))


def test_float64_tables_are_refused():
    with pytest.raises(ValueError, match="float64"):
        ExactRetriever([Segment(0, np.ones((2, 2)), np.zeros(2, np.float32))])


@pytest.mark.parametrize("share", [0.06, 0.24, 0.26, 0.5, 0.9])
@pytest.mark.parametrize("which", ["any", "worst", "best"])
def test_a_filter_leaves_the_best_of_its_rows(share, which):
    """Also where no row among the best is allowed, so that more of the best do not help."""
    rng = np.random.default_rng(0)
    n, D, k = 5000, 8, 7
    vector, bias = rng.standard_normal((n, D)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    bias[rng.random(n) < 0.1] = -np.inf
    query, hidden = rng.standard_normal(D).astype(np.float32), rng.integers(0, n, 200)
    exact = vector.astype(np.float64) @ query + bias
    allow = np.zeros(n, bool)
    order = {"any": rng.permutation(n), "worst": np.argsort(exact), "best": np.argsort(-exact)}[which]
    allow[order[: int(share * n)]] = True
    exact[~allow] = exact[hidden] = -np.inf
    expected = [row for row in np.lexsort((np.arange(n), -exact))[:k].tolist() if exact[row] > -np.inf]
    cuts = [0, 1800, n]
    segments = [Segment(a, vector[a:b], bias[a:b]) for a, b in itertools.pairwise(cuts)]
    for retriever in (ExactRetriever(segments), ExactRetriever([Segment(0, vector, bias)])):
        (hits,) = retriever.search(query[None], [k], [hidden], [allow])
        assert hits.rows.tolist() == expected
        np.testing.assert_allclose(hits.scores, exact[expected], rtol=1e-12)


def test_values_of_many_rows_are_those_of_each():
    records = [{"kind": "a", "tags": ["x", "x", "y"], "year": 3.0}, {}, {"kind": "b"}, {"kind": "a", "tags": []}]
    records += [{}] * 36
    contents = make_contents(
        records=[ItemRecord(f"t{i}", None, attributes) for i, attributes in enumerate(records)],
        attributes={"kind": "token", "tags": "tokens", "year": "number"},
    )
    catalog = Catalog(export_in_memory(contents))
    for change in range(3):
        rows = np.array([3, 0, 2, 1, 0, len(catalog) - 1])
        for name in ("kind", "tags", "year"):
            one_by_one = [list(catalog.values(row, name)) for row in rows.tolist()]
            assert [list(values) for values in catalog.values_of(rows, name)] == one_by_one
        assert one_by_one[1] == [3.0] or change
        if change == 0:  # another value, one that no item had, and none
            catalog.put("i0", ItemRecord("t0", None, {"kind": "new"}), None)
            catalog.put("i2", ItemRecord("t2", None, {}), None)
        else:
            vector = np.zeros(10, np.float32)
            catalog.put("fresh", ItemRecord("f", None, {"kind": "b"}), MappedItem(vector, vector, 0.0))
