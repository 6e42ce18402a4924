"""Baselines of the canonical table against the formulas of their papers, in plain loops and float64."""

import itertools
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_llm.bridge.experiments.baselines import BASELINES, RefusedRowError, linear, solved
from recbole_llm.bridge.experiments.baselines.graph import (
    LISTED,
    TghSetting,
    fill,
    followed,
    graph_heuristic,
    ordered_rings,
    scorer_of,
)
from recbole_llm.bridge.experiments.baselines.linear import TaleSetting, l3ae, solve_tale, tale, tale_weights
from recbole_llm.bridge.experiments.baselines.neighbours import item_knn, item_knn_by_recency
from recbole_llm.bridge.experiments.leave_one_out import LeaveOneOut
from recbole_llm.fitting import next_item
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.next_item import gram_of_prefixes, prefixes_of
from recbole_llm.fitting.validation import Validation
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.rows import rows_from_pairs

USERS, ITEMS = 50, 24  # item ITEMS has content and no training interaction, item 3 has no content
N = ITEMS + 1


@dataclass
class World:
    rows: LeaveOneOut
    walks: list  # each user's training items, oldest first
    times: list  # when
    later: list  # the same with the validation item
    content: np.ndarray


def histories(walks, times):
    user = torch.tensor([u for u, walk in enumerate(walks) for _ in walk], dtype=torch.int64)
    item = torch.tensor([i for walk in walks for i in walk], dtype=torch.int64)
    time = torch.tensor([t for walk in times for t in walk], dtype=torch.float64)
    return rows_from_pairs(user, item, len(walks), time), time


@pytest.fixture(scope="module")
def world():
    """Walks with leaps in time; one user has no history, one a single item."""
    rng = random.Random(3)
    walks, times = [], []
    for user in range(USERS):
        size = {0: 0, 1: 1}.get(user, rng.randint(2, 9))
        at, now, walk, when = rng.randrange(ITEMS - 1), float(rng.randint(0, 40)), [], []
        while len(walk) < size:
            item = at + 1
            if item not in walk:
                walk.append(item)
                when.append(now)
            at = (at + rng.choice([1, 1, 1, 2, 7])) % (ITEMS - 1)
            now += rng.choice([0, 1, 2, 11])
        walks.append(walk)
        times.append(when)
    last = [rng.choice([i for i in range(1, ITEMS + 1) if i not in walk]) for walk in walks]
    later = [[*walk, item] for walk, item in zip(walks, last, strict=True)]
    train, _ = histories(walks, times)
    after, _ = histories(later, [[*when, 999.0] for when in times])
    # entries are in the order of items within a user; so are their times
    own = torch.tensor(
        [t for walk, when in zip(walks, times, strict=True) for _, t in sorted(zip(walk, when, strict=True))]
    )
    targets = rows_from_pairs(torch.arange(USERS), torch.tensor(last), USERS)
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(N, 5, generator=generator)
    present = torch.ones(N, dtype=torch.bool)
    present[[0, 3]] = False
    data = TrainingData(train, AllRows(N), {"text": (vectors, present)})
    content = vectors.double().numpy() / np.linalg.norm(vectors.double().numpy(), axis=1, keepdims=True)
    content[[0, 3]] = 0.0
    rows = LeaveOneOut(data, own.double(), Validation(train, targets, train), after, targets)
    return World(rows, walks, times, later, content)


def scores_at_test(found):
    return found.scorer(torch.arange(USERS)).double().numpy()


def ndcg(scores, histories, targets):
    """NDCG@10 of validation by counting, items of the history struck."""
    total = 0.0
    for row, history, target in zip(scores, histories, targets, strict=True):
        row = row.copy()
        row[[0, *history]] = -np.inf
        place = int((row > row[target]).sum())
        total += 1 / math.log2(place + 2) if place < 10 else 0.0
    return total / len(histories)


def numbers(setting):
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", setting)]


# ---------------------------------------------------------------- neighbours


def cosine_by_hand(walks, k, shrink):
    X = np.zeros((USERS, N))
    for user, walk in enumerate(walks):
        for item in walk:
            X[user, item] = 1.0
    W = np.zeros((N, N))
    for j in range(1, N):
        similar = []
        for i in range(1, N):
            if i != j:
                product = sum(X[u, i] * X[u, j] for u in range(USERS))
                norm = math.sqrt(X[:, i].sum()) * math.sqrt(X[:, j].sum())
                similar.append((product / (norm + shrink + 1e-6), i))
        for value, i in sorted(similar, reverse=True)[:k]:
            W[i, j] = value
    return W


@pytest.mark.parametrize("recent", [False, True])
def test_item_neighbours_are_those_of_plain_loops(world, recent, monkeypatch):
    monkeypatch.setattr("recbole_llm.bridge.experiments.baselines.neighbours.NEIGHBOURS", (ITEMS - 1, 30))
    found = (item_knn_by_recency if recent else item_knn)(world.rows)
    k, shrink, *decay = numbers(found.setting)
    assert len(decay) == recent and k in (ITEMS - 1, 30)
    W = cosine_by_hand(world.walks, int(k), shrink)
    weight = (lambda rank: math.exp(-rank / decay[0])) if recent else (lambda rank: 1.0)

    def by_hand(walks):
        return np.array([sum((weight(r) * W[i] for r, i in enumerate(reversed(walk))), np.zeros(N)) for walk in walks])

    np.testing.assert_allclose(scores_at_test(found), by_hand(world.later), atol=1e-5)


def test_of_each_item_the_nearest_neighbours_are_kept(world, monkeypatch):
    """Equal similarities may be kept in any order, so the sums of what is kept are compared."""
    monkeypatch.setattr("recbole_llm.bridge.experiments.baselines.neighbours.NEIGHBOURS", (4,))
    monkeypatch.setattr("recbole_llm.bridge.experiments.baselines.neighbours.SHRINKS", (10.0,))
    found = item_knn(replace(world.rows, later=histories([list(range(1, N))], [list(range(ITEMS))])[0]))
    W = cosine_by_hand(world.walks, 4, 10.0)
    np.testing.assert_allclose(found.scorer(torch.tensor([0])).numpy()[0], W.sum(0), atol=1e-6)


def test_recency_reads_the_newest_items_most(world):
    found = item_knn_by_recency(world.rows)
    plain = item_knn(world.rows)
    assert found.setting != plain.setting and not np.allclose(scores_at_test(found), scores_at_test(plain))


# ---------------------------------------------------------------- TALE


def tale_by_hand(world, tau, floor, ridge, beta, window, decay):
    """B and the scores at test, from one row of S and T for every item but the first of a history."""
    seen = [
        (i, t) for walk, when in zip(world.walks, world.times, strict=True) for i, t in zip(walk, when, strict=True)
    ]

    def trend(item, time):
        return sum(1 for i, t in seen if i == item and time - window <= t <= time) ** beta if beta else 1.0

    S, T = [], []
    for walk, when in zip(world.walks, world.times, strict=True):
        for k in range(1, len(walk)):
            s, t = np.zeros(N), np.zeros(N)
            for j in range(k):
                s[walk[j]] = max(math.exp(-abs(when[k] - when[j]) / tau), floor) * trend(walk[j], when[j])
            t[walk[k]] = trend(walk[k], when[k])
            S.append(s)
            T.append(t)
    S, T = np.array(S), np.array(T)
    diagonal = np.diag(S.T @ S)
    B = np.linalg.solve(S.T @ S + ridge * diagonal[diagonal > 0].mean() * np.eye(N), S.T @ T)
    return np.array(
        [sum((math.exp(-r / decay) * B[i] for r, i in enumerate(reversed(walk))), np.zeros(N)) for walk in world.later]
    ), B


@pytest.mark.parametrize(("beta", "window"), [(0.0, 0.0), (-0.5, 6.0), (-0.25, 1000.0)])
def test_tale_is_its_formula_with_and_without_the_trend(world, beta, window):
    setting = TaleSetting(3.0, 0.2, 2.0, beta, window)
    history = world.rows.data.history
    prefixes = prefixes_of(history, 40)
    weights = tale_weights(prefixes, history.ids.numpy(), world.rows.times.numpy(), setting)
    B = solve_tale(*gram_of_prefixes(history, N, prefixes, *weights), setting.ridge)
    expected = tale_by_hand(world, 3.0, 0.2, 2.0, beta, window, 1.0)[1]
    np.testing.assert_allclose(B.numpy(), expected, atol=2e-6)
    if beta:
        assert not np.allclose(expected, tale_by_hand(world, 3.0, 0.2, 2.0, 0.0, 0.0, 1.0)[1], atol=1e-3)


def test_the_row_of_tale_is_its_formula_at_what_validation_chose(world):
    found = tale(world.rows)
    tau, floor, ridge, *trend, decay = numbers(found.setting)
    beta, window = trend or (0.0, 0.0)
    expected = tale_by_hand(world, tau, floor, ridge, beta, window, decay)[0]
    np.testing.assert_allclose(scores_at_test(found), expected, atol=1e-4)


def test_steps_that_a_row_does_not_read_are_said_and_the_graph_reads_all(world, monkeypatch):
    steps = sum(max(len(walk) - 1, 0) for walk in world.walks)
    before = followed(world.rows.data.history, N)
    assert before.sum() == steps and "steps" not in tale(world.rows).setting
    for module in (solved, next_item):
        monkeypatch.setattr(module, "MAX_STEPS", 40)
    monkeypatch.setattr(prefixes_of, "__defaults__", (40,))
    for name in ("Transitions", "TALE"):
        assert BASELINES[name](world.rows).setting.endswith(f", 40 of {steps} steps to a next item read")
    assert (followed(world.rows.data.history, N) != before).nnz == 0


def test_the_windows_of_the_trend_count_an_item_apart_from_others():
    ids, times = np.array([5, 2, 5, 2, 5]), np.array([10.0, 10.0, 13.0, 14.0, 13.0])
    assert linear.trend_counts(ids, times, 3.0).tolist() == [1, 1, 3, 1, 3]
    assert linear.trend_counts(ids, times, 0.0).tolist() == [1, 1, 2, 1, 2]
    assert linear.trend_counts(np.zeros(0, int), np.zeros(0), 1.0).tolist() == []


# ---------------------------------------------------------------- L3AE


def l3ae_by_hand(world, ridge, share, content_ridge):
    """Each column of C and B as a least squares problem without its own row."""
    X = np.zeros((USERS, N))
    for user, walk in enumerate(world.walks):
        X[user, walk] = 1.0
    G, K = X.T @ X, world.content @ world.content.T
    mean = np.diag(G)[np.diag(G) > 0].mean()
    pull, own = share * ridge * mean, (1 - share) * ridge * mean
    C, B = np.zeros((N, N)), np.zeros((N, N))
    for i in range(1, N):
        others = [j for j in range(1, N) if j != i]
        at = np.ix_(others, others)
        C[others, i] = np.linalg.solve(K[at] + content_ridge * np.eye(N - 2), K[others, i])
    for i in range(1, N):
        others = [j for j in range(1, N) if j != i]
        at = np.ix_(others, others)
        B[others, i] = np.linalg.solve(G[at] + (own + pull) * np.eye(N - 2), G[others, i] + pull * C[others, i])
    return B


@pytest.mark.parametrize("shares", [(0.5, 0.8, 0.2), (0.9,)])
def test_l3ae_is_the_constrained_least_squares_problem_of_its_paper(world, shares, monkeypatch):
    monkeypatch.setattr(linear, "L3AE_SHARES", shares)
    found = l3ae(world.rows)
    ridge, share, content_ridge = numbers(found.setting)
    B = l3ae_by_hand(world, ridge, share / 100, content_ridge)
    expected = np.array([B[walk].sum(0) for walk in world.later])
    np.testing.assert_allclose(scores_at_test(found), expected, atol=2e-6)
    assert np.abs(expected[:, ITEMS]).max() > 1e-3  # an item that nobody has met is scored by its content
    targets = [later[-1] for later in world.later]
    on_validation = np.array([B[walk].sum(0) if walk else np.zeros(N) for walk in world.walks])
    some = [user for user, walk in enumerate(world.walks) if walk]  # of an empty history all scores are equal
    value = ndcg(on_validation[some], [world.walks[u] for u in some], [targets[u] for u in some])
    assert found.valid * USERS == pytest.approx(value * len(some), abs=2 / math.log2(3))


def test_l3ae_and_the_graph_need_content(world):
    without = replace(world.rows, data=TrainingData(world.rows.data.history, AllRows(N)))
    for name in ("L3AE", "TGH"):
        with pytest.raises(RefusedRowError, match=f"{name} reads the items' content, and the data set has none"):
            BASELINES[name](without)


# ---------------------------------------------------------------- the graph


def tgh_by_hand(world, walk, alpha, newest, before):
    """The list of one user: breadth-first rings, ordered and filled as in the paper's program."""
    count = {}
    for other in world.walks:
        for a, b in itertools.pairwise(other):
            count[a, b] = count.get((a, b), 0) + 1

    def ring_lists(source, without):
        met, edge, found = {source}, [source], []
        for hop in range(3):
            reached = sorted({b for a, b in count if a in edge and b not in met})
            most = max((math.log1p(n) for (a, _), n in count.items() if a == source), default=1.0)

            def score(item, hop=hop, most=most):
                bonus = alpha * math.log1p(count[source, item]) / most if hop == 0 else 0.0
                return world.content[source] @ world.content[item] + bonus

            found.append([i for i in sorted(reached, key=score, reverse=True)[:LISTED] if i not in without])
            met |= set(reached)
            edge = reached
        return found

    listed = []
    for source, budgets in ((walk[-1], newest), (walk[-2] if len(walk) > 1 else None, before)):
        if source is None or not budgets:
            continue
        taken, left = [], []
        for ring, budget in zip(ring_lists(source, set(listed)), budgets, strict=False):
            lent = left[: max(0, budget - len(ring))]
            left = left[len(lent) :]
            taken += lent + ring[: budget - len(lent)]
            left += ring[budget - len(lent) :]
        own = (taken + left)[: sum(budgets)]
        others = [i for i in range(1, N) if i != source]
        likest = sorted(others, key=lambda i: world.content[source] @ world.content[i], reverse=True)
        own += [i for i in likest if i not in own and i not in listed][: sum(budgets) - len(own)]
        listed += own
    return listed


@pytest.mark.parametrize(
    ("alpha", "newest", "before"),
    [(0.5, (7, 2, 1), ()), (2.0, (2, 3, 1), ()), (0.0, (3, 1), (2, 1)), (0.5, (10,), ()), (0.5, (1,), (2,))],
)
def test_the_lists_of_the_graph_heuristic_are_those_of_plain_loops(world, alpha, newest, before):
    made = world.content.copy()
    made[3] = np.full(5, 5**-0.5)  # without content all likenesses would be equal, in any order
    world = replace(world, content=made)
    content = torch.from_numpy(made).float()
    ordered = ordered_rings(followed(world.rows.data.history, N), content, (alpha,))
    score = scorer_of(world.rows.later, ordered, TghSetting(alpha, newest, before))(torch.arange(USERS))
    for row, walk in zip(score, world.later, strict=True):
        expected = tgh_by_hand(world, walk, alpha, newest, before)
        assert row.argsort(descending=True)[: len(expected)].tolist() == expected


def test_a_small_ring_takes_what_the_rings_before_have_left():
    assert fill([[1, 2, 3, 4], [5], [6, 7]], (2, 3, 1)) == ([1, 2, 3, 4, 5, 6], [7])
    assert fill([[1], [], [2, 3, 4]], (3, 1, 1)) == ([1, 2], [3, 4])
    assert fill([[], [], []], (2, 1)) == ([], [])


def test_the_row_of_the_graph_is_the_best_of_its_choices_on_validation(world):
    found = graph_heuristic(world.rows)
    assert re.fullmatch(r"TGH-[12], \S+( and \S+)? of the rings, alpha \S+", found.setting)
    value = world.rows.validation.value
    content = torch.from_numpy(world.content).float()
    ordered = ordered_rings(followed(world.rows.data.history, N), content, (0.5,))
    paper = scorer_of(world.rows.data.history, ordered, TghSetting(0.5, (7, 2, 1)))
    assert found.valid >= value(paper, N, world.rows.padding)


# ---------------------------------------------------------------- limits


def test_rows_of_too_many_items_are_refused_by_name(world, monkeypatch):
    monkeypatch.setattr(solved, "MAX_ITEMS", 10)
    assert BASELINES["Popularity"](world.rows).setting == ""
    for name in set(BASELINES) - {"Popularity"}:
        why = "compares every item with every other" if name == "TGH" else "holds an item-item matrix"
        with pytest.raises(RefusedRowError, match=rf"{why}, and {N} items are more than 10"):
            BASELINES[name](world.rows)


def test_a_search_stops_where_the_value_falls():
    tried = []

    def value(x):
        tried.append(x)
        return {1: 0.1, 2: 0.3, 3: 0.3, 4: 0.9}[x]

    assert solved.keep_rising([1, 2, 3, 4], value) == 2 and tried == [1, 2, 3]


def test_the_row_that_the_documentation_adds_is_one(world):
    page = (Path(__file__).resolve().parents[2] / "docs" / "table.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)
    made = {}
    exec(compile(snippet, "docs/table.md", "exec"), made)
    found = made["newest_first"](world.rows)
    newest = {}
    for walk, when in zip(world.walks, world.times, strict=True):
        for item, time in zip(walk, when, strict=True):
            newest[item] = max(time, newest.get(item, 0.0))
    assert scores_at_test(found)[5].tolist() == [newest.get(item, 0.0) for item in range(N)]
    assert 0 <= found.valid <= 1
