r"""Exact words: BM25 of a query against the items' texts, as a share of what the query's words are worth.

    bm_i = sum_{w in q} idf_w (k1 + 1) tf_iw / (tf_iw + k1 (1 - b + b |i| / mean |i|)) / sum_{w in q} idf_w

A word of the query that no text holds counts below the line with the largest idf. Without that a long query would drown every
other measure of likeness, and one known word among unknown ones would count as a full match.

The index is built by ``bm25s``. Texts that change later are scored by the same formula with the index's own statistics.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from recbole_llm.export.search_tables import plain

K1, B = 1.2, 0.75

_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Split a text into words: runs of letters and digits, case folded, entities replaced."""
    return _WORD.findall(plain(text).casefold())


def same(text: str) -> str:
    """Return what two texts share that are equal but for case, white space and entities."""
    return " ".join(plain(text).casefold().split())


class WordIndex:
    """BM25 over the texts of a catalogue, some of which change.

    Args:
        texts: of rows 0, 1, ...; an empty one holds no word.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        vocabulary: dict[str, int] = {}
        rows = [[vocabulary.setdefault(word, len(vocabulary)) for word in words_of(text)] for text in texts]
        self.n_base = len(rows)
        self.vocabulary = vocabulary
        self.mean_length = sum(map(len, rows)) / max(len(rows), 1)
        self._index = _built(rows, vocabulary)
        held = (
            np.zeros(0, np.int64) if self._index is None else np.diff(self._index.scores["indptr"])[: len(vocabulary)]
        )
        self._idf = np.log1p((self.n_base - held + 0.5) / (held + 0.5))
        self.largest_idf = float(self._idf.max()) if len(self._idf) else 1.0
        self._counts: dict[int, Counter[str]] = {}  # of changed rows
        self._rows_with: dict[str, set[int]] = {}

    def idf(self, word: str) -> float:
        """What a word is worth; a word of no text the most."""
        at = self.vocabulary.get(word)
        return self.largest_idf if at is None else float(self._idf[at])

    def put(self, row: int, text: str) -> None:
        """Give a row another text, or add the row."""
        for word in self._counts.get(row, ()):
            self._rows_with[word].discard(row)
        self._counts[row] = Counter(words_of(text))
        for word in self._counts[row]:
            self._rows_with.setdefault(word, set()).add(row)

    def scores(self, query: str, n_rows: int) -> np.ndarray:
        """Score every row by the formula of the module docstring.

        Args:
            query: any text.
            n_rows: rows of the catalogue.

        Returns:
            ``[n_rows]`` float32; zero where no word of the query occurs, and for a query without words.
        """
        found = np.zeros(n_rows, np.float32)
        words = words_of(query)
        worth = sum(self.idf(word) for word in words)
        if worth <= 0:
            return found
        known = [self.vocabulary[word] for word in words if word in self.vocabulary]
        if known and self._index is not None:
            found[: self.n_base] = self._index.get_scores_from_ids(known)
            found *= np.float32((K1 + 1) / worth)  # bm25s leaves out the constant factor
        if self._counts:
            found[list(self._counts)] = 0.0
            self._add_changed(found, words, worth)
        return found

    def _add_changed(self, found: np.ndarray, words: Sequence[str], worth: float) -> None:
        for word in words:
            for row in self._rows_with.get(word, ()):
                counts = self._counts[row]
                length = counts.total() / max(self.mean_length, 1e-9)
                times = counts[word]
                found[row] += self.idf(word) * (K1 + 1) * times / (times + K1 * (1 - B + B * length)) / worth


def _built(rows: list[list[int]], vocabulary: dict[str, int]) -> Any:
    """The index of bm25s; ``None`` where no text holds a word."""
    if not vocabulary:
        return None
    import bm25s

    index = bm25s.BM25(k1=K1, b=B, method="lucene")
    index.index((rows, dict(vocabulary)), show_progress=False)
    return index
