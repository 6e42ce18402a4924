"""Likeness of items by the model's own vectors, for exports without content."""

import numpy as np

from recbole_llm.export.quantise import squared_lengths
from recbole_llm.export.reader import Export
from recbole_llm.retrieval.item_catalog import Catalog


class Cosines:
    """Cosines of target vectors, or of source vectors where the manifest's ``similar_by`` says so.

    Args:
        export: the model.
        catalog: its items, new ones included.
    """

    def __init__(self, export: Export, catalog: Catalog) -> None:
        self._catalog = catalog
        self._by_source = export.manifest.similar_by == "source"
        self._base = export.source if self._by_source else export.vector
        self._norms: np.ndarray | None = None

    def of(self, row: int) -> np.ndarray:
        """Compute the cosines of a row's vector with those of every row, ``[N]`` float32."""
        catalog = self._catalog
        table = catalog.source if self._by_source else catalog.vector
        if self._norms is None:
            self._norms = np.sqrt(squared_lengths(self._base))
        fresh = table(np.arange(catalog.n_base, len(catalog)))
        own = table(np.array([row]))[0]
        dots = np.concatenate([self._base @ own, fresh @ own])
        norms = np.concatenate([self._norms, np.sqrt(np.einsum("nd,nd->n", fresh, fresh))])
        return dots / np.maximum(norms * norms[row], np.float32(1e-12))  # type: ignore[no-any-return]
