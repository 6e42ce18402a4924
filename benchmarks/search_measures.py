"""What ``benchmarks/search.py`` counts: how items that are meant are found, and what is bought together."""

from collections.abc import Callable, Sequence

import numpy as np
from search_data import Bought, Known, SearchSet

FIRST = 10
DISCOUNTS = 1 / np.log2(np.arange(FIRST) + 2)

Ranking = Callable[[int], Sequence[int]]
"""Position of a query -> rows, best first."""


def found(known: Known, titles: Sequence[str], ranking: Ranking) -> dict[str, float]:
    """Shares of queries whose item is among the first ten, and is the first.

    Items of one title count as one item: which of them comes first says nothing about the search.
    """
    places = []
    for at, item in enumerate(known.items):
        distinct = list(dict.fromkeys(titles[row] or f"row {row}" for row in ranking(at)))
        places.append(distinct.index(titles[item]) if titles[item] in distinct else FIRST)
    ranks = np.array(places)
    return {"first_ten": float((ranks < FIRST).mean()), "first": float((ranks == 0).mean())}


def in_category(names: Sequence[str], tags: Sequence[frozenset[str]], tops: Sequence[Sequence[int]]) -> float:
    """Share of the first ten (or of as many as the category has) that are of the category asked for."""
    shares = []
    for name, top in zip(names, tops, strict=True):
        members = sum(name in own for own in tags)
        shares.append(sum(name in tags[row] for row in top[:FIRST]) / min(FIRST, members))
    return float(np.mean(shares))


def shared(tops: Sequence[Sequence[int]]) -> float:
    """Items among the first ten that two different queries share, on average."""
    pairs = [len(set(a) & set(b)) for n, a in enumerate(tops) for b in tops[:n]]
    return float(np.mean(pairs)) if pairs else 0.0


def ndcg(asked: Sequence[Bought], data: SearchSet, ranking: Ranking) -> np.ndarray:
    """NDCG@10 of each user, over that user's questions; rankings hold no masked item."""
    values, users = [], []
    for at, question in enumerate(asked):
        relevant = set(question.relevant)
        gains = sum(float(DISCOUNTS[place]) for place, row in enumerate(ranking(at)[:FIRST]) if row in relevant)
        values.append(gains / float(DISCOUNTS[: min(FIRST, len(relevant))].sum()))
        users.append(question.user)
    counts = np.bincount(users, minlength=data.n_users)
    sums: np.ndarray = np.bincount(users, values, minlength=data.n_users)
    return sums[counts > 0] / counts[counts > 0]


def interval(values: np.ndarray) -> float:
    """Half of a 95% interval of the mean."""
    return float(1.96 * values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def same_tag(queries: Sequence[int], tags: Sequence[frozenset[str]], tops: Sequence[Sequence[int]]) -> float:
    """Share of the first ten with a tag of the query item, over items that have one."""
    kept = [(tags[query], top) for query, top in zip(queries, tops, strict=True) if tags[query]]
    return float(np.mean([np.mean([bool(own & tags[row]) for row in top[:FIRST]]) for own, top in kept]))
