"""Search through an index that may be approximate, with an exact second step.

The index proposes rows; what was added since the export is scored whole; what must not appear is never proposed; proposals
are scored again in float64. Where an index proposes too few (narrow filters, large k, many exclusions), or cannot be
reached, everything is scored: answers are never short and never wrong, only slower.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from recbole_llm.export.pooling import Pooling
from recbole_llm.export.reader import Export
from recbole_llm.retrieval.exact import GATHER_SHARE, MARGIN, ExactRetriever, Hits, Segment, best
from recbole_llm.retrieval.item_catalog import Catalog

RECALL = 0.99
RECALL_AT = 10
SAMPLED_QUERIES = 256


class CandidateRetriever(ABC):
    """Searches the export's rows through an index and what was added since exactly.

    Args:
        catalog: read at every search.
    """

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._dead: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))  # with the catalogue's version

    @abstractmethod
    def candidates(self, query: np.ndarray, wanted: int, hidden: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Propose rows for one query.

        Args:
            query: ``[D]`` float32.
            wanted: how many at least, where there are as many.
            hidden: rows of the export that must not be proposed, ``[n]`` int64.
            mask: rows of the export that may be, ``[n_base]`` bool without the hidden ones; ``None`` for all others.

        Returns:
            Rows ``[n]`` int64, in any order.
        """

    def search(
        self,
        query: np.ndarray,
        k: Sequence[int],
        exclude: Sequence[np.ndarray],
        allow: Sequence[np.ndarray | None],
    ) -> list[Hits]:
        """Find the best rows as :meth:`ExactRetriever.search` does, as good as the index over the export's rows."""
        segments = self.catalog.segments()
        exact = ExactRetriever(segments)
        added = ExactRetriever(segments[1:])
        if self._dead[0] != self.catalog.version:
            self._dead = (self.catalog.version, np.flatnonzero(segments[0].bias == -np.inf))
        return [self._one(query[b], k[b], exclude[b], allow[b], exact, added) for b in range(len(k))]

    def _one(
        self,
        query: np.ndarray,
        k: int,
        exclude: np.ndarray,
        allow: np.ndarray | None,
        exact: ExactRetriever,
        added: ExactRetriever,
    ) -> Hits:
        n_base = self.catalog.n_base
        if allow is not None and int(allow[:n_base].sum()) < GATHER_SHARE * n_base:
            return exact.search(query[None], [k], [exclude], [allow])[0]
        hidden = np.unique(np.concatenate([exclude[exclude < n_base], self._dead[1]]))
        mask, allowed = None, n_base - len(hidden)
        if allow is not None:
            mask = allow[:n_base].copy()
            mask[hidden] = False
            allowed = int(mask.sum())
        rows = self.candidates(query, min(k + MARGIN, allowed), hidden, mask) if allowed else np.zeros(0, np.int64)
        if len(rows) < min(k, allowed):
            return exact.search(query[None], [k], [exclude], [allow])[0]
        if added.segments:
            rows = np.concatenate([rows, added.search(query[None], [k], [exclude], [allow])[0].rows])
        final = exact.score(query, rows)
        order = best(rows, final, k)
        return Hits(rows[order], final[order])


def with_bias(vector: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Append the bias as a column, ``[n, D + 1]`` float32.

    With a query whose last column is 1 the inner product is the score.
    """
    return np.ascontiguousarray(np.concatenate([vector, bias[:, None]], 1), dtype=np.float32)


def wide_query(query: np.ndarray) -> np.ndarray:
    """Append a 1 to a query, ``[D + 1]`` float32, for :func:`with_bias`."""
    return np.append(query, np.float32(1)).astype(np.float32)


def sample_queries(
    pooling: Pooling,
    source: np.ndarray,
    offsets: np.ndarray,
    items: np.ndarray,
    weight: np.ndarray,
    rank: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Make queries of up to ``SAMPLED_QUERIES`` users with a history, ``[Q, D]`` float32.

    Without such users each query has one item as its history.
    """
    users = np.flatnonzero(np.diff(offsets))
    draw = np.random.default_rng(seed)
    if not len(users):
        rows = draw.permutation(len(source))[:SAMPLED_QUERIES]
        return np.stack([pooling.query(source[[row]], np.ones(1, np.float32)).vector for row in rows])
    chosen = draw.permutation(users)[:SAMPLED_QUERIES]
    spans = [slice(int(offsets[user]), int(offsets[user + 1])) for user in chosen]
    ranks = [None if rank is None else rank[span] for span in spans]
    queries = [pooling.query(source[items[s]], weight[s], None, r) for s, r in zip(spans, ranks, strict=True)]
    return np.stack([query.vector for query in queries])


def queries_of(export: Export) -> np.ndarray:
    """Call :func:`sample_queries` for an export's users."""
    pooling = Pooling.of(export)
    return sample_queries(
        pooling, export.source, export.history_offsets, export.history_items, export.history_weight, export.history_rank
    )


def best_rows(vector: np.ndarray, bias: np.ndarray, queries: np.ndarray) -> list[np.ndarray]:
    """Find the true ``RECALL_AT`` best rows of every query."""
    Q, none = len(queries), np.zeros(0, np.int64)
    k = min(RECALL_AT, len(vector))
    hits = ExactRetriever([Segment(0, vector, bias)]).search(queries, [k] * Q, [none] * Q, [None] * Q)
    return [hit.rows for hit in hits]


def smallest_with_recall(
    settings: Iterable[int], found: Callable[[int], Sequence[np.ndarray]], truth: Sequence[np.ndarray]
) -> tuple[int, float]:
    """Find the first setting whose recall@10 is at least ``RECALL``, else the last, and its recall.

    Args:
        settings: ascending in effort, at least one.
        found: rows that a setting finds for every query.
        truth: the true ones.
    """
    setting, recall = 0, 0.0
    for setting in settings:
        shares = [len(np.intersect1d(a, b)) / max(len(a), 1) for a, b in zip(truth, found(setting), strict=True)]
        recall = float(np.mean(shares))
        if recall >= RECALL:
            break
    return setting, recall


def doublings(first: int, last: int) -> Iterable[int]:
    """Yield first, 2 first, 4 first, ... and last.

    Example:
        >>> list(doublings(4, 20))
        [4, 8, 16, 20]
    """
    value = first
    while value < last:
        yield value
        value *= 2
    yield last
