"""The IVF index: recall as promised, and exclusions, filters and new items as exact as without it."""

import numpy as np
import pytest
from made_export import WordEncoder, make_contents

pytest.importorskip("faiss", reason="extra 'ann'")

from recbole_llm.export.errors import ExportError
from recbole_llm.export.pooling import Pooling
from recbole_llm.export.reader import ItemRecord, load_export
from recbole_llm.export.writer import write_artifact
from recbole_llm.retrieval.candidates import sample_queries
from recbole_llm.retrieval.ivf import build_index
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.retrieval.rules import Boost, Rules

N = 4000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((40, 10)).astype(np.float32)
    of = rng.integers(0, 40, N)
    vector = (centres[of] + 0.3 * rng.standard_normal((N, 10))).astype(np.float32)
    contents = make_contents(n_items=N, n_users=80, vector=vector, source=vector.copy())
    queries = sample_queries(
        Pooling(contents.blocks, contents.offset),
        contents.source,
        contents.history_offsets,
        contents.history_items,
        contents.history_weight,
    )
    index = build_index(contents.vector, contents.bias, queries)
    assert index[0]["recall_at_10"] >= 0.99 and 1 <= index[0]["nprobe"] < index[0]["nlist"]
    folder = tmp_path_factory.mktemp("ivf") / "export"
    write_artifact(folder, make_contents(n_items=N, n_users=80, vector=vector, source=vector.copy(), index=index))
    return folder


@pytest.fixture
def pair(folder):
    export = load_export(folder)
    return Recommender(export), Recommender(export, lambda export, catalog: None)


def recall(ivf, exact, **request):
    answers = [
        (ivf.recommend(Request(user=f"u{n}", **request)), exact.recommend(Request(user=f"u{n}", **request)))
        for n in range(80)
    ]
    shares = []
    for got, wanted in answers:
        assert len(got.items) == len(wanted.items)
        scores = {i.id: i.score for i in wanted.items}
        assert all(i.score == scores[i.id] for i in got.items if i.id in scores)
        shares.append(len({i.id for i in got.items} & scores.keys()) / max(len(scores), 1))
    return np.mean(shares)


@pytest.mark.parametrize(
    "request_",
    [{}, {"filter": {"kind": "farm"}}, {"filter": {"year": {"lt": 2000}}}, {"k": 60}, {"exclude_seen": False}],
    ids=str,
)
def test_recall(pair, request_):
    ivf, exact = pair
    assert ivf._retriever is not None and exact._retriever is None
    assert recall(ivf, exact, **request_) >= 0.97


@pytest.mark.parametrize(
    "rules",
    [
        Rules(caps={"kind": 2}),  # eight items, and all others are passed over
        Rules(caps={"genre": 3}, filter={"year": {"lt": 4000}}),
        Rules(boosts=[Boost({"kind": "farm"}, add=2.0), Boost({"year": {"gte": 3000}}, odds=0.5)]),
        Rules(caps={"kind": 4}, boosts=[Boost({"kind": ["sea", "space"]}, odds=4.0)]),
        Rules(only=[f"i{n}" for n in range(0, N, 7)], exclude=[f"i{n}" for n in range(0, N, 21)]),
    ],
    ids=lambda rules: str(rules)[:60],
)
def test_rules_are_kept(pair, rules):
    ivf, exact = pair
    assert recall(ivf, exact, rules=rules) >= 0.97


def test_answers_are_never_short(pair):
    ivf, exact = pair
    for request in (
        {"k": N},
        {"k": 10, "exclude": [f"i{n}" for n in range(N - 5)]},
        {"filter": {"year": 1990}},
        {"filter": {"year": [1990, 1991]}},
    ):
        got, wanted = (r.recommend(Request(items=["i1"], **request)) for r in pair)
        assert [i.id for i in got.items] == [i.id for i in wanted.items]


def test_exclusions_deletions_and_new_items(pair):
    ivf, _ = pair
    request = Request(items=["i1"], k=20)
    first = [i.id for i in ivf.recommend(request).items]
    ivf.catalog.delete(first[0])
    assert [i.id for i in ivf.recommend(request).items][:19] == first[1:]
    ivf.catalog.put(first[0], ItemRecord("Back", None, {}), None)
    assert [i.id for i in ivf.recommend(request).items] == first
    new = ivf.map_text(WordEncoder().encode(["space"])[0][0])
    best = type(new)(ivf.catalog.vector(np.array([int(first[0][1:])]))[0] * 2, new.source, 50.0)
    ivf.catalog.put("new", ItemRecord("New", None, {}), best)
    assert [i.id for i in ivf.recommend(request).items] == ["new", *first[:19]]
    assert "new" not in {i.id for i in ivf.recommend(Request(items=["i1"], k=20, exclude=["new"])).items}


def test_many_hidden_rows_leave_room_for_the_others(pair):
    ivf, exact = pair
    condition = {"kind": ["farm", "space"]}
    best = [i.id for i in exact.recommend(Request(items=["i1"], k=60, filter=condition)).items]
    got = ivf.recommend(Request(items=["i1"], k=10, filter=condition, exclude=best[:40]))
    assert [i.id for i in got.items] == best[40:50]
    for item_id in (best := [i.id for i in exact.recommend(Request(items=["i1"], k=60)).items])[:40]:
        ivf.catalog.delete(item_id)
    assert [i.id for i in ivf.recommend(Request(items=["i1"], k=10)).items] == best[40:50]


def test_an_index_of_other_vectors_is_refused(folder, tmp_path):
    small = make_contents(n_items=100, n_users=5)
    index = build_index(small.vector, small.bias, np.ones((3, 10), np.float32))
    write_artifact(tmp_path / "e", make_contents(n_items=120, n_users=5, index=index))
    with pytest.raises(ExportError, match="not an index of this export"):
        Recommender(load_export(tmp_path / "e"))
    write_artifact(tmp_path / "f", make_contents(index=(index[0], b"garbage" * 10)))
    with pytest.raises(ExportError, match="index.faiss"):
        Recommender(load_export(tmp_path / "f"))


def test_without_faiss_everything_is_scored(folder, monkeypatch, caplog):
    import sys

    monkeypatch.setitem(sys.modules, "faiss", None)
    recommender = Recommender(load_export(folder))
    assert recommender._retriever is None and "pip install -e '.[ann]'" in caplog.text
    assert len(recommender.recommend(Request(user="u1")).items) == 10
