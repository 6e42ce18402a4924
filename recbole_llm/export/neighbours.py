"""Who is bought with whom: the neighbours of every item, from the training interactions alone."""

from collections.abc import Iterator

import numpy as np
from scipy import sparse

NEIGHBOURS = 100  # of an item; with all of them ml-1m-text's co-purchase NDCG@10 is .1171, with a hundred .1173
# users weigh n^-beta, as by default in the closed form
USER_EXPONENT = 0.5
# of an item with few buyers, whose shares are chance; in units of the mean diagonal
SHRINKAGE = 0.05
# b: 0 shows bestsellers beside everything, 0.5 is the cosine; docs/decisions/search.md
TILT = 0.25
ENTRIES_AT_ONCE = 1 << 24


def neighbours(
    offsets: np.ndarray, items: np.ndarray, n_items: int, most: int = NEIGHBOURS
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The items with the largest c_ji of :mod:`recbole_llm.export.search_tables` for every item j.

    Args:
        offsets: ``[U + 1]``, where each user's training items begin.
        items: ``[nnz]`` rows, unique within a user.
        n_items: N.
        most: neighbours of an item.

    Returns:
        ``[N + 1]`` int64 offsets, ``[k]`` int32 rows ascending within an item, ``[k]`` float32 shares. Of equal shares at the
        end of a list the item of the smaller row is kept.
    """
    sizes = np.diff(offsets)
    active = sizes > 0
    mean = sizes[active].mean() if active.any() else 1.0
    weights = np.where(active, (np.maximum(sizes, 1) / mean) ** -USER_EXPONENT, 0.0)
    ones = np.ones(len(items))
    bought = sparse.csr_matrix((ones, items, offsets), shape=(len(sizes), n_items))
    weighted = sparse.csr_matrix((np.repeat(weights, sizes), items, offsets), shape=(len(sizes), n_items))
    of_item = weighted.T.tocsr()
    diagonal = np.asarray(weighted.sum(0)).ravel()
    warm = diagonal > 0
    g = diagonal[warm].mean() if warm.any() else 1.0
    fame = np.where(warm, diagonal / g, 1.0) ** TILT
    counts = np.zeros(n_items, np.int64)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    work = np.minimum(np.asarray(of_item.astype(bool) @ sizes).ravel(), n_items)
    for start, stop in _blocks(work):
        gram = (of_item[start:stop] @ bought).tocsr()
        gram.sort_indices()
        for row in range(start, stop):
            span = slice(gram.indptr[row - start], gram.indptr[row - start + 1])
            others, values = gram.indices[span], gram.data[span]
            values, others = values[others != row], others[others != row]
            shares = values / ((diagonal[row] + SHRINKAGE * g) * fame[others])
            kept = np.sort(np.lexsort((others, -shares))[:most])
            counts[row] = len(kept)
            found.append((others[kept].astype(np.int32), shares[kept].astype(np.float32)))
    rows = np.concatenate([rows for rows, _ in found]) if found else np.zeros(0, np.int32)
    shares = np.concatenate([shares for _, shares in found]) if found else np.zeros(0, np.float32)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64), rows, shares


def _blocks(work: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of items whose rows of G hold at most ``ENTRIES_AT_ONCE`` entries together, one item at least."""
    ends = np.cumsum(work)
    start = 0
    while start < len(work):
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + ENTRIES_AT_ONCE, side="right")), start + 1)
        yield start, stop
        start = stop
