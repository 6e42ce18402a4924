"""Retrieval in Qdrant, one collection per export: inner product of [vector, bias] and [query, 1], points numbered by row."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.retrieval.candidates import (
    RECALL,
    RECALL_AT,
    best_rows,
    doublings,
    queries_of,
    smallest_with_recall,
    wide_query,
    with_bias,
)
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.remote import EXACT_UP_TO, RemoteRetriever, SearchError

POINTS_AT_ONCE = 512
SECONDS = 5
EF = (64, 1024)

log = getLogger(__name__)


class QdrantRetriever(RemoteRetriever):
    """Searches the export's rows in Qdrant; copies them there if no replica did so before.

    Qdrant's graph is used only where it finds at least 0.99 of what is best for sampled users; else every point is scored.

    Args:
        export: the model.
        catalog: of the same export.
        address: ``http://host:6333``, or a ``qdrant_client.QdrantClient``.
        api_key: of the server.
        exact_up_to: rows up to which every point is scored.

    Raises:
        SearchError: if the server cannot be reached, or refuses.
        ValueError: if qdrant-client is not installed.
    """

    def __init__(
        self,
        export: Export,
        catalog: Catalog,
        address: Any,
        *,
        api_key: str | None = None,
        exact_up_to: int = EXACT_UP_TO,
    ) -> None:
        super().__init__(export, catalog)
        try:
            from qdrant_client import QdrantClient, models
        except ModuleNotFoundError as error:
            raise ValueError(
                "Search in Qdrant needs its client: pip install -e '.[qdrant]' in the checkout."
            ) from error
        self._models = models
        with self._errors():
            self._client: Any = (
                QdrantClient(url=address, api_key=api_key, timeout=SECONDS) if isinstance(address, str) else address
            )
            self.collection = f"recbole_llm_{export.manifest.export_id}"
            if not self._is_complete():
                self._fill(export)
            self.ef = self._choose_ef(export) if self.n_listed > exact_up_to else None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ValueError:
            raise
        except Exception as error:  # of the transport below the client: there is no common base
            raise SearchError(f"Qdrant: {type(error).__name__}.") from error

    def _is_complete(self) -> bool:
        if not self._client.collection_exists(self.collection):
            return False
        return bool(self._client.count(self.collection, exact=True).count == self.n_listed)

    def _fill(self, export: Export) -> None:
        models, client = self._models, self._client
        if not client.collection_exists(self.collection):
            size = export.manifest.dim + 1
            client.create_collection(
                self.collection, vectors_config=models.VectorParams(size=size, distance=models.Distance.DOT)
            )
        rows = np.flatnonzero(export.listed)
        for start in range(0, len(rows), POINTS_AT_ONCE):  # the same points, should two replicas do it at once
            part = rows[start : start + POINTS_AT_ONCE]
            vectors = with_bias(export.vector[part], export.bias[part])
            batch = models.Batch(ids=part.tolist(), vectors=vectors.tolist())
            client.upsert(self.collection, points=batch, wait=True)
        log.info("Copied %d vectors to Qdrant's collection %s", len(rows), self.collection)

    def _choose_ef(self, export: Export) -> int | None:
        queries = queries_of(export)
        bias = np.where(export.listed, export.bias, np.float32(-np.inf))

        def found(ef: int) -> list[np.ndarray]:
            self.ef = ef
            return [self._ranked(query, RECALL_AT, np.zeros(0, np.int64)) for query in queries]

        ef, recall = smallest_with_recall(doublings(*EF), found, best_rows(export.vector, bias, queries))
        log.info("Qdrant: recall@10 %.4f with hnsw_ef %d%s", recall, ef, "" if recall >= RECALL else "; all are scored")
        return ef if recall >= RECALL else None

    def ranked(self, query: np.ndarray, n: int, hidden: np.ndarray) -> np.ndarray:
        """Rank as :meth:`RemoteRetriever.ranked` says."""
        with self._errors():
            return self._ranked(query, n, hidden)

    def _ranked(self, query: np.ndarray, n: int, hidden: np.ndarray) -> np.ndarray:
        models = self._models
        condition = models.Filter(must_not=[models.HasIdCondition(has_id=hidden.tolist())]) if len(hidden) else None
        points = self._client.query_points(
            self.collection,
            query=wide_query(query).tolist(),
            query_filter=condition,
            search_params=models.SearchParams(hnsw_ef=self.ef, exact=self.ef is None),
            limit=n,
            with_payload=False,
        ).points
        return np.array([point.id for point in points], np.int64)

    def close(self) -> None:
        """Let go of the connection."""
        self._client.close()
