"""Searches against the rule in float64; what is new, changed and taken away; and what a score is made of."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from made_export import F, WordEncoder
from made_search import THINGS, T, bm25, likeness_of_text, make_shop, rule, shares
from safetensors.numpy import load_file, save_file

from recbole_llm.export.errors import ExportError, UnknownItemError
from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.manifest import MANIFEST, SEARCH, _manifest_of
from recbole_llm.export.neighbours import neighbours
from recbole_llm.export.reader import ItemRecord, load_export
from recbole_llm.export.search_tables import SearchTables
from recbole_llm.export.writer import write_artifact
from recbole_llm.loaded import LoadedModel
from recbole_llm.retrieval import search as module
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.retrieval.rules import Boost, Diversity, Exploration, Rules
from recbole_llm.retrieval.words import WordIndex

QUERIES = [
    "Red pan 0",
    "iron",
    "a knife for wool fans",
    "qwertz asdf",
    "PAN &amp; knife",
    "lovers & fans",
    "red red red pan",
    "?!",
    "Steel pen 5. For pen lovers & oak fans",
]


def vector_of(text):
    return WordEncoder().encode([text])[0][0]


def ask(recommender, text, **changes):
    return recommender.recommend(Request(text_vector=vector_of(text), text=text, **{"k": 60, **changes}))


def rows(answer):
    return [int(item.id[1:]) for item in answer.items]


@pytest.fixture
def shop():
    return Recommender(export_in_memory(make_shop()))


@pytest.fixture
def c(shop):
    export = shop.export
    return shares(export.history_offsets, export.history_items, len(export.item_ids))


def expected(export, c, text, by="both", words=True):
    L = likeness_of_text(export, vector_of(text), text if words else None)
    y, t = rule(L, c, 0.1)
    return {"both": y + 0.1 * t, "likeness": y, "chance": t}[by], L


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize("by", module.BY)
@pytest.mark.parametrize("text", QUERIES)
def test_texts_are_ranked_by_the_rule(shop, c, text, by):
    score, L = expected(shop.export, c, text, by)
    answer = ask(shop, text, by=by)
    assert answer.source == "text" and len(answer.items) == 60
    got = {row: item.score for row, item in zip(rows(answer), answer.items, strict=True)}
    np.testing.assert_allclose([got[row] for row in range(60)], score, rtol=1e-5, atol=1e-9)
    assert rows(answer)[:10] == np.lexsort((np.arange(60), -L.round(6), -score.round(9)))[:10].tolist()


def test_a_vector_alone_is_ranked_without_words(shop, c):
    score, _ = expected(shop.export, c, "Red pan 0", words=False)
    answer = shop.recommend(Request(text_vector=vector_of("Red pan 0"), k=60))
    got = {row: item.score for row, item in zip(rows(answer), answer.items, strict=True)}
    np.testing.assert_allclose([got[row] for row in range(60)], score, rtol=1e-5, atol=1e-9)
    assert got != {row: item.score for row, item in zip(rows(answer), ask(shop, "Red pan 0").items, strict=True)}


@pytest.mark.parametrize("by", module.BY)
@pytest.mark.parametrize("row", [0, 3, 17, 57])  # bought; twin; without a text; without a buyer
def test_similar_items_are_ranked_by_the_rule(shop, c, row, by):
    export = shop.export
    texts = export.content["text"].astype(np.float64)
    L = texts @ texts[row]
    L[row] = 1.0
    y, t = rule(L, c, 0.4)
    score = {"both": y + 0.4 * t, "likeness": y, "chance": t}[by]
    answer = shop.similar(f"i{row}", k=60, by=by)
    assert answer.source == "similar" and row not in rows(answer) and len(answer.items) == 59
    got = {row: item.score for row, item in zip(rows(answer), answer.items, strict=True)}
    np.testing.assert_allclose([got[i] for i in range(60) if i != row], np.delete(score, row), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("n_items", "n_users"), [(1, 3), (2, 1), (60, 0), (8, 30)])
def test_catalogues_of_any_size(n_items, n_users):
    export = export_in_memory(make_shop(n_items, n_users))
    c = shares(export.history_offsets, export.history_items, n_items)
    shop = Recommender(export)
    for text in ("Red pan 0", "zzz"):
        score, _ = expected(export, c, text)
        answer = ask(shop, text)
        got = {row: item.score for row, item in zip(rows(answer), answer.items, strict=True)}
        np.testing.assert_allclose([got[row] for row in range(n_items)], score, rtol=1e-5, atol=1e-9)
    assert len(shop.similar("i0", k=9).items) == min(n_items - 1, 9)


def test_no_taste_moves_an_item_whose_likeness_leads(shop, c):
    """The promise of the rule: a lead of more than -T ln(1 - alpha) is first, whatever was bought."""
    lead = -module.TEMPERATURE * np.log(1 - module.TASTE_OF_TEXT)
    assert lead < 0.0211 < module.LEAD
    firsts = 0
    for thing in (*THINGS, *(record.title for record in shop.export.records)):
        L = likeness_of_text(shop.export, vector_of(thing), thing)
        order = np.argsort(-L)
        if L[order[0]] - L[order[1]] > lead:
            firsts += 1
            assert rows(ask(shop, thing, k=1)) == [order[0]]
    assert firsts > 40


def test_items_of_one_text_stand_together_the_better_sold_first(shop, c):
    _, t = rule(likeness_of_text(shop.export, vector_of("Oak rug 0"), "Oak rug 0"), c, 0.1)
    title = shop.export.records[3].title
    assert title == shop.export.records[11].title
    _, t = rule(likeness_of_text(shop.export, vector_of(title), title), c, 0.1)
    assert t[3] != t[11]
    assert rows(ask(shop, title, k=2)) == sorted((3, 11), key=lambda row: -t[row])


def test_a_filter_takes_items_away_and_changes_no_score(shop):
    whole = {item.id: item.score for item in ask(shop, "iron pan").items}
    part = ask(shop, "iron pan", filter={"kind": "wool"}, exclude=["i4", "nope"])
    assert part.unknown == ("nope",)
    kinds = shop.export.records
    wanted = {i for i in whole if kinds[int(i[1:])].attributes["kind"] == "wool"} - {"i4"}
    assert {item.id for item in part.items} == wanted
    assert all(item.score == pytest.approx(whole[item.id], rel=1e-12) for item in part.items)
    near = shop.similar("i8", k=60, filter={"kind": "red"})
    whole = {item.id: item.score for item in shop.similar("i8", k=60).items}
    assert near.items and all(whole[item.id] == pytest.approx(item.score, rel=1e-12) for item in near.items)


def test_a_short_answer_is_the_head_of_a_long_one(shop):
    for text in QUERIES:
        long, short = ask(shop, text), ask(shop, text, k=4)
        assert short.items == long.items[:4]


# ------------------------------------------------------------------ what a score is made of


@pytest.mark.parametrize("by", module.BY)
def test_parts_and_reasons_add_up(shop, c, by):
    score, L = expected(shop.export, c, "iron pan", by)
    near = {}
    for item in ask(shop, "iron pan", explain=50, by=by).items:
        parts = item.parts
        assert min(parts.likeness, parts.words, parts.taste) >= 0
        assert parts.likeness + parts.words + parts.taste == pytest.approx(item.score, rel=1e-9)
        added = sum(reason.contribution for reason in item.reasons)
        assert added == pytest.approx(parts.taste, abs=1e-9)  # all of them are told
        assert added + item.rest + item.bias == pytest.approx(item.score, abs=1e-9)
        assert [r.contribution for r in item.reasons] == sorted((r.contribution for r in item.reasons), reverse=True)
        for reason in item.reasons:
            near.setdefault(reason.id, 0)
            near[reason.id] += reason.contribution
    assert bool(near) == (by != "likeness")
    few = ask(shop, "iron pan", explain=2, k=5, by=by).items
    assert all(len(item.reasons) <= 2 for item in few)
    assert all(item.parts is None and item.reasons is None for item in ask(shop, "iron pan", k=5).items)


def test_a_reason_is_what_taste_loses_without_it(shop, c):
    """Of the first item of the pseudo-history: y_j c_ji over the largest t."""
    L = likeness_of_text(shop.export, vector_of("iron pan"), "iron pan")
    warm = np.flatnonzero(c.any(1))
    near = warm[np.argsort(-L[warm])[:50]]
    pulls = np.exp((L[near] - L.max()) / T)
    largest = (pulls @ c[near]).max()
    for item in ask(shop, "iron pan", explain=3, k=20).items:
        row = int(item.id[1:])
        for reason in item.reasons:
            j = int(reason.id[1:])
            assert reason.contribution == pytest.approx(
                0.1 * np.exp((L[j] - L.max()) / T) * c[j, row] / largest, rel=1e-4
            )


def test_words_are_told_from_likeness(shop):
    exact = ask(shop, "iron", explain=1, k=1).items[0].parts
    vector = shop.recommend(Request(text_vector=vector_of("iron"), explain=1, k=1)).items[0].parts
    assert exact.words > 0 and vector.words == 0 and exact.likeness > 0
    strange = ask(shop, "qwertz", explain=1, k=5).items
    assert all(item.parts.words == 0 for item in strange)


# ------------------------------------------------------------------ rules


def test_rules_hold_for_searches(shop):
    plain = ask(shop, "iron pan")
    kind = {item.id: shop.export.records[int(item.id[1:])].attributes["kind"] for item in plain.items}
    capped = ask(shop, "iron pan", k=7, rules=Rules(caps={"kind": 1}))
    kept = {}
    for item in plain.items:
        kept.setdefault(kind[item.id], item.id)
    assert [item.id for item in capped.items] == list(kept.values())
    lifted = ask(shop, "iron pan", rules=Rules(boosts=(Boost({"kind": "wool"}, add=2.0),)), explain=2)
    wool = [item.id for item in plain.items if kind[item.id] == "wool"]
    assert [item.id for item in lifted.items[: len(wool)]] == wool
    for item in lifted.items:
        added = sum(rule.contribution for rule in item.rules)
        assert added == pytest.approx(2.0 * (item.id in wool))
        assert item.parts.likeness + item.parts.words + item.parts.taste + added == pytest.approx(item.score)
        assert sum(r.contribution for r in item.reasons) + item.rest + item.bias + added == pytest.approx(item.score)
    only = ask(shop, "iron pan", rules=Rules(only=("i1", "i2", "none"), exclude=("i2",)))
    assert [item.id for item in only.items] == ["i1"] and only.unknown == ("none",)
    drawn = [ask(shop, "iron pan", k=10, rules=Rules(explore=Exploration(0.5, seed))) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len({item.id for item in answer.items}) == 10 for answer in drawn)
    various = ask(shop, "iron pan", k=10, rules=Rules(diversity=Diversity(0.5)))
    assert various.items[0].id == plain.items[0].id
    with pytest.raises(ValueError, match="odds needs a probability"):
        ask(shop, "iron pan", rules=Rules(boosts=(Boost({"kind": "wool"}, odds=2.0),)))


def test_a_short_answer_says_why(shop):
    assert ask(shop, "iron pan", k=60).note == ""
    assert ask(shop, "iron pan", k=61).note


# ------------------------------------------------------------------ what changes


def put(recommender, item_id, title, text, refit=False, titled=True):
    record = ItemRecord(title, text, {})
    vector = None if text is None else recommender.map_text(vector_of(text))
    recommender.catalog.put(item_id, record, vector, refit=refit)
    if titled:
        recommender.searches.put_titles({name: vector_of(name) for name in recommender.searches.untitled})


def test_a_new_item_is_first_for_its_title_and_its_text(shop):
    rng = np.random.default_rng(1)
    for n in range(60):
        title = " ".join(rng.permutation([*THINGS, "iron", "red"])[: 1 + n % 4]) + f" n{n // 4}"
        text = " ".join(rng.permutation([*THINGS, "lovers", "fans"])[:6]) + f" {n}"
        put(shop, f"n{n}", title, text)
        assert ask(shop, title, k=1).items[0].id == f"n{n}"
        assert ask(shop, text, k=1).items[0].id == f"n{n}"
        assert ask(shop, title.upper() + "  ", k=1).items[0].id == f"n{n}"
        assert ask(shop, title, k=1).items[0].cold


def test_entities_are_what_they_stand_for(shop):
    put(shop, "new", "Salt &amp; pepper caf&eacute;", "a mill")
    assert shop.searches.search.words.scores("salt & pepper café", 61)[60] > 0
    for text in ("Salt & pepper café", "salt &amp; PEPPER caf&eacute;"):
        assert ask(shop, text, k=1).items[0].id == "new"


def test_a_title_waits_for_its_vector_and_counts_from_then_on(shop):
    put(shop, "new", "quilt", "something else", titled=False)
    assert shop.searches.is_behind and shop.searches.untitled == ["quilt"]
    half = Request(text_vector=vector_of("quilt zzz"), k=61, by="likeness")
    before = {item.id: item.score for item in shop.recommend(half).items}["new"]
    shop.searches.put_titles({"quilt": vector_of("quilt"), "other": vector_of("other")})
    assert not shop.searches.is_behind and shop.searches.untitled == []
    after = {item.id: item.score for item in shop.recommend(half).items}["new"]
    assert after > 2 * before
    put(shop, "new", "quilt", "something else", titled=False)
    assert not shop.searches.is_behind or shop.searches.untitled == []  # it has not changed
    put(shop, "i60", "i60", "a nameless thing", titled=False)
    assert shop.searches.untitled == []  # an id is no title


def test_a_changed_text_is_found_by_its_new_words_and_no_more_by_its_old(shop):
    record = shop.export.records[20]
    assert rows(ask(shop, record.title, k=1)) == [20]
    put(shop, "i20", "Velvet curtain", "a curtain of velvet")
    assert ask(shop, "Velvet curtain", k=1).items[0].id == "i20"
    assert ask(shop, record.title, k=1).items[0].id != "i20"
    shop.catalog.put("i20", record, shop.map_text(vector_of(record.text)))
    shop.searches.put_titles({name: vector_of(name) for name in shop.searches.untitled})
    fresh = Recommender(export_in_memory(make_shop()))
    for text in ("Velvet curtain", record.title, "iron pan"):
        # words of a changed text are counted in float64, those of the index in float32
        assert [i.id for i in ask(shop, text).items] == [i.id for i in ask(fresh, text).items]


def test_an_item_fitted_anew_keeps_its_buyers(shop, c):
    """Its row changes: what was bought with the old one speaks for the new one, as query and as answer."""
    before = ask(shop, "iron pan", explain=50)
    record = shop.export.records[2]
    shop.catalog.put("i2", record, shop.map_text(vector_of(record.text)), refit=True)
    shop.searches.put_titles({name: vector_of(name) for name in shop.searches.untitled})
    after = ask(shop, "iron pan", explain=50)
    assert [i.id for i in after.items] == [i.id for i in before.items]
    for a, b in zip(after.items, before.items, strict=True):
        assert a.score == pytest.approx(b.score, rel=1e-4, abs=1e-6)
        ours, theirs = ({r.id: r.contribution for r in item.reasons} for item in (a, b))
        assert ours.keys() == theirs.keys() and ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_an_item_fitted_to_another_text_speaks_for_what_its_buyers_bought():
    shop = Recommender(export_in_memory(make_shop(400, 300)))
    assert shop.searches.search._warm[2] == 2 and len(shop.searches.search._warm) > 300
    put(shop, "i2", "Velvet curtain", "curtain of velvet for windows", refit=True)
    answer = ask(shop, "velvet curtain", by="chance", explain=50, k=10)
    assert {reason.id for item in answer.items for reason in item.reasons} >= {"i2"}
    assert answer.items[0].reasons[0].id == "i2"


def test_what_was_taken_away_is_not_found_and_comes_back(shop):
    title = shop.export.records[20].title
    shop.catalog.delete("i20")
    assert 20 not in rows(ask(shop, title)) and 20 not in rows(shop.similar("i1", k=60))
    with pytest.raises(UnknownItemError):
        shop.similar("i20")
    shop.catalog.put("i20", shop.export.records[20], None)
    assert rows(ask(shop, title, k=1)) == [20]


def test_items_that_the_model_does_not_rank_are_found():
    listed = np.arange(60) < 55
    shop = Recommender(export_in_memory(make_shop(listed=listed)))
    assert rows(ask(shop, shop.export.records[57].title, k=1)) == [57]
    assert 57 in rows(shop.similar("i1", k=60))
    shop.catalog.delete("i57")
    assert 57 not in rows(ask(shop, shop.export.records[57].title))


# ------------------------------------------------------------------ parts


@pytest.mark.parametrize("query", [*QUERIES, "", "pan pan KNIFE zzz"])
def test_words_are_counted_as_bm25_says(query):
    texts = [f"{a} {b} {b}" for a in THINGS for b in ("Red", "blue &amp; red", "")] + ["", "A&amp;B"]
    index = WordIndex(texts)
    np.testing.assert_allclose(index.scores(query, len(texts)), bm25(query, texts), rtol=1e-5)
    for row in (0, 5, len(texts)):  # changed texts count by the statistics of the others
        index.put(row, "blue pan")
        index.put(row, "red knife")
    found = index.scores(query, len(texts) + 1)
    np.testing.assert_allclose(found[1:5], bm25(query, texts)[1:5], rtol=1e-5)
    assert found[0] == found[5] == found[-1]
    assert (found[0] > 0) == (not set(["red", "knife"]).isdisjoint(query.lower().split()))


def test_an_index_without_a_word():
    assert WordIndex(["", "?"]).scores("pan", 2).tolist() == [0, 0]
    assert WordIndex([]).scores("pan", 0).tolist() == []
    empty = WordIndex([])
    empty.put(0, "pan")
    assert empty.scores("pan", 1)[0] > 0


@pytest.mark.parametrize("most", [3, 100])
def test_neighbours_are_the_largest_shares(monkeypatch, most):
    shop = make_shop()
    c = shares(shop.history_offsets, shop.history_items, 60)
    for entries in (1, 100, 1 << 24):
        monkeypatch.setattr("recbole_llm.export.neighbours.ENTRIES_AT_ONCE", entries)
        offsets, items, values = neighbours(shop.history_offsets, shop.history_items, 60, most)
        for j in range(60):
            span = slice(offsets[j], offsets[j + 1])
            want = np.flatnonzero(c[j])
            want = np.sort(want[np.lexsort((want, -c[j, want].round(12)))[:most]])
            assert items[span].tolist() == want.tolist()
            np.testing.assert_allclose(values[span], c[j, want], rtol=1e-6)


# ------------------------------------------------------------------ refusals, and exports of before


def test_wrong_questions_say_what_is_expected(shop):
    with pytest.raises(ValueError, match=f"text_vector has {F + 1} dimensions, expected {F}"):
        shop.recommend(Request(text_vector=np.zeros(F + 1, np.float32)))
    with pytest.raises(ValueError, match="by is 'taste'; expected one of both, likeness, chance"):
        Request(text_vector=vector_of("x"), by="taste")
    with pytest.raises(ValueError, match="by is 'taste'"):
        shop.similar("i1", by="taste")
    with pytest.raises(ValueError, match="only searches"):
        Request(user="u1", by="chance")
    with pytest.raises(ValueError, match="without text_vector"):
        Request(user="u1", text="pan")


def test_a_written_export_answers_as_the_one_in_memory(shop, tmp_path):
    write_artifact(tmp_path / "export", make_shop())
    for mapped in (False, True):
        loaded = Recommender(load_export(tmp_path / "export", mapped=mapped))
        for text in QUERIES:
            assert ask(loaded, text, explain=3) == ask(shop, text, explain=3)
        assert loaded.similar("i3", explain=3) == shop.similar("i3", explain=3)


def test_an_export_with_content_alone_goes_by_likeness(caplog):
    made = make_shop(search=None)
    space = make_shop().search.space
    caplog.set_level("INFO")
    shop = Recommender(export_in_memory(made))
    assert "written before searches" in caplog.text and caplog.text.count("Export again") == 1
    z = vector_of("iron pan").astype(np.float64) - made.text_map.center
    L = made.content["text"].astype(np.float64) @ (z / np.linalg.norm(z))
    answer = shop.recommend(Request(text_vector=vector_of("iron pan"), k=60))
    got = {row: item.score for row, item in zip(rows(answer), answer.items, strict=True)}
    np.testing.assert_allclose([got[row] for row in range(60)], np.exp((L - L.max()) / T), rtol=1e-5)
    put(shop, "new", "quilt", "a quilt for a bed")
    assert ask(shop, "quilt", k=1).items[0].id == "new"
    assert space.dim == F


def test_an_export_of_before_answers_as_before(caplog):
    caplog.set_level("INFO")
    shop = Recommender(export_in_memory(make_shop(search=None, content={})))
    assert "no content vectors" in caplog.text
    answer = ask(shop, "iron pan")
    _, source, _ = shop.export.text_map.apply(vector_of("iron pan")[None])
    query = shop._pooling.query(source, np.ones(1, np.float32)).vector
    assert answer.items[0].score == pytest.approx(
        float((shop.export.vector @ query + shop.export.bias).max()), rel=1e-4
    )
    for question in (lambda: ask(shop, "iron pan", by="likeness"), lambda: shop.similar("i1", by="chance")):
        with pytest.raises(ValueError, match="export again"):
            question()


@pytest.mark.parametrize("by", ["both", "likeness", "chance"])
def test_the_python_interface_answers_by_what_is_asked(shop, by, monkeypatch):
    pytest.importorskip("pandas")
    model = LoadedModel(shop.export)
    monkeypatch.setattr("recbole_llm.serving.text.vector_of_question", lambda export, text: vector_of(text))
    expected = ask(shop, "iron pan", by=by, k=7)
    found = model.recommend(text="iron pan", by=by, k=7)
    assert list(found.item) == [item.id for item in expected.items]
    np.testing.assert_allclose(found.score, [item.score for item in expected.items], rtol=1e-6)
    expected = shop.similar("i4", 7, by=by)
    assert list(model.similar("i4", by=by, k=7).item) == [item.id for item in expected.items]


def test_by_belongs_to_a_text(shop):
    model = LoadedModel(shop.export)
    with pytest.raises(ValueError, match="by is 'chance', which says how a text is answered; give text"):
        model.recommend(items=["i4"], by="chance")
    with pytest.raises(ValueError, match="by"):
        model.similar("i4", by="price")


# ------------------------------------------------------------------ an index of candidates


@pytest.fixture(scope="module")
def large():
    """A catalogue with an index, and the same without."""
    pytest.importorskip("faiss", reason="extra 'ann'")
    from recbole_llm.retrieval.search_index import build_search_index

    made = make_shop(6000, 900, seed=3)
    content = build_search_index(made.content["text"], made.search.titles)
    exact = Recommender(export_in_memory(made))
    return Recommender(export_in_memory(replace(made, search_index=content))), exact


def test_an_index_finds_what_comparing_all_does(large):
    indexed, exact = large
    assert indexed.searches.search._index is not None and exact.searches.search._index is None
    pairs = [(ask(indexed, text, k=10), ask(exact, text, k=10)) for text in QUERIES if text != "?!"]
    pairs += [(indexed.similar(f"i{row}", k=10), exact.similar(f"i{row}", k=10)) for row in (0, 11, 5999)]
    alike = []
    for ours, theirs in pairs:
        assert ours.items[0].id == theirs.items[0].id
        assert ours.items[0].score == pytest.approx(theirs.items[0].score, rel=1e-3)
        alike.append(len({i.id for i in ours.items} & {i.id for i in theirs.items}))
    # dozens of items hold the same words: which of them are among a thousand candidates is chance
    assert np.mean(alike) >= 9


@pytest.mark.parametrize("kind", ["red", "wool"])
def test_an_index_keeps_filters_exclusions_and_long_lists(large, kind):
    indexed, exact = large
    for changes in (
        {"filter": {"kind": kind}, "k": 10},
        {"filter": {"kind": kind}, "k": 700},
        {"exclude": [f"i{n}" for n in range(5990)], "k": 20},
        {"k": 6000},
    ):
        ours, theirs = ask(indexed, "iron pan", **changes), ask(exact, "iron pan", **changes)
        assert len(ours.items) == len(theirs.items) > 0
        assert ours.items[:5] == theirs.items[:5]


def test_what_is_new_is_found_beside_an_index(large):
    indexed, _ = large
    put(indexed, "new", "velvet quilt", "a quilt of velvet for red pans")
    assert ask(indexed, "velvet quilt", k=1).items[0].id == "new"
    assert "new" in {item.id for item in ask(indexed, "quilt", k=10).items}


def test_an_index_of_another_export_is_refused(large):
    indexed, _ = large
    content = indexed.export.search_index
    with pytest.raises(ExportError, match="not an index of this export"):
        Recommender(export_in_memory(make_shop(search_index=bytes(content))))
    with pytest.raises(ExportError, match=r"search.faiss cannot be read"):
        Recommender(export_in_memory(make_shop(search_index=b"no index")))


# ------------------------------------------------------------------ damaged files


DAMAGE = {
    "offsets fall": ("neighbour.offsets", lambda a: a[::-1].copy(), "do not rise"),
    "offsets end early": ("neighbour.offsets", lambda a: np.minimum(a, a[-1] - 1), "do not rise"),
    "an item outside": (
        "neighbour.items",
        lambda a: np.where(np.arange(len(a)) == 3, 60, a).astype(np.int32),
        "outside",
    ),
    "a negative item": (
        "neighbour.items",
        lambda a: np.where(np.arange(len(a)) == 3, -1, a).astype(np.int32),
        "outside",
    ),
    "unsorted": ("neighbour.items", lambda a: a[::-1].copy(), "ascending|its own"),
    "a share of none": ("neighbour.shares", lambda a: a * 0, "positive"),
    "nan": ("neighbour.shares", lambda a: a * np.nan, "NaN"),
    "a share missing": ("neighbour.shares", lambda a: a[:-1].copy(), "one positive number"),
    "titles of others": ("titles", lambda a: a[:-1].copy(), "titles"),
    "narrow titles": ("titles", lambda a: a[:, :-1].copy(), "titles"),
    "a long center": ("center", lambda a: np.append(a, a), "titles"),
    "a transform of others": ("transform", lambda a: np.eye(3, dtype=np.float32), "transform"),
    "more": ("more", lambda a: np.eye(3, dtype=np.float32), "do not belong"),
    "no offsets": ("neighbour.offsets", None, "lacks the tensor"),
    "no center": ("center", None, "belong together"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_search_tables_are_refused(tmp_path, case):
    name, change, message = DAMAGE[case]
    write_artifact(tmp_path / "export", make_shop())
    file = tmp_path / "export" / SEARCH
    tensors = dict(load_file(file))
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    save_file(tensors, file)
    raw = json.loads((tmp_path / "export" / MANIFEST).read_text())
    written = file.read_bytes()
    raw["files"][SEARCH] = {"bytes": len(written), "sha256": hashlib.sha256(written).hexdigest()}
    raw["export_id"] = _manifest_of(dict(raw)).identity()
    (tmp_path / "export" / MANIFEST).write_text(json.dumps(raw))
    with pytest.raises(ExportError, match=message):
        load_export(tmp_path / "export")


def test_an_item_is_no_neighbour_of_itself():
    with pytest.raises(ValueError, match="its own neighbour"):
        SearchTables(np.array([0, 1, 1]), np.array([0], np.int32), np.ones(1, np.float32))


def test_what_older_readers_are_told(tmp_path):
    manifest = write_artifact(tmp_path / "export", make_shop())
    assert manifest.min_reader == 3 and SEARCH in manifest.files
    plain = write_artifact(tmp_path / "plain", make_shop(search=None))
    assert plain.min_reader == 2
    assert write_artifact(tmp_path / "bare", make_shop(search=None, content={})).min_reader == 1
