"""Recommendations against a plain reading of the formula, and changes to the catalogue."""

import subprocess
import sys

import numpy as np
import pytest
from made_export import F, WordEncoder, make_contents

from recbole_llm.export.errors import UnknownItemError, UnknownUserError
from recbole_llm.export.reader import ItemRecord, load_export
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.recommender import Recommender, Request


def load(tmp_path, **changes):
    write_artifact(tmp_path / "e", make_contents(**changes))
    return Recommender(load_export(tmp_path / "e"))


@pytest.fixture
def recommender(export):
    return Recommender(export)


def scores_by_formula(export, rows, times, part=None):
    """The module docstring of artifact.py, in float64 and without haste."""
    total, start = export.bias.astype(np.float64), 0
    for block in export.manifest.blocks:
        c = slice(start, start + block.dim)
        start += block.dim
        x = export.offset[c].astype(np.float64)
        if len(rows):
            x = x + (times @ export.source[rows][:, c].astype(np.float64)) / times.sum() ** block.exponent
        if part is not None:
            x = x + part[c]
        if block.scoring == "cosine":
            x = x / np.linalg.norm(x)
        total = total + export.vector[:, c] @ (block.scale * x)
    return total


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
@pytest.mark.parametrize("user_part", [False, True])
def test_users_are_scored_by_the_formula(tmp_path, scoring, user_part):
    recommender = load(tmp_path, scoring=scoring, user_part=user_part)
    export = recommender.export
    for u, user in enumerate(export.user_ids):
        span = slice(*export.history_offsets[u : u + 2])
        rows, times = export.history_items[span], export.history_weight[span].astype(np.float64)
        expected = scores_by_formula(export, rows, times, export.user_part[u] if user_part else None)
        answer = recommender.recommend(Request(user=user, k=40, exclude_seen=False))
        assert answer.source == "history" and len(answer.items) == 40
        got = {item.id: item.score for item in answer.items}
        np.testing.assert_allclose([got[item_id] for item_id in export.item_ids], expected, rtol=1e-4, atol=1e-5)
        assert [i.score for i in answer.items] == sorted(got.values(), reverse=True)


@pytest.mark.parametrize("scoring", ["dot", "cosine"])
@pytest.mark.parametrize(
    "request_of", [lambda: Request(user="u3", explain=3), lambda: Request(items=["i1", "i5"], explain=9)]
)
def test_reasons_rest_and_bias_add_up(tmp_path, scoring, request_of):
    recommender = load(tmp_path, scoring=scoring, user_part=True)
    answer = recommender.recommend(request_of())
    assert any(item.reasons for item in answer.items)
    for item in answer.items:
        assert item.score == pytest.approx(sum(r.contribution for r in item.reasons) + item.rest + item.bias, abs=1e-9)
        assert all(r.contribution > 0 for r in item.reasons)


def test_all_contributions_and_the_offset_are_the_score(tmp_path):
    """Not by definition of rest: every item of the history as a reason leaves the offset alone."""
    recommender = load(tmp_path)
    rows = np.array([1, 5, 9])
    query = recommender._pooling.query(recommender.catalog.source(rows), np.ones(3, np.float32))
    bare = recommender._pooling.query(recommender.catalog.source(rows[:0]), np.ones(0, np.float32))
    w = recommender.export.vector[:20]
    np.testing.assert_allclose(
        recommender._pooling.contributions(query, w).sum(1) + w @ bare.vector, w @ query.vector, rtol=1e-4, atol=1e-5
    )


def test_a_reason_is_what_the_score_loses_without_it(recommender):
    """In a block whose exponent is 0 and without cosine, dropping an item takes exactly its contribution away."""
    only_first = recommender.export.manifest.blocks[0].dim
    rows, ones = np.array([1, 5, 9]), np.ones(3, np.float32)
    pooling, source, w = recommender._pooling, recommender.catalog.source(rows), recommender.export.vector.copy()
    w[:, only_first:] = 0
    query, less = pooling.query(source, ones), pooling.query(source[1:], ones[1:])
    np.testing.assert_allclose(
        pooling.contributions(query, w)[:, 0], w @ query.vector - w @ less.vector, rtol=1e-4, atol=1e-5
    )


def test_seen_and_excluded_items_have_no_place(recommender):
    export = recommender.export
    u = int(np.argmax(np.diff(export.history_offsets)))
    seen = {export.item_ids[row] for row in export.history_items[slice(*export.history_offsets[u : u + 2])]}
    answer = recommender.recommend(Request(user=f"u{u}", k=40, exclude=["i0", "i2", "nope"]))
    assert {i.id for i in answer.items} == set(export.item_ids) - seen - {"i0", "i2"}
    assert answer.unknown == ("nope",)


def test_anonymous_items(recommender):
    export = recommender.export
    answer = recommender.recommend(Request(items=["i3", "zz", "i7", "i3"], k=40))
    assert answer.source == "items" and answer.unknown == ("zz",)
    assert {"i3", "i7"}.isdisjoint(i.id for i in answer.items)
    expected = scores_by_formula(export, np.array([3, 7]), np.ones(2))
    np.testing.assert_allclose(
        [i.score for i in answer.items], [expected[int(i.id[1:])] for i in answer.items], rtol=1e-4
    )
    weighted = recommender.recommend(Request(items=["i3", "i7"], weights=[2, 0.5], k=5))
    expected = scores_by_formula(export, np.array([3, 7]), np.array([2, 0.5]))
    assert weighted.items[0].score == pytest.approx(expected[int(weighted.items[0].id[1:])], rel=1e-4)


def test_recency_counts_where_the_model_says_so(tmp_path):
    recommender = load(tmp_path, history_decay=2.0)
    answer = recommender.recommend(Request(items=["i3", "i7", "i9"], k=1))
    expected = scores_by_formula(recommender.export, np.array([3, 7, 9]), np.exp([-1.0, -0.5, 0.0]))
    assert answer.items[0].score == pytest.approx(expected[int(answer.items[0].id[1:])], rel=1e-4)


def test_unknown_users_and_items(recommender):
    with pytest.raises(UnknownUserError):
        recommender.recommend(Request(user="nobody"))
    with pytest.raises(UnknownItemError):
        recommender.recommend(Request(items=["x", "y"]))
    answer = recommender.recommend(Request(user="nobody", fallback="popular", k=3))
    counts = np.bincount(recommender.export.history_items, minlength=40)
    assert answer.source == "popular"
    assert [i.score for i in answer.items] == sorted(counts, reverse=True)[:3]


def test_one_bad_request_does_not_spoil_the_others(recommender):
    answers = recommender.recommend_many(
        [Request(user="u1"), Request(user="nobody"), Request(user="u2", filter={"colour": "red"}), Request(user="u2")]
    )
    assert isinstance(answers[1], UnknownUserError) and isinstance(answers[2], ValueError)
    assert answers[0] == recommender.recommend(Request(user="u1"))
    assert answers[3] == recommender.recommend(Request(user="u2"))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"user": "u1", "items": ["i1"]},
        {"user": "u1", "k": 0},
        {"items": ["i1"], "weights": [1, 2]},
        {"items": ["i1"], "weights": [-1.0]},
        {"items": ["i1"], "weights": [float("nan")]},
        {"user": "u", "fallback": "x"},
        {"profile_vector": np.zeros(4, np.float32), "by": "chance"},
        {"user": "u1", "explain": -1},
    ],
)
def test_wrong_requests(arguments):
    with pytest.raises(ValueError):
        Request(**arguments)


FILTERS = [
    ({"kind": "farm"}, lambda r: r.attributes["kind"] == "farm"),
    ({"genre": ["space", "war"]}, lambda r: {"space", "war"} & set(r.attributes["genre"])),
    ({"year": {"gte": 1990, "lt": 1995}}, lambda r: 1990 <= r.attributes["year"] < 1995),
    ({"year": [1985, 1990.0]}, lambda r: r.attributes["year"] in (1985, 1990)),
    (
        {"genre": "crime", "year": {"lte": 1999}},
        lambda r: "crime" in r.attributes["genre"] and r.attributes["year"] <= 1999,
    ),
    ({"kind": "nothing"}, lambda r: False),
]


@pytest.mark.parametrize(("condition", "holds"), FILTERS, ids=[str(condition) for condition, _ in FILTERS])
def test_filters(recommender, condition, holds):
    answer = recommender.recommend(Request(items=["i0"], k=40, exclude_seen=False, filter=condition))
    export = recommender.export
    assert {i.id for i in answer.items} == {i for i, r in zip(export.item_ids, export.records, strict=True) if holds(r)}


@pytest.mark.parametrize(
    "condition",
    [{"colour": "red"}, {"year": "1990"}, {"year": {"above": 1}}, {"year": {}}, {"kind": 3}, {"kind": {"gte": 1}}],
)
def test_wrong_filters(recommender, condition):
    with pytest.raises(ValueError, match="filter: "):
        recommender.recommend(Request(user="u1", filter=condition))


def mapped(recommender, text):
    return recommender.map_text(WordEncoder().encode([text])[0][0])


def test_a_new_item_is_recommended_at_once(recommender):
    new = mapped(recommender, "space opera")
    assert recommender.catalog.put("new", ItemRecord("Space opera", "space opera", {"kind": "opera"}), new, time="now")
    answer = recommender.recommend(Request(items=["new"], k=60, exclude_seen=False, explain=1))
    item = next(i for i in answer.items if i.id == "new")
    source = recommender.catalog.source(np.array([40]))[0]
    query = recommender._pooling.query(source[None], np.ones(1, np.float32)).vector
    assert item.cold and item.title == "Space opera"
    assert item.score == pytest.approx(float(query @ new.vector) + new.bias, rel=1e-4)
    assert len(answer.items) == 41
    opera = Request(user="u1", filter={"kind": "opera"})
    assert [i.id for i in recommender.recommend(opera).items] == ["new"]
    recommender.catalog.put("new", ItemRecord("Space opera", "space opera", {"kind": "play"}), new)
    assert recommender.recommend(opera).items == ()
    assert recommender.similar("new", 3).items[0].id != "new"


def test_many_new_items_and_changes(recommender):
    for n in range(300):
        recommender.catalog.put(f"n{n}", ItemRecord(f"N{n}", None, {}), mapped(recommender, f"word{n}"))
    assert not recommender.catalog.put("n7", ItemRecord("Again", None, {}), mapped(recommender, "word8"))
    a, b = recommender.catalog.vector(np.array([recommender.catalog.row("n7"), recommender.catalog.row("n8")]))
    np.testing.assert_array_equal(a, b)
    assert len(recommender.recommend(Request(items=["n5"], k=1000)).items) == 339
    assert recommender.catalog.counts() == {"warm": 37, "cold": 303, "unlisted": 0, "deleted": 0}


def test_deletion_and_return(recommender):
    for item_id in ("i4", "i39"):
        assert recommender.catalog.delete(item_id)
        assert not recommender.catalog.delete(item_id)
        answer = recommender.recommend(Request(items=["i1"], k=40))
        assert item_id not in {i.id for i in answer.items}
        with pytest.raises(UnknownItemError):
            recommender.similar(item_id)
        assert item_id not in {i.id for i in recommender.similar("i1", 40).items}
        before = recommender.export.bias[int(item_id[1:])]
        assert recommender.catalog.put(item_id, ItemRecord("Back", None, {}), None)
        row = recommender.catalog.row(item_id)
        assert recommender.catalog.bias(np.array([row]))[0] == before
    with pytest.raises(UnknownItemError):
        recommender.catalog.delete("never")
    with pytest.raises(UnknownItemError):
        recommender.catalog.put("never", ItemRecord("", None, {}), None)


def test_a_warm_item_keeps_its_vectors_unless_refitted(recommender):
    user = f"u{int(np.argmax(np.diff(recommender.export.history_offsets)))}"
    span = slice(*recommender.export.history_offsets[int(user[1:]) : int(user[1:]) + 2])
    seen = recommender.export.item_ids[int(recommender.export.history_items[span][0])]
    new, before = mapped(recommender, "snow"), recommender.recommend(Request(user=user, k=40))
    recommender.catalog.put(seen, ItemRecord("Changed", "snow", {}), new)
    assert recommender.catalog.row(seen) < 40 and not recommender.catalog.is_cold(recommender.catalog.row(seen))
    assert recommender.catalog.state(recommender.catalog.row(seen)).record.title == "Changed"
    recommender.catalog.put(seen, ItemRecord("Changed", "snow", {}), new, refit=True)
    row = recommender.catalog.row(seen)
    assert row >= 40 and recommender.catalog.is_cold(row)
    np.testing.assert_array_equal(recommender.catalog.vector(np.array([row]))[0], new.vector)
    # still seen, and the history is still made of what was trained
    assert recommender.recommend(Request(user=user, k=40)) == before
    assert recommender.catalog.counts()["deleted"] == 0


def test_text_queries(recommender):
    vector = WordEncoder().encode(["space story"])[0][0]
    answer = recommender.recommend(Request(text_vector=vector, k=40, explain=2))
    _, source, _ = recommender.export.text_map.apply(vector[None])
    query = recommender._pooling.query(source, np.ones(1, np.float32)).vector
    expected = recommender.export.vector @ query + recommender.export.bias
    assert answer.source == "text" and answer.items[0].reasons == ()
    assert answer.items[0].score == pytest.approx(float(expected.max()), rel=1e-4)
    answers = recommender.recommend_many([Request(text_vector=np.zeros(F + 1, np.float32))])
    assert isinstance(answers[0], ValueError)


def test_an_export_without_a_map_says_so(tmp_path):
    recommender = load(tmp_path, text_map=None)
    with pytest.raises(ValueError, match="maps no texts"):
        recommender.recommend(Request(text_vector=np.zeros(F, np.float32)))


@pytest.mark.parametrize("by", ["vector", "source"])
def test_similar(tmp_path, by):
    recommender = load(tmp_path, similar_by=by)
    table = getattr(recommender.export, by).astype(np.float64)
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    cosine = unit @ unit[8]
    cosine[8] = -np.inf
    answer = recommender.similar("i8", k=5)
    assert [int(i.id[1:]) for i in answer.items] == np.argsort(-cosine)[:5].tolist()
    np.testing.assert_allclose([i.score for i in answer.items], np.sort(cosine)[::-1][:5], rtol=1e-5)
    narrowed = recommender.similar("i8", k=5, filter={"kind": "farm"})
    assert all(recommender.export.records[int(i.id[1:])].attributes["kind"] == "farm" for i in narrowed.items)


def test_similar_to_an_item_that_the_model_does_not_rank(tmp_path):
    listed = np.ones(40, bool)
    listed[39] = False
    recommender = load(tmp_path, listed=listed)
    ranked = [i.id for i in recommender.similar("i39", k=40).items]
    assert len(ranked) == 39 and "i39" not in ranked
    assert ranked[0] == max(
        (f"i{n}" for n in range(39)),
        key=lambda i: np.dot(*(unit(recommender.export.vector[int(j[1:])]) for j in (i, "i39"))),
    )
    assert "i39" not in {i.id for i in recommender.similar("i1", k=40).items}


def unit(vector):
    return vector / np.linalg.norm(vector)


def test_search_by_title(recommender):
    assert [s.id for s in recommender.catalog.find("title 1", 3)] == ["i1", "i10", "i11"]
    assert recommender.catalog.find("LE 39", 5)[0].id == "i39"
    assert recommender.catalog.find("nothing", 5) == []


def test_serving_loads_neither_torch_nor_recbole():
    modules = (
        "serving.recommend serving.artifact export.writer export.in_memory retrieval.recommender commands.recommend"
    )
    code = "".join(f"import recbole_llm.{m}\n" for m in modules.split())
    code += "import sys; print([m for m in ('torch', 'recbole', 'transformers', 'pandas') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_a_query_that_is_not_finite_is_the_error_of_its_request_alone(tmp_path):
    """Finite numbers of a model may give infinite scores; those who ask beside it are answered."""
    contents = make_contents(user_part=True)
    contents.user_part[3] = 3e38
    write_artifact(tmp_path / "e", contents)
    recommender = Recommender(load_export(tmp_path / "e"))
    with np.errstate(over="ignore", invalid="ignore"):
        wrong, right = recommender.recommend_many([Request(user="u3"), Request(user="u1")])
    assert isinstance(wrong, ValueError) and "no finite score" in str(wrong)
    assert right.items == recommender.recommend(Request(user="u1")).items and len(right.items) == 10
