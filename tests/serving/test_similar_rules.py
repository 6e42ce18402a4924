"""What is like an item, under rules: as brute force answers, over HTTP as in Python and on the command line."""

import numpy as np
import pytest
from made_search import make_shop
from rules_by_force import Force
from test_rules_by_force import made_recommender, made_rules

from recbole_llm import cli
from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.writer import write_artifact
from recbole_llm.recommend import similar_items
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.retrieval.rules import Boost, Diversity, Exploration, Rules


def force_of(recommender, item_id, by="both"):
    """Brute force over the whole answer to an item, which is its own history."""
    catalog = recommender.catalog
    whole = recommender.similar(item_id, k=len(catalog) + 1, by=by)
    rows = [catalog.row_of[item.id] for item in whole.items]
    content = catalog.content(np.array(rows, np.int64)) if rows else np.zeros((0, 5))
    items = {
        row: (item.score, catalog.records[row].attributes, content[at].tolist())
        for at, (row, item) in enumerate(zip(rows, whole.items, strict=True))
    }
    own = catalog.row_of[item_id]
    return Force(items, [(own, 1.0)], [catalog.records[own].attributes], None), own


@pytest.mark.parametrize("seed", [0, 1])
def test_random_rules_are_kept_as_by_brute_force(seed):
    rng, at_work, done = np.random.default_rng(seed), 0, 0
    while done < 120:
        recommender = made_recommender(rng)
        catalog = recommender.catalog
        live = np.flatnonzero(catalog.live())
        if not len(live):
            continue
        item = catalog.ids[int(rng.choice(live))]
        force, own = force_of(recommender, item)
        if len({round(score, 9) for score, _, _ in force.items.values()}) < len(force.items):
            continue  # equal scores are ordered by likeness, which brute force does not know
        for _ in range(12):
            rules, k = made_rules(rng, catalog.n_base, odds=False), int(rng.integers(1, 20))
            if rules.explore is not None:
                continue
            answer = recommender.similar(item, k=k, rules=rules)
            got = [catalog.row_of[one.id] for one in answer.items]
            scores = force.check(rules, {own}, k, k, got)
            assert [one.score for one in answer.items] == pytest.approx([scores[row] for row in got], abs=1e-9)
            assert answer.source == "similar" and item not in {one.id for one in answer.items}
            assert (len(got) < k) == answer.note.startswith(f"{len(got)} of {k}: ")
            at_work += bool(rules.rerank and got)
            done += 1
    assert at_work > 40


@pytest.fixture(scope="module")
def shop():
    return Recommender(export_in_memory(make_shop()))


def test_each_rule_on_a_search_with_taste(shop):
    whole = shop.similar("i3", k=60)
    kind = {
        item_id: record.attributes["kind"]
        for item_id, record in zip(shop.export.item_ids, shop.export.records, strict=True)
    }
    score = {item.id: item.score for item in whole.items}
    ask = lambda k=10, **rules: shop.similar("i3", k=k, rules=Rules(**rules))  # noqa: E731
    ids = lambda answer: [item.id for item in answer.items]  # noqa: E731
    order = ids(whole)
    assert ids(ask(filter={"kind": "oak"})) == [i for i in order if kind[i] == "oak"][:10]
    assert ids(ask(exclude=order[:3])) == order[3:13]
    assert ids(ask(only=["i9", "i3", "i21"])) == [i for i in order if i in ("i9", "i21")]
    unknown = ask(only=["i9", "stranger"])
    assert ids(unknown) == ["i9"] and unknown.unknown == ("stranger",) and unknown.note.startswith("1 of 10: ")
    capped = ids(ask(caps={"kind": 1}, k=7))
    firsts = {kind[i]: i for i in reversed(order)}
    assert capped == sorted(firsts.values(), key=order.index)
    boosted = ask(boosts=[Boost({"kind": "cork"}, add=0.5)], k=60)
    wanted = {i: score[i] + 0.5 * (kind[i] == "cork") for i in order}
    assert ids(boosted) == sorted(order, key=lambda i: (-wanted[i], int(i[1:])))
    for item in boosted.items:
        assert sum(rule.contribution for rule in item.rules) == pytest.approx(wanted[item.id] - score[item.id])
    spread = ask(diversity=Diversity(0.9))
    assert ids(spread) != order[:10] and set(ids(spread)) <= set(order[:50])
    # what is calibrated is calibrated to the item's own kind
    own = ask(diversity=Diversity(0.95, "kind"), k=5)
    assert all(kind[i] == kind["i3"] for i in ids(own))
    drawn = ask(explore=Exploration(0.5, 4))
    assert ids(drawn) == ids(ask(explore=Exploration(0.5, 4))) != ids(ask(explore=Exploration(0.5, 5)))
    assert sum(rule.rule == "exploration" for item in drawn.items for rule in item.rules) == 5
    with pytest.raises(ValueError, match="boost: odds needs a probability"):
        ask(boosts=[Boost({"kind": "cork"}, odds=2)])
    explained = shop.similar("i3", k=5, explain=2, rules=Rules(boosts=[Boost({"kind": "cork"}, add=0.5)]))
    for item in explained.items:
        added = sum(rule.contribution for rule in item.rules)
        assert item.score == pytest.approx(sum(vars(item.parts).values()) + added, abs=1e-9)


def test_an_export_without_content_keeps_the_rules_too():
    bare = Recommender(export_in_memory(make_shop(content={}, search=None)))
    whole = bare.similar("i3", k=60)
    kind = {
        item_id: record.attributes["kind"]
        for item_id, record in zip(bare.export.item_ids, bare.export.records, strict=True)
    }
    capped = bare.similar("i3", k=7, rules=Rules(caps={"kind": 1}, exclude=[whole.items[0].id]))
    left = [item.id for item in whole.items[1:]]
    assert [item.id for item in capped.items] == sorted({kind[i]: i for i in reversed(left)}.values(), key=left.index)
    with pytest.raises(ValueError, match="holds no content vectors"):
        bare.similar("i3", by="chance")


def test_one_subject_and_a_fallback(shop):
    with pytest.raises(
        ValueError,
        match="Give exactly one of user, items, profile_vector, text_vector, picture_vector and item; got user, item",
    ):
        Request(user="u1", item="i1")
    answer = shop.recommend(Request(item="stranger", fallback="popular", k=3))
    assert answer.source == "popular" and answer.unknown == ("stranger",)
    with pytest.raises(ValueError, match="only searches for a text or for what is like an item"):
        Request(user="u1", by="chance")


def test_the_command_keeps_rules(tmp_path, capsys):
    folder = tmp_path / "export"
    write_artifact(folder, make_shop())
    arguments = ["similar", str(folder), "--item", "i3", "--k", "4"]
    rules = ["--filter", "kind=oak,cork", "--cap", "kind=2", "--exclude", "i24"]
    assert cli.main([*arguments, *rules]) == 0
    told = capsys.readouterr().out
    export = export_in_memory(make_shop())
    wanted = similar_items(
        export, "i3", k=4, rules=Rules(filter={"kind": ["oak", "cork"]}, caps={"kind": 2}, exclude=["i24"])
    )
    assert len(wanted.items) == 4 and [line.split()[-1] for line in told.splitlines()[1:] if "[" not in line] == [
        item.id for item in wanted.items if not item.rules
    ]
    assert cli.main([*arguments, "--only", "i9"]) == 0
    assert "1 of 4: " in capsys.readouterr().err
    assert cli.main([*arguments, "--only", "stranger"]) == 2
    err = capsys.readouterr().err
    assert "--only: no item has the id 'stranger'" in err and "--skip-unknown" not in err
    assert cli.main([*arguments, "--boost", "kind=oak:x2"]) == 2
    assert "odds needs a probability" in capsys.readouterr().err


def test_http_answers_as_python(start, tmp_path):
    pytest.importorskip("fastapi", reason="extra 'serve'")
    from made_service import is_problem

    write_artifact(tmp_path / "export", make_shop())
    client, shop = start(tmp_path / "export"), Recommender(export_in_memory(make_shop()))
    told = {
        "filter": {"kind": ["oak", "cork", "red"]},
        "exclude": ["i24"],
        "boosts": [{"filter": {"kind": "red"}, "add": 0.3}],
        "caps": {"kind": 2},
        "diversity": {"weight": 0.3},
    }
    rules = Rules(boosts=[Boost({"kind": "red"}, add=0.3)], caps={"kind": 2}, diversity=Diversity(0.3))
    for by in ("both", "likeness", "chance"):
        body = client.ask(item="i3", by=by, k=5, explain=2, **told)
        wanted = shop.recommend(
            Request(item="i3", by=by, k=5, explain=2, filter=told["filter"], exclude=["i24"], rules=rules)
        )
        assert body["source"] == "similar" and body["items"]
        assert [(item["id"], item["score"]) for item in body["items"]] == [(i.id, i.score) for i in wanted.items]
        assert [item.get("rules", []) for item in body["items"]] == [
            [{"rule": r.rule, "contribution": r.contribution, "place": r.place} for r in i.rules] for i in wanted.items
        ]
    plain = client.ask(item="i3", k=7)
    near = client.get("/v1/items/i3/similar", params={"k": 7}).json()
    assert plain["items"] == near["items"]
    batch = client.post("/v1/recommend/batch", json={"requests": [{"item": "i3", "k": 7}, {"item": "nothing"}]}).json()
    assert batch["results"][0]["items"] == plain["items"] and batch["results"][1]["error"]["status"] == 404
    assert "item" in is_problem(client.post("/v1/recommend", json={"item": "i3", "user": "u1"}), 422)
    odds = {"item": "i3", "boosts": [{"filter": {"kind": "red"}, "odds": 2}]}
    assert "odds" in is_problem(client.post("/v1/recommend", json=odds), 422)
    assert "nothing" in is_problem(client.post("/v1/recommend", json={"item": "nothing"}), 404)
