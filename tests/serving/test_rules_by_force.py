"""Random requests with rules, answered as brute force answers them, whatever stands behind the search."""

import math

import numpy as np
import pytest
from made_export import make_contents
from rules_by_force import Force, holds, logit_of, values_of

from recbole_llm.export.in_memory import export_in_memory
from recbole_llm.export.reader import ItemRecord
from recbole_llm.retrieval.candidates import CandidateRetriever
from recbole_llm.retrieval.exact import ExactRetriever
from recbole_llm.retrieval.item_catalog import MappedItem
from recbole_llm.retrieval.recommender import Recommender, Request
from recbole_llm.retrieval.rules import Boost, Diversity, Exploration, Rules
from recbole_llm.scoring.probability import ProbabilityMap

GENRES = ("crime", "farm", "love", "sea", "space", "war")


class Miserly(CandidateRetriever):
    """An index that proposes as many rows as it must and no more."""

    def candidates(self, query, wanted, hidden, mask):
        allow = np.ones(self.catalog.n_base, bool) if mask is None else mask
        allow = allow.copy()
        allow[hidden] = False
        base = ExactRetriever(self.catalog.segments()[:1])
        return base.search(query[None], [wanted], [np.zeros(0, np.int64)], [allow])[0].rows


def made_recommender(rng):
    """A catalogue with ties, items without attributes, deleted, changed, unlisted and added ones."""
    n = int(rng.integers(1, 160)) if rng.random() < 0.9 else 500  # more than the first search brings
    n_users = 6
    vector = rng.standard_normal((n, 10)).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32)
    twins = rng.random(n) < 0.2
    if twins.any():
        vector[twins], bias[twins] = vector[0], bias[0]
    content = rng.standard_normal((n, 5)).astype(np.float32)
    content /= np.linalg.norm(content, axis=1, keepdims=True)
    content[rng.random(n) < 0.1] = 0
    records = []
    for row in range(n):
        attributes = {}
        if rng.random() < 0.9:
            attributes["genre"] = rng.choice(GENRES, int(rng.integers(0, 4))).tolist()  # repeats too
        if rng.random() < 0.8:
            attributes["kind"] = str(rng.choice(("a", "b", "c", "d")))
        if rng.random() < 0.8:
            attributes["year"] = float(rng.integers(1980, 1990))
        records.append(ItemRecord(f"Title {row}", None, attributes))
    sizes = rng.integers(0, max(n // 3, 1), n_users)
    listed = rng.random(n) < 0.95
    knots = tuple(sorted(rng.normal(size=2).tolist()))
    contents = make_contents(
        n_items=n + 30,
        n_users=n_users,
        item_ids=[f"i{row}" for row in range(n)],
        vector=vector,
        source=rng.standard_normal((n, 10)).astype(np.float32),
        bias=bias,
        trained=np.ones(n, bool),
        records=records,
        listed=listed,
        content={"text": content},
        history_offsets=np.concatenate([[0], np.cumsum(sizes)]),
        history_items=np.concatenate([np.sort(rng.choice(n, size, replace=False)) for size in sizes]),
        history_weight=rng.uniform(0, 1, sizes.sum()).astype(np.float32),
        text_map=None,
        probability=ProbabilityMap(0.3, 0.1, 0.2, -1.0, tuple(rng.uniform(0.2, 2, 3).tolist()), knots),
        attributes={"genre": "tokens", "kind": "token", "year": "number"},
    )
    export = export_in_memory(contents)
    make = (lambda export, catalog: Miserly(catalog)) if rng.random() < 0.5 else None
    recommender = Recommender(export, make)
    for _ in range(int(rng.integers(0, 6))):
        put = int(rng.integers(0, n))
        record = ItemRecord("Changed", None, {"kind": str(rng.choice(("a", "e"))), "genre": ["sea"]})
        if rng.random() < 0.4:
            mapped = MappedItem(rng.standard_normal(10), rng.standard_normal(10), float(rng.normal()))
            recommender.catalog.put(f"i{len(recommender.catalog)}", record, mapped)
        elif rng.random() < 0.5:
            recommender.catalog.delete(f"i{put}")
        elif listed[put]:
            recommender.catalog.put(f"i{put}", record, None)
    return recommender


def made_condition(rng):
    kind = int(rng.integers(0, 5))
    if kind == 0:
        return {"genre": str(rng.choice(GENRES))}
    if kind == 1:
        return {"genre": rng.choice(GENRES, 3).tolist()}
    if kind == 2:
        return {"year": {"gte": 1982, "lt": int(rng.integers(1983, 1990))}}
    if kind == 3:
        return {"year": [1981, int(rng.integers(1980, 1990))]}
    return {"kind": ["a", "b"], "year": {"lte": 1988.5}}


def made_rules(rng, n, odds=True):
    some = lambda share: rng.random() < share  # noqa: E731
    names = lambda most: [f"i{row}" for row in rng.integers(0, n + 3, int(rng.integers(1, most)))]  # noqa: E731
    boosts = []
    for _ in range(int(rng.integers(0, 6)) if some(0.5) else 0):  # bits of a row are looked up for three of them
        if odds and some(0.4):
            boosts.append(Boost(made_condition(rng), odds=float(np.exp(rng.normal()))))
        else:
            boosts.append(Boost(made_condition(rng), add=float(rng.normal() * 2)))
    diversity = None
    if some(0.5):
        candidates = int(rng.integers(1, 40)) if some(0.7) else None
        weight = float(rng.choice([0, 0.2, 0.5, 0.9, 1]))
        diversity = Diversity(weight, [None, "genre", "kind"][int(rng.integers(0, 3))], candidates)
    return Rules(
        filter=made_condition(rng) if some(0.4) else {},
        exclude=names(max(n // 2, 2)) if some(0.3) else (),
        only=names(2 * n + 2) if some(0.2) else None,
        boosts=boosts,
        caps={name: int(rng.integers(1, 4)) for name in ("genre", "kind", "year") if some(0.3)},
        diversity=diversity,
        explore=Exploration(float(rng.choice([0.1, 0.3, 1])), int(rng.integers(0, 9))) if some(0.25) else None,
    )


def force_of(recommender, user):
    catalog, export = recommender.catalog, recommender.export
    prepared = recommender._prepare(Request(user=user))
    exact = ExactRetriever(catalog.segments())
    live = np.flatnonzero(catalog.live())
    scores = exact.score(prepared.query.vector, live)
    content = np.zeros((len(catalog), 5))
    content[: catalog.n_base] = export.content["text"]
    items = {
        row: (score, catalog.records[row].attributes, content[row].tolist())
        for row, score in zip(live.tolist(), scores.tolist(), strict=True)
    }
    history = list(zip(prepared.rows.tolist(), prepared.times.tolist(), strict=True))
    chance = (export.manifest.probability, math.log(max(len(history), 1)))
    return Force(items, history, [catalog.records[row].attributes for row, _ in history], chance)


def check(recommender, force, user, rules, k):
    """One answer against brute force; returns whether a rule was at work."""
    seen = {row for row, _ in force.history}
    answer = recommender.recommend(Request(user=user, k=k, rules=rules))
    got = [recommender.catalog.row_of[item.id] for item in answer.items]
    explored = [at for at, item in enumerate(answer.items) if has_rule(item, "exploration")]
    kept = [row for at, row in enumerate(got) if at not in explored]
    wanted_places = k - explored_places(rules, k, user)
    scores = force.check(rules, seen, wanted_places, k, kept)
    assert len(set(got)) == len(got)
    for at, item in enumerate(answer.items):
        row = got[at]
        assert row in scores, "the conditions leave it out"
        assert item.score == pytest.approx(scores[row], abs=1e-9)
        model = force.items[row][0]
        assert item.score == pytest.approx(model + sum(rule.contribution for rule in item.rules), abs=1e-9)
        assert item.probability == pytest.approx(1 / (1 + math.exp(-logit_of(force.chance, model))), abs=1e-12)
    for name, most in rules.caps.items():
        counts = {}
        for row in got:
            for value in values_of(force.items[row][1], name):
                counts[value] = counts.get(value, 0) + 1
        assert max(counts.values(), default=0) <= most
    if len(got) < k:
        assert answer.note.startswith(f"{len(got)} of {k}: ")
        assert not [row for row in scores if row not in got and force.fits(row, got, rules)], "there was more"
        assert ("caps" in answer.note) == (len(got) < len(scores))
    else:
        assert " of " not in answer.note
    return bool(rules.rerank and got)


def has_rule(item, name):
    return any(rule.rule == name for rule in item.rules)


def explored_places(rules, k, user):
    """How many places the seed gives away: told by the rule's definition, drawn anew."""
    if rules.explore is None:
        return 0
    from hashlib import shake_256

    word = int.from_bytes(shake_256(f"{rules.explore.seed} {user}".encode()).digest(8), "little")
    return int(rules.explore.share * k + (word >> 11) / 2**53)


def run(cases, seed):
    rng = np.random.default_rng(seed)
    at_work = done = 0
    while done < cases:
        recommender = made_recommender(rng)
        user = f"u{int(rng.integers(0, 6))}"
        force = force_of(recommender, user)
        for _ in range(20):
            rules = made_rules(rng, recommender.catalog.n_base)
            at_work += check(recommender, force, user, rules, int(rng.integers(1, 25)))
            done += 1
    assert at_work > cases / 2


def test_five_hundred_random_requests():
    run(500, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 11))
def test_ten_thousand_random_requests(seed):
    run(1000, seed)


def test_the_fallback_obeys_the_rules_too():
    rng = np.random.default_rng(3)
    for _ in range(20):
        recommender = made_recommender(rng)
        catalog = recommender.catalog
        counts = np.zeros(len(catalog))
        np.add.at(counts, recommender.export.history_items, 1)
        items = {
            row: (counts[row], catalog.records[row].attributes, catalog.content(np.array([row]))[0].tolist())
            for row in np.flatnonzero(catalog.live()).tolist()
        }
        force = Force(items, [], [], None)
        for _ in range(5):
            rules = made_rules(rng, catalog.n_base, odds=False)
            if rules.explore is not None:
                continue
            answer = recommender.recommend(Request(user="stranger", fallback="popular", k=8, rules=rules))
            force.check(rules, set(), 8, 8, [catalog.row_of[item.id] for item in answer.items])
            assert answer.source == "popular"


def test_brute_force_reads_conditions_as_the_filters_do():
    rng = np.random.default_rng(5)
    recommender = made_recommender(rng)
    for _ in range(50):
        condition = made_condition(rng)
        mask = recommender.catalog.mask(condition)
        told = [holds(record.attributes, condition) for record in recommender.catalog.records]
        assert mask.tolist() == told
