"""Search where direct rows add to a few items beside the product of vectors.

An item that no direct row of the history adds to is ranked by the product alone, which a search of vectors finds. The others are
few: at most the entries of as many rows as the history has items. They are kept out of that search, scored by themselves, and
merged with what it found. The answer is exact where the search of vectors is.
"""

from collections.abc import Sequence

import numpy as np

from recbole_llm.export.pooling import Query
from recbole_llm.retrieval.exact import ExactRetriever, Hits, Retriever, best
from recbole_llm.retrieval.item_catalog import Catalog


def search(
    retriever: Retriever | None,
    catalog: Catalog,
    queries: Sequence[Query],
    k: Sequence[int],
    exclude: Sequence[np.ndarray],
    allow: Sequence[np.ndarray | None],
) -> list[Hits]:
    """Find the best rows for each query as :meth:`recbole_llm.retrieval.exact.Retriever.search`, direct rows counted.

    Args:
        retriever: searches the vectors; ``None`` to score all of them.
        catalog: that is searched.
        queries: B of them.
        k: how many, per query.
        exclude: rows without a place, per query.
        allow: ``[N]`` bool per query, or ``None`` for all rows.
    """
    exact = ExactRetriever(catalog.segments())
    hidden = [
        np.concatenate([rows, query.touched]) if len(query.touched) else rows
        for rows, query in zip(exclude, queries, strict=True)
    ]
    found = (retriever or exact).search(np.stack([query.vector for query in queries]), k, hidden, allow)
    return [
        _merged(exact, query, hits, n, rows, mask) if len(query.touched) else hits
        for query, hits, n, rows, mask in zip(queries, found, k, exclude, allow, strict=True)
    ]


def _merged(
    exact: ExactRetriever, query: Query, hits: Hits, k: int, exclude: np.ndarray, allow: np.ndarray | None
) -> Hits:
    counts = ~np.isin(query.touched, exclude)
    if allow is not None:
        counts &= allow[query.touched]
    rows = query.touched[counts]
    scores = exact.score(query.vector, rows) + query.adds[counts]
    live = scores > -np.inf
    rows, scores = np.concatenate([hits.rows, rows[live]]), np.concatenate([hits.scores, scores[live]])
    order = best(rows, scores, k)
    return Hits(rows[order], scores[order])
