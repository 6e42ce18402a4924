"""Approximate retrieval for catalogues too large to score whole: FAISS IVF-Flat over [vector, bias], inner product.

Inverted lists, not a graph: on inner products HNSW loses recall that no setting brings back, and cannot delete. The number
of lists probed is chosen when the index is built, as the smallest with recall@10 of at least ``RECALL`` on sampled queries.
What was added since the export is scored whole; what must not appear is never looked at, so answers are never short.
"""

from collections.abc import Mapping, Sequence
from logging import getLogger
from typing import Any

import numpy as np

from recbole_llm.serving.artifact import Export
from recbole_llm.serving.catalog import Catalog
from recbole_llm.serving.errors import ExportError
from recbole_llm.serving.query import Pooling
from recbole_llm.serving.retrieval import GATHER_SHARE, MARGIN, ExactRetriever, Hits, Segment, best

RECALL = 0.99
RECALL_AT = 10
SAMPLED_QUERIES = 256
MIN_ROWS_PER_LIST = 39  # below this k-means of FAISS warns

log = getLogger(__name__)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ValueError("An IVF index needs faiss: pip install 'recbole-llm[ann]'.") from error
    return faiss


def _with_bias(vector: np.ndarray, bias: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.concatenate([vector, bias[:, None]], 1), dtype=np.float32)


def sample_queries(
    pooling: Pooling, source: np.ndarray, offsets: np.ndarray, items: np.ndarray, weight: np.ndarray, seed: int = 0
) -> np.ndarray:
    """Queries of up to ``SAMPLED_QUERIES`` users with a history, ``[Q, D]`` float32."""
    users = np.flatnonzero(np.diff(offsets))
    chosen = np.random.default_rng(seed).permutation(users)[:SAMPLED_QUERIES]
    spans = [slice(int(offsets[user]), int(offsets[user + 1])) for user in chosen]
    return np.stack([pooling.query(source[items[span]], weight[span]).vector for span in spans])


def build_index(vector: np.ndarray, bias: np.ndarray, queries: np.ndarray) -> tuple[dict[str, Any], bytes]:
    """Build the index and choose how many lists are probed.

    Args:
        vector: ``[N, D]`` float32.
        bias: ``[N]`` float32, finite.
        queries: ``[Q, D]`` float32, by which recall is measured.

    Returns:
        Its description for the manifest, and its bytes.

    Raises:
        ValueError: if faiss is not installed.
    """
    faiss = _faiss()
    table = _with_bias(vector, bias)
    N, width = table.shape
    nlist = max(1, min(round(4 * N**0.5), N // MIN_ROWS_PER_LIST))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = 0
    index.train(table)
    index.add(table)
    wide = _with_bias(queries, np.ones(len(queries), np.float32))
    k = min(RECALL_AT, N)
    exact = ExactRetriever([Segment(0, vector, bias)])
    none = np.zeros(0, np.int64)
    truth = [
        hit.rows for hit in exact.search(queries, [k] * len(queries), [none] * len(queries), [None] * len(queries))
    ]
    nprobe = 1
    while True:
        index.nprobe = nprobe
        _, found = index.search(wide, k)
        recall = float(np.mean([len(np.intersect1d(a, b)) / k for a, b in zip(truth, found, strict=True)]))
        if recall >= RECALL or nprobe >= nlist:
            break
        nprobe = min(2 * nprobe, nlist)
    log.info("IVF index of %d lists; %d probed, recall@%d %.4f on %d users", nlist, nprobe, k, recall, len(queries))
    description = {"kind": "ivf", "nlist": nlist, "nprobe": nprobe, "recall_at_10": round(recall, 4)}
    return description, faiss.serialize_index(index).tobytes()


class IvfRetriever:
    """Searches the export's rows in an IVF index and what was added since exactly.

    Args:
        export: with an index.
        catalog: of the same export; read at every search.

    Raises:
        ValueError: if faiss is not installed.
        ExportError: if the index is not of this export.
    """

    def __init__(self, export: Export, catalog: Catalog) -> None:
        self._faiss = faiss = _faiss()
        assert export.index is not None
        self.catalog = catalog
        try:
            self._index = faiss.deserialize_index(np.frombuffer(export.index, np.uint8))
        except RuntimeError:
            raise ExportError("index.faiss cannot be read by the faiss installed here: export again.") from None
        description: Mapping[str, Any] = export.manifest.index
        shape = (self._index.d, self._index.ntotal) if isinstance(self._index, faiss.IndexIVFFlat) else None
        if shape != (export.manifest.dim + 1, len(export.item_ids)):
            raise ExportError("index.faiss is not an index of this export's vectors: export again.")
        self.nprobe = int(description["nprobe"])
        self._dead: tuple[int, np.ndarray] = (-1, np.zeros(0, np.int64))  # with the catalogue's version

    def search(
        self,
        query: np.ndarray,
        k: Sequence[int],
        exclude: Sequence[np.ndarray],
        allow: Sequence[np.ndarray | None],
    ) -> list[Hits]:
        """As :meth:`ExactRetriever.search`, approximate over the export's rows."""
        segments = self.catalog.segments()
        exact = ExactRetriever(segments)
        added = ExactRetriever(segments[1:])
        if self._dead[0] != self.catalog.version:
            self._dead = (self.catalog.version, np.flatnonzero(segments[0].bias == -np.inf))
        dead = self._dead[1]
        return [self._one(query[b], k[b], exclude[b], allow[b], exact, added, dead) for b in range(len(k))]

    def _one(
        self,
        query: np.ndarray,
        k: int,
        exclude: np.ndarray,
        allow: np.ndarray | None,
        exact: ExactRetriever,
        added: ExactRetriever,
        dead: np.ndarray,
    ) -> Hits:
        n_base = self.catalog.n_base
        kept = n_base if allow is None else int(allow[:n_base].sum())
        if kept < GATHER_SHARE * n_base:
            return exact.search(query[None], [k], [exclude], [allow])[0]
        faiss = self._faiss
        hidden = np.concatenate([exclude[exclude < n_base], dead])
        if allow is None:
            # kept in variables: faiss does not own them
            batch = faiss.IDSelectorBatch(hidden)
            selector = faiss.IDSelectorNot(batch)
        else:
            mask = allow[:n_base].copy()
            mask[hidden] = False
            kept = int(mask.sum())
            bitmap = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(bitmap)
        wanted = k + MARGIN
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=self.nprobe)
        wide = np.append(query, np.float32(1)).astype(np.float32)[None]
        _, rows = self._index.search(wide, wanted, params=parameters)
        rows = rows[0][rows[0] >= 0]
        if len(rows) < min(k, kept):  # the lists probed hold too few: large k, many exclusions
            return exact.search(query[None], [k], [exclude], [allow])[0]
        if added.segments:
            rows = np.concatenate([rows, added.search(query[None], [k], [exclude], [allow])[0].rows])
        final = exact.score(query, rows)
        order = best(rows, final, k)
        return Hits(rows[order], final[order])
