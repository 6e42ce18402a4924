"""Retrieval from vectors that another server holds, for catalogues that do not fit the memory of a replica.

The export's item vectors are copied once into a table or collection named after the export, so that every replica and
every later start finds them. A replica then touches its own copy, the mapped file, only for the rows that were found.
While the server cannot be reached, the mapped file is scored: the same answers, slower.
"""

import math
import time
from abc import abstractmethod
from logging import getLogger

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.retrieval.candidates import CandidateRetriever
from recbole_llm.retrieval.item_catalog import Catalog

# below this many rows the server scores all of them: 14 ms at 20,000 rows of pgvector, and no recall to lose
EXACT_UP_TO = 50_000
ROWS_AT_ONCE = 4096
RETRY_SECONDS = 5.0
WIDENINGS = 3  # of a search whose filter drops too much, by a factor of 4 each

log = getLogger(__name__)


class SearchError(RuntimeError):
    """The server with the vectors could not be reached, or refused."""


class RemoteRetriever(CandidateRetriever):
    """Asks a server for candidates.

    Args:
        export: whose listed items the server holds.
        catalog: of the same export.
    """

    def __init__(self, export: Export, catalog: Catalog) -> None:
        super().__init__(catalog)
        self.listed = export.listed
        self.n_listed = int(export.listed.sum())
        self._retry_at = 0.0

    @abstractmethod
    def ranked(self, query: np.ndarray, n: int, hidden: np.ndarray) -> np.ndarray:
        """Find about the n best rows without the hidden ones, ``[n]`` int64.

        Raises:
            SearchError: if the server does not answer.
        """

    def candidates(self, query: np.ndarray, wanted: int, hidden: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """Propose rows as :meth:`CandidateRetriever.candidates` does.

        Filters are applied here, on more rows than wanted.
        """
        nothing = np.zeros(0, np.int64)
        if time.monotonic() < self._retry_at:
            return nothing
        hidden = hidden[self.listed[hidden]]  # the server holds no others
        n = wanted if mask is None else math.ceil(1.5 * wanted * len(mask) / max(int(mask.sum()), 1))
        rows = nothing
        try:
            for _ in range(WIDENINGS):
                n = min(n, self.n_listed)
                found = self.ranked(query, n, hidden)
                rows = found if mask is None else found[mask[found]]
                if len(rows) >= wanted or len(found) < n:
                    break
                n *= 4
        except SearchError as error:
            self._retry_at = time.monotonic() + RETRY_SECONDS
            log.warning("%s Every item is scored here for %g seconds: slower.", error, RETRY_SECONDS)
            return nothing
        return rows

    def close(self) -> None:
        """Close the connection."""
