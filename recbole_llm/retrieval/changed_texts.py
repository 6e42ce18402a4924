"""Content vectors, of texts and of pictures, of items that were added or changed since the export."""

from collections.abc import Mapping

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.export.search_tables import TextSpace, plain
from recbole_llm.retrieval.item_catalog import Catalog


class ChangedTexts:
    """Directions of the texts and titles of changed rows; a row without one has zeros.

    A new title's vector comes later than the item itself: the log of changes keeps no vectors of titles, and only an encoder
    that answers questions in words makes them.

    Args:
        export: whose rows change.
        catalog: of the same export.
        content: ``[N, f]``, the directions of the export's items.
        space: how texts become directions; ``None`` where they do not.
    """

    def __init__(self, export: Export, catalog: Catalog, content: np.ndarray, space: TextSpace | None) -> None:
        self._export, self._catalog, self._content, self._space = export, catalog, content, space
        self._texts: dict[int, np.ndarray] = {}
        self._titles: dict[int, np.ndarray] = {}
        self._title_of: dict[int, str] = {}
        self._waiting: dict[int, str] = {}
        self._stacked: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def rows(self) -> list[int]:
        """The changed rows, in the order in which they changed first."""
        return list(self._texts)

    def take_changes(self) -> list[int]:
        """Read what changed in the catalogue since the last call; returns those rows."""
        if not self._catalog.touched:
            return []
        rows = list(self._catalog.touched)
        self._catalog.touched.clear()
        nothing = np.zeros(self._content.shape[1], np.float32)
        for row in rows:
            base = self._catalog.base_of(row)
            vector = self._catalog.text_vectors.get(row)
            if vector is not None and self._space is not None:
                self._texts[row] = self._space.directions(vector[None])[0]
            elif row not in self._texts:
                self._texts[row] = nothing if base is None else self._content[base]
            self._take_title(row, self._catalog.records[row].title, nothing)
        self._stacked = None
        return rows

    def _take_title(self, row: int, title: str, nothing: np.ndarray) -> None:
        if self._title_of.get(row) == title:
            return
        self._title_of[row] = title
        search, base = self._export.search, self._catalog.base_of(row)
        titles = None if search is None else search.titles
        if base is not None and titles is not None and title == self._export.records[base].title:
            self._titles[row] = titles[base]
            self._waiting.pop(row, None)
        elif title == self._catalog.ids[row]:  # an id says nothing of the item
            self._titles[row] = nothing
            self._waiting.pop(row, None)
        else:
            self._titles[row] = nothing
            self._waiting[row] = title

    @property
    def is_behind(self) -> bool:
        """Whether something changed that was not read yet, or a title waits; cheap, and safe from any thread."""
        return bool(self._catalog.touched or self._waiting)

    @property
    def untitled(self) -> list[str]:
        """Titles, entities replaced, that wait for their vectors, each once."""
        return list(dict.fromkeys(plain(title) for title in self._waiting.values()))

    def put_titles(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Take the vectors of titles that wait."""
        if self._space is None:
            return
        for row, title in list(self._waiting.items()):
            vector = vectors.get(plain(title))
            if vector is not None:
                self._titles[row] = self._space.directions(vector[None])[0]
                del self._waiting[row]
        self._stacked = None

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Directions of texts and of titles in the order of ``rows``, ``[m, f]`` float32."""
        if self._stacked is None:
            self._stacked = np.stack(list(self._texts.values())), np.stack([self._titles[row] for row in self._texts])
        return self._stacked

    def replace(self, rows: np.ndarray, texts: np.ndarray, titles: np.ndarray | None) -> None:
        """Write the directions of changed rows over those of ``rows``, in place."""
        if not self._texts:
            return
        for at, row in enumerate(rows.tolist()):
            if row in self._texts:
                texts[at] = self._texts[row]
                if titles is not None:
                    titles[at] = self._titles[row]


class ChangedPictures(ChangedTexts):
    """The same of pictures, which have no titles."""

    _read = 0

    def take_changes(self) -> list[int]:
        """Read what changed in the catalogue since the last call; no row has other words by it."""
        rows = self._catalog.repainted[self._read :]
        self._read += len(rows)
        for row in rows:
            vector, base = self._catalog.picture_vectors.get(row), self._catalog.base_of(row)
            if row in self._catalog.unpainted:
                self._texts[row] = np.zeros(self._content.shape[1], np.float32)
            elif vector is not None and self._space is not None:
                self._texts[row] = self._space.directions(vector[None])[0]
            elif base is not None:
                self._texts[row] = self._content[base]
        if rows:
            self._stacked = None
        return []

    @property
    def is_behind(self) -> bool:
        """Never: there is nothing to encode."""
        return False

    @property
    def untitled(self) -> list[str]:
        """None."""
        return []

    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """Directions of pictures in the order of ``rows``, ``[m, f]`` float32, and nothing."""
        if self._stacked is None:
            self._stacked = np.stack(list(self._texts.values())), np.zeros((0, 0), np.float32)
        return self._stacked

    def replace(self, rows: np.ndarray, texts: np.ndarray, titles: np.ndarray | None) -> None:
        """Write the directions of changed rows over those of ``rows``, in place; zeros for added ones without a picture."""
        texts[rows >= self._catalog.n_base] = 0.0
        for at, row in enumerate(rows.tolist()):
            if row in self._texts:
                texts[at] = self._texts[row]
