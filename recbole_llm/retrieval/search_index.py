"""Candidates for searches in catalogues too large to compare whole: one FAISS IVF index of the texts and titles.

The index proposes rows; the search scores them as it scores every row. Vectors are held as bytes, a quarter of their size: what
it proposes is compared again with the vectors themselves.
"""

from logging import getLogger

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import SEARCH_INDEX
from recbole_llm.retrieval.candidates import RECALL_AT, SAMPLED_QUERIES, doublings, smallest_with_recall
from recbole_llm.retrieval.exact import GATHER_SHARE, top_rows
from recbole_llm.retrieval.ivf import MIN_ROWS_PER_LIST, TRAINING_ROWS_PER_LIST, faiss_module, read_index

CANDIDATES = 1000
ROUNDS = 10  # of k-means
ROWS_AT_ONCE = 1 << 16

log = getLogger(__name__)


def build_search_index(texts: np.ndarray, titles: np.ndarray | None) -> bytes:
    """Build the index and choose how many lists are probed.

    Args:
        texts: ``[N, f]`` float32 directions.
        titles: the same of the titles, or ``None``.

    Raises:
        ValueError: if faiss is not installed.
    """
    faiss = faiss_module()
    tables = [texts] if titles is None else [texts, titles]
    n_rows, width = len(texts) * len(tables), texts.shape[1]
    nlist = max(1, min(round(2 * n_rows**0.5), n_rows // MIN_ROWS_PER_LIST))
    bits = faiss.ScalarQuantizer.QT_8bit
    index = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatIP(width), width, nlist, bits, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter = 0, ROUNDS
    index.cp.max_points_per_centroid = TRAINING_ROWS_PER_LIST
    draw = np.random.default_rng(0)
    sample = draw.permutation(n_rows)[: nlist * TRAINING_ROWS_PER_LIST]
    index.train(
        np.concatenate(
            [table[np.sort(sample[sample // len(texts) == n]) % len(texts)] for n, table in enumerate(tables)]
        )
    )
    for table in tables:
        for start in range(0, len(table), ROWS_AT_ONCE):
            index.add(np.ascontiguousarray(table[start : start + ROWS_AT_ONCE], dtype=np.float32))
    queries = (texts if titles is None else titles)[draw.permutation(len(texts))[:SAMPLED_QUERIES]]
    queries = queries + np.float32(0.5 / width**0.5) * draw.standard_normal(
        queries.shape, np.float32
    )  # never quite a title
    truth = [_true_rows(query, tables) for query in queries]

    def found(nprobe: int) -> list[np.ndarray]:
        index.nprobe = nprobe
        return [np.unique(rows % len(texts)) for rows in index.search(queries, CANDIDATES)[1]]

    nprobe, recall = smallest_with_recall(doublings(1, nlist), found, truth)
    index.nprobe = nprobe
    log.info("Search index of %d lists; %d probed, %.4f of the ten likest among the candidates", nlist, nprobe, recall)
    content: bytes = faiss.serialize_index(index).tobytes()
    return content


def _true_rows(query: np.ndarray, tables: list[np.ndarray]) -> np.ndarray:
    likeness = np.max([table @ query for table in tables], axis=0)
    rows = top_rows(likeness, min(RECALL_AT, len(likeness)))
    return rows[np.argsort(-likeness[rows], kind="stable")[:RECALL_AT]]


class SearchIndex:
    """The likest rows of an export, about.

    Args:
        content: of :func:`build_search_index`.
        n_items: of the export.
        width: dimensions of a direction.

    Raises:
        ValueError: if faiss is not installed.
        ExportError: if the index is not of this export.
    """

    def __init__(self, content: memoryview | bytes, n_items: int, width: int) -> None:
        self._faiss = faiss = faiss_module()
        self._index = read_index(content, SEARCH_INDEX)
        fits = isinstance(self._index, faiss.IndexIVFScalarQuantizer) and self._index.d == width
        if not fits or self._index.ntotal not in (n_items, 2 * n_items):
            raise ExportError(f"{SEARCH_INDEX} is not an index of this export's vectors: export again.")
        self._n_items, self._tables = n_items, self._index.ntotal // n_items

    def near(self, direction: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
        """Rows of the export among which the likest are, int64 ascending.

        Args:
            direction: ``[f]`` float32.
            allowed: ``[N]`` bool; ``None`` for all. Where few are allowed they are returned themselves.
        """
        faiss = self._faiss
        if allowed is None:
            rows = self._index.search(direction[None], CANDIDATES)[1][0]
        else:
            if int(allowed.sum()) < max(GATHER_SHARE * len(allowed), CANDIDATES):
                return np.flatnonzero(allowed)
            bitmap = np.packbits(np.tile(allowed, self._tables), bitorder="little")  # kept here: faiss does not own it
            selector = faiss.IDSelectorBitmap(bitmap)
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=self._index.nprobe)
            rows = self._index.search(direction[None], CANDIDATES, params=parameters)[1][0]
        return np.unique(rows[rows >= 0] % self._n_items)
