"""Likeness of items by the model's own vectors, for exports without content."""

import numpy as np

from recbole_llm.export.direct import DirectRows
from recbole_llm.export.quantise import squared_lengths
from recbole_llm.export.reader import Export
from recbole_llm.retrieval.item_catalog import Catalog


class Cosines:
    """Cosines of target vectors, or of source vectors where the manifest's ``similar_by`` says so.

    An item's direct rows are further columns of its source vector.

    Args:
        export: the model.
        catalog: its items, new ones included.
    """

    def __init__(self, export: Export, catalog: Catalog) -> None:
        self._catalog = catalog
        self._by_source = export.manifest.similar_by == "source"
        self._base = export.source if self._by_source else export.vector
        self._norms: np.ndarray | None = None
        self._direct = tuple(export.direct.values()) if self._by_source else ()

    def of(self, row: int) -> np.ndarray:
        """Compute the cosines of a row's vector with those of every row, ``[N]`` float32."""
        catalog = self._catalog
        table = catalog.source if self._by_source else catalog.vector
        if self._norms is None:
            squares = squared_lengths(self._base)
            for rows in self._direct:
                squares = squares + _row_sums(rows, rows.values)
            self._norms = np.sqrt(squares)
        fresh = table(np.arange(catalog.n_base, len(catalog)))
        own = table(np.array([row]))[0]
        of_base = self._base @ own
        for rows in self._direct:
            wide = np.zeros(catalog.n_base, np.float32)
            _, items, values = rows.entries(np.array([row]))
            wide[items] = values
            of_base = of_base + _row_sums(rows, wide[rows.items])
        dots = np.concatenate([of_base, fresh @ own])
        norms = np.concatenate([self._norms, np.sqrt(np.einsum("nd,nd->n", fresh, fresh))])
        return dots / np.maximum(norms * norms[row], np.float32(1e-12))  # type: ignore[no-any-return]


def _row_sums(rows: DirectRows, factor: np.ndarray) -> np.ndarray:
    """Sum each row's values times ``factor`` ``[nnz]``: ``[N]`` float32."""
    total = np.append(np.float64(0), np.cumsum(rows.values.astype(np.float64) * factor))
    return np.diff(total[rows.offsets]).astype(np.float32)
