"""Rules in Python, on the command line and over HTTP: what is refused, what an answer says, the documentation's examples."""

import argparse
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from made_export import WordEncoder

from recbole_llm import cli
from recbole_llm.commands.rule_arguments import add_rule_arguments, rules_of
from recbole_llm.export.reader import load_export
from recbole_llm.recommend import Counts, recommend_items, recommend_users
from recbole_llm.retrieval.draws import Draws
from recbole_llm.retrieval.mixes import mix_of
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.retrieval.rules import Boost, Diversity, Exploration, Rules
from recbole_llm.scoring.probability import ProbabilityMap

KINDS = {"genre": "tokens", "year": "number", "kind": "token"}
PAGE = Path(__file__).parents[2] / "docs" / "recommending.md"


@pytest.fixture
def recommender(export):
    return Recommender(export)


def ids(answer):
    return [item.id for item in answer.items]


# ------------------------------------------------------------------ values


@pytest.mark.parametrize(
    "make, named",
    [
        (lambda: Boost({}, add=1), "filter is empty"),
        (lambda: Boost({"kind": "a"}), "exactly one of add"),
        (lambda: Boost({"kind": "a"}, add=1, odds=2), "exactly one of add"),
        (lambda: Boost({"kind": "a"}, odds=0), "boost: odds is 0"),
        (lambda: Boost({"kind": "a"}, odds=math.nan), "boost: odds is nan"),
        (lambda: Boost({"kind": "a"}, add=True), "boost: add is True"),
        (lambda: Diversity(1.5), "diversity: weight is 1.5"),
        (lambda: Diversity(0.5, ""), "diversity: attribute is ''"),
        (lambda: Diversity(0.5, candidates=0), "diversity: candidates is 0"),
        (lambda: Exploration(-0.1), "explore: share is -0.1"),
        (lambda: Exploration(0.1, -1), "explore: seed is -1"),
        (lambda: Rules(only=[]), "only names no item"),
        (lambda: Rules(only="i1"), "only is the string 'i1'"),
        (lambda: Rules(exclude="i1"), "exclude is the string 'i1'"),
        (lambda: Rules(filter=["kind"]), "filter is"),
        (lambda: Rules(caps={"kind": 0}), "caps: kind is 0"),
        (lambda: Rules(caps=["kind"]), "caps is"),
        (lambda: Rules(boosts=[{"filter": {}}]), "boosts holds"),
    ],
)
def test_what_is_no_rule_is_refused_by_name(make, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        make()


@pytest.mark.parametrize(
    "rules, named",
    [
        (Rules(caps={"colour": 1}), "caps: unknown attribute 'colour'"),
        (Rules(diversity=Diversity(0.5, "year")), "diversity: attribute is 'year'"),
        (Rules(diversity=Diversity(0.5, "colour")), "diversity: attribute is 'colour'"),
        (Rules(boosts=[Boost({"colour": "red"}, add=1)]), "boost: filter: unknown attribute 'colour'"),
        (Rules(boosts=[Boost({"year": {"above": 3}}, add=1)]), "boost: filter: year is a number"),
        (Rules(filter={"colour": "red"}), "filter: unknown attribute 'colour'"),
    ],
)
def test_rules_that_do_not_fit_the_export_are_refused_alone(recommender, rules, named):
    bad, good = recommender.recommend_many([Request(user="u3", rules=rules), Request(user="u3")])
    assert isinstance(bad, ValueError) and named in str(bad)
    assert good == recommender.recommend(Request(user="u3"))


def test_the_inverse_of_the_probability_map():
    rng = np.random.default_rng(0)
    for segments in (1, 2, 5):
        knots = tuple(np.sort(rng.normal(size=segments - 1)).tolist())
        chances = ProbabilityMap(0.3, 0.2, -0.4, 1.5, tuple(rng.uniform(0.1, 3, segments).tolist()), knots)
        scores = rng.normal(size=500) * 4
        np.testing.assert_allclose(chances.score(chances.logit(scores, 2.2), 2.2), scores, rtol=0, atol=1e-10)


def test_the_mix_of_a_history():
    assert mix_of([["a", "b"], ["a"], [], ["c"]], np.array([1.0, 2.0, 5.0, 0.0])) == pytest.approx(
        {"a": 2.5 / 3, "b": 0.5 / 3}
    )
    assert mix_of([[], []], np.ones(2)) == {}


# ------------------------------------------------------------------ answers


def test_a_boost_by_odds_multiplies_the_odds(recommender):
    rules = Rules(boosts=[Boost({"kind": "farm"}, odds=3)])
    plain = {i.id: i for i in recommender.recommend(Request(user="u3", k=40)).items}
    answer = recommender.recommend(Request(user="u3", k=40, rules=rules))
    chances, n = recommender._probability, recommender.history_length(Request(user="u3"))
    odds = lambda score: math.exp(float(chances.logit(np.array([score]), math.log(n))[0]))  # noqa: E731
    lifted = 0
    for item in answer.items:
        farm = recommender.export.records[int(item.id[1:])].attributes["kind"] == "farm"
        assert odds(item.score) == pytest.approx(odds(plain[item.id].score) * (3 if farm else 1))
        assert item.probability == plain[item.id].probability  # what is shown changes, not what the user does
        assert [rule.rule for rule in item.rules] == ["boost kind=farm"] * farm
        lifted += farm
    assert lifted > 3 and ids(answer) != list(plain)


def test_reasons_and_boosts_add_up(recommender):
    boosts = [Boost({"kind": "farm"}, add=-0.7), Boost({"genre": ["space", "sea"]}, odds=1.8)]
    answer = recommender.recommend(Request(user="u3", k=12, explain=3, rules=Rules(boosts=boosts, caps={"kind": 4})))
    for item in answer.items:
        total = sum(r.contribution for r in item.reasons) + item.rest + item.bias
        assert item.score == pytest.approx(total + sum(rule.contribution for rule in item.rules), abs=1e-9)
    assert any(rule.contribution for item in answer.items for rule in item.rules)


def test_an_item_names_the_cap_and_the_place_that_it_had(recommender):
    order = ids(recommender.recommend(Request(user="u3", k=40)))
    answer = recommender.recommend(Request(user="u3", k=4, rules=Rules(caps={"kind": 1})))
    kind = lambda item: recommender.export.records[int(item[1:])].attributes["kind"]  # noqa: E731
    skipped = False
    for at, item in enumerate(answer.items):
        place = order.index(item.id) + 1
        skipped |= place > at + 1
        assert [(rule.rule, rule.place) for rule in item.rules] == ([("cap kind", place)] if skipped else [])
    assert skipped or [kind(item) for item in order[:4]] == list({kind(item): 0 for item in order[:4]})


def test_diversity_names_the_place_by_score(recommender):
    order = ids(recommender.recommend(Request(user="u3", k=40)))
    answer = recommender.recommend(Request(user="u3", k=8, rules=Rules(diversity=Diversity(0.9))))
    assert ids(answer) != order[:8]
    for at, item in enumerate(answer.items):
        places = [rule.place for rule in item.rules if rule.rule == "diversity"]
        assert places in ([], [order.index(item.id) + 1])
        assert places or order.index(item.id) == at or at > 0


def test_a_short_list_says_why(recommender):
    few = recommender.recommend(Request(user="u3", rules=Rules(only=["i1", "i2", "zz"])))
    assert few.note == "2 of 10: the history, exclusions and filters leave no more." and few.unknown == ("zz",)
    capped = recommender.recommend(Request(user="u3", rules=Rules(caps={"kind": 1})))
    allowed = len(recommender.recommend(Request(user="u3", k=40)).items)
    assert capped.note == f"4 of 10: {allowed} items meet the conditions, and the caps leave no more of them."
    assert recommender.recommend(Request(user="u3", k=3)).note == ""
    assert recommender.recommend(Request(user="u3", k=40)).note.startswith(f"{allowed} of 40: ")


def test_without_a_history_nothing_is_calibrated_and_the_answer_says_so(recommender):
    sizes = np.diff(recommender.export.history_offsets)
    user = f"u{int(np.argmin(sizes))}"
    assert sizes.min() == 0
    answer = recommender.recommend(Request(user=user, rules=Rules(diversity=Diversity(0.9, "genre"))))
    assert answer.note == "Not calibrated: the history holds no item with a genre."
    assert ids(answer) == ids(recommender.recommend(Request(user=user)))


def test_exploration_is_seeded_even_and_obeys_the_conditions(recommender):
    rules = lambda seed, share=0.5: Rules(  # noqa: E731
        filter={"year": {"gte": 1990}}, caps={"kind": 5}, explore=Exploration(share, seed)
    )
    drawn, places = np.zeros(40), np.zeros(10)
    once = recommender.recommend(Request(user="u3", rules=rules(0)))
    assert once == recommender.recommend(Request(user="u3", rules=rules(0)))
    assert once != recommender.recommend(Request(user="u3", rules=rules(1)))
    plain = ids(
        recommender.recommend(Request(user="u3", rules=Rules(filter={"year": {"gte": 1990}}, caps={"kind": 5})))
    )
    for seed in range(300):
        answer = recommender.recommend(Request(user="u3", rules=rules(seed)))
        explored = [at for at, item in enumerate(answer.items) if any(r.rule == "exploration" for r in item.rules)]
        assert len(explored) == 5 and len(set(ids(answer))) == 10
        assert [i for at, i in enumerate(ids(answer)) if at not in explored] == plain[:5]
        places[explored] += 1
        for at in explored:
            drawn[int(answer.items[at].id[1:])] += 1
    assert places.min() > 100 and places.max() < 200  # 150 of 300 each, +- 8.7
    assert drawn[:10].sum() == 0
    open_ = np.flatnonzero(drawn)
    assert len(open_) >= 20 and drawn[open_].max() < 3.5 * drawn[open_].mean()
    shares = [
        sum(any(r.rule == "exploration" for r in item.rules) for item in answer.items)
        for answer in (recommender.recommend(Request(user="u3", k=5, rules=rules(s, 0.1))) for s in range(300))
    ]
    assert set(shares) == {0, 1} and 100 < sum(shares) < 200  # half a place: one in half of the answers


def test_texts_obey_the_rules(recommender):
    vector = WordEncoder().encode(["space farm"])[0][0]
    rules = Rules(caps={"kind": 2}, boosts=[Boost({"kind": "sea"}, add=100)], only=[f"i{n}" for n in range(30)])
    answer = recommender.recommend(Request(text_vector=vector, k=6, rules=rules))
    kinds = [recommender.export.records[int(item.id[1:])].attributes["kind"] for item in answer.items]
    assert kinds[:2] == ["sea", "sea"] and max(map(kinds.count, kinds)) <= 2
    assert all(int(item.id[1:]) < 30 for item in answer.items)


def test_lists_of_items_and_many_users(export):
    rules = Rules(filter={"kind": "farm"}, caps={"genre": 2})
    counts = Counts()
    rows = list(recommend_users(export, k=10, counts=counts, rules=rules))
    recommender = Recommender(export)
    for user in export.user_ids:
        answer = recommender.recommend(Request(user=user, k=10, rules=rules))
        assert [row.item for row in rows if row.user == user] == ids(answer)
    assert sum(counts.notes.values()) == counts.short == len(export.user_ids)
    listed = recommend_items(export, ["i1", "i2"], rules=rules)
    assert listed == recommender.recommend(Request(items=["i1", "i2"], rules=rules))


def test_the_kernel_knows_masks(export, monkeypatch):
    from recbole_llm import recommend

    rules = Rules(filter={"kind": ["farm", "sea"]}, boosts=[Boost({"year": {"gte": 2000}}, add=1.0)], caps={"genre": 3})
    expected = list(recommend_users(export, k=7, rules=rules))
    monkeypatch.setattr(recommend, "KERNEL_FROM", 1)
    assert list(recommend_users(export, k=7, rules=rules)) == expected


# ------------------------------------------------------------------ the command line


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_rule_arguments(parser)
    return rules_of(parser.parse_args(words), KINDS, lambda given, file: given)


def test_options_are_rules():
    assert parsed("--filter", "genre=Drama, Comedy", "--filter", "year>=1990", "--filter", "year<2000").filter == {
        "genre": ["Drama", "Comedy"],
        "year": {"gte": 1990.0, "lt": 2000.0},
    }
    assert parsed("--filter", '{"genre": ["a, b"], "year": 1990}').filter == {"genre": ["a, b"], "year": 1990}
    assert parsed("--filter", "year=1990,1991").filter == {"year": [1990.0, 1991.0]}
    assert parsed("--filter", "kind=a=b").filter == {"kind": ["a=b"]}
    boosts = parsed("--boost", "kind=a:+0.5", "--boost", "year>1990:x2", "--boost", "kind=b:c:-1").boosts
    assert boosts == [
        Boost({"kind": ["a"]}, add=0.5),
        Boost({"year": {"gt": 1990.0}}, odds=2.0),
        Boost({"kind": ["b:c"]}, add=-1.0),
    ]
    assert parsed("--cap", "kind=2", "--cap", "genre=3").caps == {"kind": 2, "genre": 3}
    assert parsed("--diversity", "0.3").diversity == Diversity(0.3)
    assert parsed("--diversity", "genre=0.3").diversity == Diversity(0.3, "genre")
    assert parsed("--explore", "0.1", "--seed", "7").explore == Exploration(0.1, 7)
    assert parsed("--only", "a", "b").only == ["a", "b"]
    assert not parsed().rerank


@pytest.mark.parametrize(
    "words, named",
    [
        (["--filter", "colour=red"], "--filter 'colour=red': unknown attribute 'colour'"),
        (["--filter", "genre"], "--filter is 'genre'"),
        (["--filter", "genre>3"], "genre is no number"),
        (["--filter", "year=new"], "year is a number, and 'new' is none"),
        (["--filter", "year>1,2"], "a bound is one number"),
        (["--filter", "kind=a", "--filter", "kind=b"], "names 'kind' twice"),
        (["--filter", "{kind}"], "is not JSON"),
        (["--boost", "kind=a"], "--boost is 'kind=a'"),
        (["--boost", "kind=a:2"], "--boost is 'kind=a:2'"),
        (["--boost", "kind=a:xx"], "'x' is none"),
        (["--boost", "kind=a:x0"], "boost: odds is 0.0"),
        (["--cap", "kind=0"], "--cap is 'kind=0'"),
        (["--cap", "kind=1", "--cap", "kind=2"], "--cap gives 'kind' 1 and 2 places"),
        (["--cap", "colour=1"], "caps: unknown attribute 'colour'"),
        (["--diversity", "much"], "--diversity is 'much'"),
        (["--diversity", "year=0.5"], "diversity: attribute is 'year'"),
        (["--explore", "2"], "explore: share is 2.0"),
        (["--seed", "2"], "--seed belongs to --explore"),
        (["--only", "a", "--only-file", "f"], "give --only or --only-file"),
    ],
)
def test_options_that_are_no_rules_are_refused_by_name(words, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        parsed(*words)


def test_the_command_prints_rules_and_notes(export_folder, capsys):
    asked = ["recommend", str(export_folder), "--users", "u3", "--k", "6"]
    assert cli.main([*asked, "--cap", "kind=1", "--boost", "kind=farm:+0.5"]) == 0
    captured = capsys.readouterr()
    assert "[boost kind=farm +0.5" in captured.out
    assert "4 of 6: " in captured.err and "(1 user)" in captured.err
    assert cli.main([*asked, "--exclude", "i1,nobody"]) == 2
    assert "--exclude: no item has the id 'nobody'" in capsys.readouterr().err
    assert cli.main([*asked, "--exclude", "i1,nobody", "--skip-unknown"]) == 0
    assert "unknown items of --exclude skipped: 1 ('nobody')" in capsys.readouterr().err


# ------------------------------------------------------------------ the documentation, over HTTP too


def blocks(kind):
    return re.findall(rf"```{kind}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


def examples():
    return list(zip(blocks("bash"), blocks("json"), strict=True))


@pytest.mark.parametrize(
    "command, body", examples(), ids=[" ".join(command.split()[4:])[:24] for command, _ in examples()]
)
def test_the_pages_commands_and_bodies_give_the_same_list(shared_folder, tmp_path, command, body):
    pytest.importorskip("fastapi", reason="extra 'serve'")
    pytest.importorskip("orjson", reason="extra 'serve'")
    import shlex

    from pydantic import TypeAdapter

    from recbole_llm.serving import answer_schemas, schemas
    from recbole_llm.serving.responses import recommendation_content, request_of

    words = shlex.split(command.replace("movies", str(shared_folder)))
    assert words[0] == "recbole-llm" and cli.main([*words[1:], "--output", str(tmp_path / "out.jsonl")]) == 0
    printed = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    recommender = Recommender(load_export(shared_folder))
    asked = TypeAdapter(schemas.RecommendBody).validate_python(json.loads(body))
    answer = recommendation_content(recommender.recommend(request_of(asked, {}, recommender.export.manifest)))
    answer_schemas.RecommendationOut(**answer, model="", overlay_seq=0)
    assert [(row["item"], row["score"]) for row in printed] == [(item["id"], item["score"]) for item in answer["items"]]
    plain = recommender.recommend(Request(user="u3"))
    assert [row["item"] for row in printed] != ids(plain), "the example shows nothing"


def test_the_pages_python(shared_folder):
    (code,) = blocks("python")
    names = {}
    exec(code.replace('"movies"', repr(str(shared_folder))), names)
    assert len(names["rows"]) == 5 and any(row.rules for row in names["rows"])


def test_no_request_is_too_expensive(client):
    ask = lambda **body: client.post("/v1/recommend", json={"user": "u3", **body})  # noqa: E731
    assert ask(k=100, diversity={"weight": 0.5}).status_code == 200
    refused = ask(k=200, diversity={"weight": 0.5})
    assert refused.status_code == 422 and "200 items chosen from 1000 candidates" in refused.json()["detail"]
    assert ask(boosts=[{"filter": {"kind": "a"}, "add": 1}] * 17).status_code == 422
    assert ask(diversity={"weight": 0.5, "candidates": 1001}).status_code == 422
    assert ask(boosts=[{"filter": {"kind": "a"}, "add": 1, "odds": 2}]).status_code == 422
    batch = [{"user": "u3", "k": 100, "diversity": {"weight": 0.5}}] * 11
    assert client.post("/v1/recommend/batch", json={"requests": batch[:10]}).status_code == 200
    refused = client.post("/v1/recommend/batch", json={"requests": batch})
    assert refused.status_code == 422 and "compares 550000 pairs" in refused.json()["detail"]


def test_costs_of_rules_are_counted(client):
    reader = client.service.reader
    cost = lambda **rules: reader.cost_of(Request(user="u3", rules=Rules(**rules)))  # noqa: E731
    plain = cost()
    assert cost(diversity=Diversity(0.5)) >= plain + 150  # ten places
    assert cost(diversity=Diversity(0.5, candidates=1000)) > cost(diversity=Diversity(0.5))
    assert cost(caps={"kind": 2}) > plain and cost(explore=Exploration(0.1)) > plain
    assert cost(only=[f"i{n}" for n in range(100)]) > plain
    wide = [Boost({"kind": [str(n) for n in range(1000)]}, add=1.0)]
    assert cost(boosts=wide) >= plain + 1000
    one, many = [Boost({"kind": "a"}, add=1)], [Boost({"kind": "a"}, add=1)] * 16
    assert cost(boosts=many) - plain > 1600 and cost(boosts=one) - plain < 400
    assert cost(boosts=[Boost({"kind": "a"}, odds=2)] * 16) - cost(boosts=many) == 16 * 60


@pytest.mark.parametrize("seed", [0, 7, 2**70])
def test_exploration_draws_uniform_numbers_by_seed_and_subject(seed):
    from hashlib import shake_256

    draws = Draws(seed, b"somebody")
    numbers = [draws.random() for _ in range(3000)]
    stream = shake_256(str(seed).encode() + b" somebody").digest(8 * 3000)
    words = [int.from_bytes(stream[at : at + 8], "little") for at in range(0, len(stream), 8)]
    assert numbers == [(word >> 11) / 2**53 for word in words]
    counts = np.bincount((np.array(numbers) * 10).astype(int), minlength=10)
    assert counts.min() > 240 and counts.max() < 360  # 300 +- 3.6 standard deviations
    assert numbers[0] != Draws(seed, b"another").random() != Draws(seed + 1, b"another").random()
