"""What makes rules cheap answers as the plain way does: lifted scans, numbered values, mixes by kinds, rows drawn at random."""

import math

import numpy as np
import pytest
from made_export import make_contents

from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.reader import ItemRecord
from recbole_llm.retrieval.boosts import Boosting, Chance, Lifts, lifts_of
from recbole_llm.retrieval.diversity import ALPHA, AT_ONCE, Calibrated, MarginalRelevance
from recbole_llm.retrieval.exact import TILE, ExactRetriever, Segment
from recbole_llm.retrieval.item_catalog import Catalog, MappedItem
from recbole_llm.retrieval.kept import Kept
from recbole_llm.retrieval.mixes import Mix
from recbole_llm.retrieval.ranking import Source
from recbole_llm.retrieval.rules import Boost
from recbole_llm.retrieval.value_codes import ValueCodes
from recbole_llm.scoring.probability import ProbabilityMap

CHANCE = Chance(ProbabilityMap(0.3, 0.1, 0.2, -1.0, (0.5, 2.0, 0.8), (-0.5, 0.7)), 2.0)


@pytest.mark.parametrize(
    "boosts",
    [
        [Boost({"a": "x"}, add=0.7)],
        [Boost({"a": "x"}, add=1e6), Boost({"b": "y"}, add=-0.3)],  # float32 would lose all order among the lifted
        [Boost({"a": "x"}, odds=3.0), Boost({"b": "y"}, add=0.4)],
        [Boost({f"a{n}": "x"}, add=0.1 * n - 0.3) for n in range(5)],  # more than are looked up by their bits
    ],
)
@pytest.mark.parametrize("share", [None, 0.6, 0.02])
def test_a_lifted_scan_is_the_order_of_lifted_scores(boosts, share):
    rng = np.random.default_rng(len(boosts))
    n, k = TILE + 5000, 300
    vector = rng.standard_normal((n, 8)).astype(np.float32) * np.float32(0.3)
    bias = rng.standard_normal(n).astype(np.float32) * np.float32(0.1)
    bias[rng.random(n) < 0.1] = -np.inf
    query = rng.standard_normal((2, 8)).astype(np.float32)
    masks = [rng.random(n) < at for at in np.linspace(0.7, 0.1, len(boosts))]
    lift = Boosting(Lifts(boosts, masks), CHANCE)
    allow = None if share is None else rng.random(n) < share
    hidden = rng.integers(0, n, 50)
    assert lift.scannable()
    segments = [Segment(0, vector[:9000], bias[:9000]), Segment(9000, vector[9000:], bias[9000:])]
    # the second query is plain, and so is the third, which is the first without its lift
    queries, allowed = query[[0, 1, 0]], [allow, allow, allow]
    found = ExactRetriever(segments).search(queries, [k] * 3, [hidden] * 3, allowed, [lift, None, None])
    for b, hits in enumerate(found):
        scores = vector.astype(np.float64) @ queries[b].astype(np.float64) + bias
        scores[hidden] = -np.inf
        if allow is not None:
            scores[~allow] = -np.inf
        rows = np.flatnonzero(scores > -np.inf)
        by = lift.adjusted(rows, scores[rows]) if b == 0 else scores[rows]
        expected = rows[np.lexsort((rows, -by))[:k]]
        assert hits.rows.tolist() == expected.tolist()
        np.testing.assert_allclose(hits.scores, scores[expected], rtol=1e-12, err_msg="scores are without the lift")


def test_boosts_by_odds_that_are_no_parts_cannot_be_scanned():
    masks = [np.array([True, False])] * 4
    many = [Boost({"a": "x"}, odds=2.0)] * 4
    assert not Boosting(Lifts(many, masks), CHANCE).scannable()
    assert Boosting(Lifts(many[:3], masks[:3]), CHANCE).scannable()
    with pytest.raises(ValueError, match="odds needs a probability"):
        Boosting(Lifts(many[:1], masks[:1]), None)


def made_catalog(attributes, kinds):
    records = [ItemRecord(f"t{row}", None, each) for row, each in enumerate(attributes)]
    records += [ItemRecord("t", None, {}) for _ in range(40 - len(records))]
    return Catalog(export_in_memory(make_contents(records=records, attributes=kinds)))


def test_boosts_are_kept_until_the_catalogue_changes():
    catalog = made_catalog([{"kind": "a"}, {"kind": "b"}], {"kind": "token"})
    boosts = [Boost({"kind": "a"}, add=0.5)]
    first = lifts_of(catalog, boosts)
    assert lifts_of(catalog, [Boost({"kind": "a"}, add=0.5)]) is first
    assert lifts_of(catalog, [Boost({"kind": "a"}, add=0.6)]) is not first
    assert first.sums[:3].tolist() == [0.5, 0.0, 0.0]
    catalog.put("i1", ItemRecord("t", None, {"kind": "a"}), None)
    assert lifts_of(catalog, boosts).sums[:3].tolist() == [0.5, 0.5, 0.0]


def test_what_is_kept_is_bounded_by_its_bytes():
    kept = Kept(10, 100)
    for size in (40, 40, 40):
        kept.put(size + len(kept), "x", size)
    assert list(kept) == [41, 42] and kept.get(40) is None and kept.get(41) == "x"
    kept.put("large", "x", 1000)
    assert list(kept) == ["large"], "one is kept whatever its size"
    kept.clear()
    assert not len(kept)


def test_numbers_of_values_follow_changes_and_do_not_grow_without_end():
    values = [["a"], ["b", "a"], [], ["a"]]
    codes = ValueCodes(lambda row: values[row])
    told = lambda: [list(codes.values[code]) for code in codes.of(np.array([3, 0, 1, 2, 0]), len(values))]  # noqa: E731
    assert told() == [["a"], ["a"], ["b", "a"], [], ["a"]] and not codes.single and len(codes.values) == 3
    assert codes.of(np.array([0, 3]), 4).tolist() == [0, 0]
    for n in range(300):
        values[0] = [f"v{n}"]
        codes.forget(0)
        assert codes.values[codes.of(np.array([0]), 4)[0]] == (f"v{n}",)
    assert len(codes.values) < 100
    values.append(["new"])
    assert codes.values[codes.of(np.array([4]), 5)[0]] == ("new",)
    assert not len(codes.of(np.zeros(0, np.int64), 5))


def divergence(p, listed, one):
    """KL(p || q~) of a list and one more item, by its definition."""
    q = {}
    for own in [*listed, one]:
        for value in own:
            q[value] = q.get(value, 0.0) + 1 / len(own) / (len(listed) + 1)
    return sum(share * math.log(share / ((1 - ALPHA) * q.get(v, 0.0) + ALPHA * share)) for v, share in p.items())


@pytest.mark.parametrize("late", [False, True])
def test_gains_of_a_calibration_differ_as_divergences_do(late):
    """With one value each, with several, and where the first candidate with several comes after the mix was made."""
    history = [["a"], ["a"], ["b"], [], ["c"]] if late else [["a", "b"], ["a"], ["b"], [], ["c"]]
    weights = np.array([1.0, 0.5, 2.0, 3.0, 1.0])
    pool = [["a"], ["b"], ["z"], [], ["c"], ["a"], ["a", "c"], ["b", "z", "a"]]
    known = ValueCodes(lambda row: (history + pool)[row])
    n = len(history) + len(pool)
    mix = Mix(known.of(np.arange(len(history)), n), known, weights)
    shares = {}
    for own, weight in zip(history, weights, strict=True):
        for value in own:
            shares[value] = shares.get(value, 0.0) + weight / len(own)
    p = {value: share / sum(shares.values()) for value, share in shares.items()}
    assert sorted(mix.p.tolist()) == pytest.approx(sorted(p.values()))
    trade_off, listed = Calibrated(0.4, mix), []
    relevance = np.linspace(1, 0.3, len(pool))
    at_first = 6  # those of one value
    trade_off.extend(relevance[:at_first], known.of(np.arange(len(history), len(history) + at_first), n))
    for step, chosen in enumerate((1, 0, 6, 4)):
        if step == 2:
            rows = np.arange(len(history) + at_first, n)
            trade_off.extend(relevance[at_first:], known.of(rows, n))
        gains = trade_off.gains()
        expected = np.array(
            [0.6 * r - 0.4 * divergence(p, listed, own) for r, own in zip(relevance, pool, strict=True)][: len(gains)]
        )
        open_ones = np.flatnonzero(gains > -np.inf)
        np.testing.assert_allclose(
            gains[open_ones] - gains[open_ones[0]], expected[open_ones] - expected[open_ones[0]], atol=1e-12
        )
        trade_off.choose(chosen)
        listed.append(pool[chosen])
    assert np.isneginf(trade_off.gains()[[1, 0, 6, 4]]).all()


def test_a_history_without_values_has_no_mix():
    known = ValueCodes(lambda row: [[], ["a"]][row])
    assert not len(Mix(known.of(np.array([0]), 2), known, np.ones(1)).p)
    assert not len(Mix(known.of(np.array([1]), 2), known, np.zeros(1)).p)
    assert not len(Mix(known.of(np.zeros(0, np.int64), 2), known, np.zeros(0)).p)


@pytest.mark.parametrize("n", [AT_ONCE, AT_ONCE + 1])
def test_marginal_relevance_is_the_same_at_once_and_one_by_one(n):
    """Negative cosines, closed candidates and ones that join later, against loops in float64."""
    rng = np.random.default_rng(n)
    vectors = rng.standard_normal((n, 4)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    relevance, weight, first = np.sort(rng.random(n))[::-1].copy(), 0.6, n - 20
    trade_off = MarginalRelevance(weight)
    trade_off.extend(relevance[:first], vectors[:first])
    trade_off.close(2)
    chosen, open_ones = [], set(range(first)) - {2}
    for step in range(12):
        if step == 6:
            trade_off.extend(relevance[first:], vectors[first:])
            open_ones |= set(range(first, n))
        gains = trade_off.gains()
        near = lambda i: max((float(vectors[i].astype(np.float64) @ vectors[j]) for j in chosen), default=0.0)  # noqa: E731
        for i in range(len(gains)):
            if i in open_ones:
                assert gains[i] * weight == pytest.approx((1 - weight) * relevance[i] - weight * near(i), abs=1e-6)
            else:
                assert gains[i] == -np.inf
        at = int(gains.argmax())
        trade_off.choose(at)
        chosen.append(at)
        open_ones.discard(at)
    assert len(set(chosen)) == 12


def test_scores_of_rows_are_told_in_their_order_where_only_a_search_knows_them():
    from recbole_llm.retrieval.exact import Hits

    scores = np.array([0.5, 3.0, 1.0, 2.0])

    def search(n, hidden, allow):
        rows = np.flatnonzero(allow)
        order = np.argsort(-scores[rows])[:n]
        return Hits(rows[order], scores[rows[order]])

    rows = np.array([3, 0, 1])
    assert Source(search).scores(rows, 4).tolist() == scores[rows].tolist()


def test_values_of_an_added_item_are_known():
    catalog = made_catalog([{"kind": "a"}], {"kind": "token"})
    assert catalog.values_of(np.array([0, 1]), "kind") == [("a",), ()]
    zero = np.zeros(10, np.float32)
    catalog.put("fresh", ItemRecord("f", None, {"kind": "b"}), MappedItem(zero, zero, 0.0))
    assert catalog.values_of(np.array([40, 0]), "kind") == [("b",), ("a",)]
    assert catalog.live()[40] and not catalog.live().flags.writeable
    catalog.delete("fresh")
    assert not catalog.live()[40]
