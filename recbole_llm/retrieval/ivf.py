"""Approximate retrieval for catalogues too large to score whole: FAISS IVF-Flat over [vector, bias], inner product.

Inverted lists, not a graph: on inner products HNSW loses recall that no setting brings back, and cannot delete. The number
of lists probed is chosen when the index is built, as the smallest with recall@10 of at least ``RECALL`` on sampled queries.
"""

from collections.abc import Mapping
from logging import getLogger
from typing import Any

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import INDEX
from recbole_llm.export.reader import Export
from recbole_llm.retrieval.candidates import (
    RECALL_AT,
    CandidateRetriever,
    best_rows,
    doublings,
    smallest_with_recall,
    wide_query,
    with_bias,
)
from recbole_llm.retrieval.item_catalog import Catalog

MIN_ROWS_PER_LIST = 39  # below this k-means of FAISS warns
# k-means sees this many rows per list, not FAISS's 256: a quarter of the build time, and recall is measured either way
TRAINING_ROWS_PER_LIST = 64

log = getLogger(__name__)


def faiss_module() -> Any:
    """The faiss module.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ValueError("An IVF index needs faiss: pip install -e '.[ann]' in the checkout.") from error
    return faiss


def read_index(content: memoryview | bytes, name: str) -> Any:
    """Read an index of faiss.

    Raises:
        ValueError: if faiss is not installed.
        ExportError: if it is damaged, or of another version of faiss.
    """
    faiss = faiss_module()
    try:
        return faiss.deserialize_index(np.frombuffer(content, np.uint8))
    except RuntimeError:
        raise ExportError(f"{name} cannot be read by the faiss installed here: export again.") from None


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
    faiss = faiss_module()
    table = with_bias(vector, bias)
    N, width = table.shape
    nlist = max(1, min(round(4 * N**0.5), N // MIN_ROWS_PER_LIST))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, nlist, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.max_points_per_centroid = 0, TRAINING_ROWS_PER_LIST
    index.train(table)
    index.add(table)
    wide = with_bias(queries, np.ones(len(queries), np.float32))

    def found(nprobe: int) -> Any:
        index.nprobe = nprobe
        return index.search(wide, min(RECALL_AT, N))[1]

    nprobe, recall = smallest_with_recall(doublings(1, nlist), found, best_rows(vector, bias, queries))
    log.info("IVF index of %d lists; %d probed, recall@10 %.4f on %d users", nlist, nprobe, recall, len(queries))
    description = {"kind": "ivf", "nlist": nlist, "nprobe": nprobe, "recall_at_10": round(recall, 4)}
    return description, faiss.serialize_index(index).tobytes()


class IvfRetriever(CandidateRetriever):
    """Searches the export's rows in its IVF index.

    Args:
        export: with an index.
        catalog: of the same export.

    Raises:
        ValueError: if faiss is not installed.
        ExportError: if the index is not of this export.
    """

    def __init__(self, export: Export, catalog: Catalog) -> None:
        super().__init__(catalog)
        self._faiss = faiss = faiss_module()
        assert export.index is not None
        self._index = read_index(export.index, INDEX)
        description: Mapping[str, Any] = export.manifest.index
        shape = (self._index.d, self._index.ntotal) if isinstance(self._index, faiss.IndexIVFFlat) else None
        if shape != (export.manifest.dim + 1, len(export.item_ids)):
            raise ExportError("index.faiss is not an index of this export's vectors: export again.")
        self.nprobe = int(description["nprobe"])

    def candidates(self, query: np.ndarray, wanted: int, hidden: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Propose rows as :meth:`CandidateRetriever.candidates` does; the selector keeps hidden rows out of the lists."""
        faiss = self._faiss
        # kept in variables: faiss does not own them
        if mask is None:
            batch = faiss.IDSelectorBatch(hidden)
            selector = faiss.IDSelectorNot(batch)
        else:
            bitmap = np.packbits(mask, bitorder="little")
            selector = faiss.IDSelectorBitmap(bitmap)
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=self.nprobe)
        rows = self._index.search(wide_query(query)[None], wanted, params=parameters)[1][0]
        return rows[rows >= 0]  # type: ignore[no-any-return]
