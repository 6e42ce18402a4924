"""Search where direct rows add to a few items beside the product of vectors.

An item that no direct row of the history adds to is ranked by the product alone, which a search of vectors finds. The others are
few: at most the entries of as many rows as the history has items. They are kept out of that search, scored by themselves, and
merged with what it found. The answer is exact where the search of vectors is.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np

from recbole_llm.export.pooling import Query
from recbole_llm.retrieval.exact import ExactRetriever, Hits, Lift, Retriever, best
from recbole_llm.retrieval.item_catalog import Catalog


def search(
    retriever: Retriever | None,
    catalog: Catalog,
    queries: Sequence[Query],
    k: Sequence[int],
    exclude: Sequence[np.ndarray],
    allow: Sequence[np.ndarray | None],
    lifts: Sequence[Lift | None],
) -> list[Hits]:
    """Find the best rows for each query as :meth:`recbole_llm.retrieval.exact.Retriever.search`, direct rows counted.

    Args:
        retriever: searches the vectors; ``None`` to score all of them.
        catalog: that is searched.
        queries: B of them.
        k: how many, per query.
        exclude: rows without a place, per query.
        allow: ``[N]`` bool per query, or ``None`` for all rows.
        lifts: as of :meth:`recbole_llm.retrieval.exact.ExactRetriever.search`; ``None`` for each where there is a ``retriever``.
    """
    exact = ExactRetriever(catalog.segments())
    hidden = [
        np.concatenate([rows, query.touched]) if len(query.touched) else rows
        for rows, query in zip(exclude, queries, strict=True)
    ]
    vectors = queries[0].vector[None] if len(queries) == 1 else np.stack([query.vector for query in queries])
    found = (retriever.search if retriever else partial(exact.search, lifts=lifts))(vectors, k, hidden, allow)
    return [
        _merged(exact, query, hits, n, rows, mask, lift) if len(query.touched) else hits
        for query, hits, n, rows, mask, lift in zip(queries, found, k, exclude, allow, lifts, strict=True)
    ]


def scores(catalog: Catalog, query: Query, rows: np.ndarray) -> np.ndarray:
    """Compute the scores of rows, ``[n]`` float64, as a search does."""
    found = ExactRetriever(catalog.segments()).score(query.vector, rows)
    if len(query.touched):
        at = np.searchsorted(query.touched, rows).clip(max=len(query.touched) - 1)
        found += np.where(query.touched[at] == rows, query.adds[at], 0.0)
    return found


def _merged(
    exact: ExactRetriever,
    query: Query,
    hits: Hits,
    k: int,
    exclude: np.ndarray,
    allow: np.ndarray | None,
    lift: Lift | None,
) -> Hits:
    counts = ~np.isin(query.touched, exclude)
    if allow is not None:
        counts &= allow[query.touched]
    rows = query.touched[counts]
    scores = exact.score(query.vector, rows) + query.adds[counts]
    live = scores > -np.inf
    rows, scores = np.concatenate([hits.rows, rows[live]]), np.concatenate([hits.scores, scores[live]])
    order = best(rows, scores if lift is None else lift.adjusted(rows, scores), k)
    return Hits(rows[order], scores[order])
