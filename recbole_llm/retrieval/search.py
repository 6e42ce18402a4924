r"""Searches that know taste: likeness of a query first, then what buyers of the likest items bought.

For a query q (a text or its vector; for "similar" an item) and item i:

    L_i   = max(<q, title_i> - .1, <q, text_i>) + .65 bm_i    directions of the content; bm of :mod:`words`
    y_i   = exp((L_i - max L) / T),    T = .2
    t     = sum over the 50 items j of the largest L that have neighbours of y_j c_ji, divided by its maximum
    score = y + alpha t,    alpha = .1 for a text, .4 for an item

The exponential is what makes two measures one ranking: beside a good hit the merely similar fall below .1, so that t decides
the rest, and no t moves an item whose L leads by more than -T ln(1 - alpha) = .021. An item whose own title or text is the
query leads by ``LEAD``. For an item as query, L_i = <text_q, text_i>, and the item itself has no place.

An item's score depends on the catalogue and the query alone: a filter takes items away and changes no score.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.export.search_tables import TextSpace
from recbole_llm.retrieval.changed_texts import ChangedPictures, ChangedTexts
from recbole_llm.retrieval.exact import MARGIN, best, top_rows
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.search_index import CANDIDATES, SearchIndex
from recbole_llm.retrieval.search_parts import NothingChanged, first_modality, index_of, no_neighbours, space_of
from recbole_llm.retrieval.words import WordIndex, same

# chosen on the validation data of three datasets: docs/decisions/search.md
TEMPERATURE = 0.2
WORDS = 0.65
TITLE_DISCOUNT = np.float32(0.1)  # without it short titles answer a short question whatever it means
NEAREST = 50
TASTE_OF_TEXT, TASTE_OF_ITEM = 0.1, 0.4
LEAD = 0.025
BY = ("both", "likeness", "chance")

log = getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Found:
    """The best rows of a search, best first; the parts add up to the score.

    Attributes:
        rows: ``[k]`` int64.
        scores: ``[k]`` float64.
        likeness: ``[k]``, what the likeness of meaning gives.
        words: ``[k]``, what exact words give.
        taste: ``[k]``, what buyers of the likest items give.
        links: what each of the likest items adds to the taste of which row.
    """

    rows: np.ndarray
    scores: np.ndarray
    likeness: np.ndarray
    words: np.ndarray
    taste: np.ndarray
    links: "Links"


@dataclass(frozen=True, eq=False)
class Links:
    """Pairs of a likest item j and a row that its buyers bought.

    Attributes:
        source: ``[n]`` int64 rows j.
        target: ``[n]`` int64 rows.
        adds: ``[n]`` float64, in parts of the score.
    """

    source: np.ndarray
    target: np.ndarray
    adds: np.ndarray

    def of(self, row: int, most: int) -> tuple[np.ndarray, np.ndarray]:
        """The items that add most to a row's taste, and what they add, the largest first."""
        at = np.flatnonzero(self.target == row)
        at = at[np.lexsort((self.source[at], -self.adds[at]))][:most]
        return self.source[at], self.adds[at]


class _Query:
    """One search on its way: L of every row, or of an index's candidates, in float32, and of a few rows exactly."""

    def __init__(
        self, search: "Search", direction: np.ndarray, text: str | None, item: int | None, allowed: np.ndarray | None
    ) -> None:
        self.search, self.direction, self.item = search, direction, item
        self.n_rows = len(search.catalog)
        self.words = np.zeros(self.n_rows, np.float32)
        self.own = np.zeros(0, np.int64)
        if text is not None:
            self.words = search.words.scores(text, self.n_rows)
            self.own = search.named(text)
        self.ahead = -np.inf
        self.rough = search.likeness(direction, item is None, self.words, allowed) + np.float32(WORDS) * self.words
        self.gone = search.catalog.gone()
        shown = self.rough.copy()
        shown[self.gone] = -np.inf
        if item is not None:
            self.rough[item] = shown[item] = 1.0
        elif len(self.own):
            others = shown.copy()
            others[self.own] = -np.inf
            if others.max(initial=-np.inf) > -np.inf:
                self.ahead = float(self.exact(np.array([int(others.argmax())])).max()) + LEAD
            self.rough[self.own] = np.maximum(self.rough[self.own], np.float32(self.ahead))
            shown[self.own] = self.rough[self.own]
        for old, new in search.catalog.successor.items():
            self.rough[old] = self.rough[new]
        self.top = float(self.exact(np.array([int(shown.argmax())]))[0]) if (shown > -np.inf).any() else 0.0

    def whole(self) -> np.ndarray:
        """Compare every row after all; returns L, ``[N]`` float32."""
        n_base = self.search.catalog.n_base
        rows = np.flatnonzero(self.rough[:n_base] == -np.inf)
        self.rough[rows] = self.search.compared(self.direction, self.item is None, rows)
        self.rough[rows] += np.float32(WORDS) * self.words[rows]
        return self.rough

    def exact(self, rows: np.ndarray) -> np.ndarray:
        """L of rows ``[n]`` float64, each summed by itself."""
        return self.likeness(rows) + WORDS * self.words[self._now(rows)].astype(np.float64)

    def likeness(self, rows: np.ndarray) -> np.ndarray:
        """L less its words, with the lead of an item that is named."""
        now = self._now(rows)
        texts, titles = self.search.tables(now)
        wide = self.direction.astype(np.float64)
        found = (texts * wide).sum(1)
        if self.item is not None:
            found[rows == self.item] = 1.0
            return found
        if titles is not None:
            found = np.maximum(found, (titles * wide).sum(1) - TITLE_DISCOUNT)
        led = np.isin(now, self.own)
        found[led] = np.maximum(found[led], self.ahead - WORDS * self.words[now[led]].astype(np.float64))
        return found

    def _now(self, rows: np.ndarray) -> np.ndarray:
        """The rows that took the places of others."""
        moved = self.search.catalog.successor
        if not moved:
            return rows
        return np.array([moved.get(row, row) for row in rows.tolist()], np.int64)


class Search:
    """Searches an export and what was added, changed and taken away since.

    Args:
        export: with content vectors.
        catalog: of the same export; read at every search.
        pictures: whether pictures are asked for and compared.
        other: a modality of the export's content that is compared instead, and the way of what is asked into its space. What was
            added or changed has none, but for pictures.

    Raises:
        ValueError: if the export holds no content vectors, or none of pictures.
    """

    def __init__(
        self, export: Export, catalog: Catalog, pictures: bool = False, other: tuple[str, TextSpace] | None = None
    ) -> None:
        if not export.content:
            raise ValueError("This export holds no content vectors: export again.")
        self.export, self.catalog, self.pictures = export, catalog, pictures
        modality = "image" if pictures else first_modality(export.content)
        if pictures and (
            export.search is None or export.search.picture_space is None or modality not in export.content
        ):
            raise ValueError("This model has no pictures, or none can be asked for: export again with its pictures.")
        alone = pictures or other is not None  # compared by its vectors, without titles, words and an index
        if other is not None:
            modality = other[0]
            if modality not in export.content:
                raise ValueError(f"This model's items have no {modality}: they have {', '.join(export.content)}.")
        self._texts = export.content[modality]
        self._tables = export.search or no_neighbours(len(export.item_ids))
        self._titles = None if alone else self._tables.titles
        self._warm = np.flatnonzero(self._tables.has_neighbours)
        self.space = space_of(export) if modality == "text" else self._tables.picture_space if pictures else None
        if other is not None:
            self.space = other[1]
        self._index = None if alone else index_of(export, self._texts.shape[1])
        self._words: WordIndex | None = None
        self._names: np.ndarray | None = None
        if modality == "image":
            self._changed: ChangedTexts = ChangedPictures(export, catalog, self._texts, self._tables.picture_space)
        elif alone:
            self._changed = NothingChanged(catalog)
        else:
            self._changed = ChangedTexts(export, catalog, self._texts, self.space)

    # ------------------------------------------------------------------ what is searched

    @property
    def words(self) -> WordIndex:
        """The index of words, built when it is first needed."""
        if self._words is None:
            self._words = WordIndex(document(record.title, record.text) for record in self.export.records)
            for row in self._changed.rows:
                self._put_words(row)
        return self._words

    def _put_words(self, row: int) -> None:
        record = self.catalog.records[row]
        if self._words is not None:
            self._words.put(row, document(record.title, record.text))

    @property
    def width(self) -> int:
        """Numbers of an item that a search reads, about."""
        return self._texts.shape[1] * (1 if self._titles is None else 2)

    def warm_up(self) -> None:
        """Build what the first search would build."""
        self._sync()
        _ = self.words, self._hashes

    @property
    def _hashes(self) -> np.ndarray:
        """Hashes of the export's titles and texts, row i at i and N + i."""
        if self._names is None:
            records = self.export.records
            names = [hash(same(record.title)) for record in records]
            names += [hash(same(record.text or record.title)) for record in records]
            self._names = np.array(names, np.int64)
        return self._names

    def named(self, text: str) -> np.ndarray:
        """Rows whose own title or text is this one, int64."""
        wanted = same(text)
        if not wanted:
            return np.zeros(0, np.int64)
        n_base = self.catalog.n_base
        rows = np.unique(np.flatnonzero(self._hashes == hash(wanted)) % max(n_base, 1)).tolist()
        rows += self._changed.rows
        gone = self.catalog.gone()
        records = self.catalog.records
        found = {row for row in rows if wanted in (same(records[row].title), same(records[row].text or ""))}
        return np.array(sorted(found.difference(gone.tolist())), np.int64)

    @property
    def is_behind(self) -> bool:
        """Whether there may be titles among :attr:`untitled`; cheap, and safe from any thread."""
        return self._titles is not None and self._changed.is_behind

    @property
    def untitled(self) -> list[str]:
        """Titles of changed rows whose vectors are to be had by :meth:`put_titles`."""
        self._sync()
        return self._changed.untitled if self._titles is not None else []

    def put_titles(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Give changed rows the vectors of their titles: title to ``[F]`` float32 of the export's encoder."""
        self._changed.put_titles(vectors)

    def _sync(self) -> None:
        for row in self._changed.take_changes():
            self._put_words(row)

    def likeness(
        self, direction: np.ndarray, titles: bool, words: np.ndarray, allowed: np.ndarray | None
    ) -> np.ndarray:
        """The likeness of rows in float32, -inf for those that an index leaves out.

        Args:
            direction: ``[f]`` float32.
            titles: whether titles count beside texts.
            words: ``[N]`` float32 of the query; the rows with the most are candidates too.
            allowed: ``[N]`` bool of rows that may be shown, among which there must be candidates too; ``None`` for all.
        """
        n_base = self.catalog.n_base
        found = np.full(len(self.catalog), -np.inf, np.float32)
        index = self._index
        if index is None:
            found[:n_base] = self.compared(direction, titles, slice(None))
        else:
            rows = self._candidates(index, direction, words[:n_base], None)
            if allowed is not None:
                rows = np.union1d(rows, self._candidates(index, direction, words[:n_base], allowed[:n_base]))
            found[rows] = self.compared(direction, titles, rows)
        changed = self._changed.rows
        if changed:
            texts, names = self._changed.tables()
            fresh = texts @ direction
            if titles and self._titles is not None:
                fresh = np.maximum(fresh, names @ direction - TITLE_DISCOUNT)
            found[changed] = fresh
        return found

    def compared(self, direction: np.ndarray, titles: bool, rows: slice | np.ndarray) -> np.ndarray:
        """The likeness of rows of the export in float32, ``[n]``; arguments as :meth:`likeness`."""
        like: np.ndarray = self._texts[rows] @ direction
        if titles and self._titles is not None:
            like = np.maximum(like, self._titles[rows] @ direction - TITLE_DISCOUNT)
        return like

    @staticmethod
    def _candidates(
        index: SearchIndex, direction: np.ndarray, words: np.ndarray, allowed: np.ndarray | None
    ) -> np.ndarray:
        near = index.near(direction, allowed)
        held = np.flatnonzero(words) if allowed is None else np.flatnonzero((words > 0) & allowed)
        if len(held) > CANDIDATES:
            held = held[top_rows(words[held], CANDIDATES)]
        return np.union1d(near, held)

    def tables(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Directions of the texts and of the titles of rows, ``[n, f]`` float32."""
        base = np.minimum(rows, self.catalog.n_base - 1)
        texts = self._texts[base]
        titles = None if self._titles is None else self._titles[base]
        self._changed.replace(rows, texts, titles)
        return texts, titles

    # ------------------------------------------------------------------ searching

    def text(
        self,
        vector: np.ndarray,
        text: str | None,
        k: int,
        hidden: np.ndarray,
        mask: np.ndarray | None,
        by: str = "both",
    ) -> Found:
        """Search for a text.

        Args:
            vector: ``[F]`` float32 of the export's encoder.
            text: the words; ``None`` where there is a vector alone.
            k: how many rows.
            hidden: rows without a place.
            mask: ``[N]`` bool of rows that may be shown; ``None`` for all.
            by: one of ``BY``.

        Raises:
            ValueError: if the export takes no texts, or the vector is of another encoder.
        """
        if self.space is None:
            raise ValueError("This export maps no texts: its model has no encoder, or no map was fitted.")
        self._sync()
        query = _Query(self, self.space.directions(vector[None])[0], text, None, mask)
        return self._search(query, k, hidden, mask, by)

    def item(self, row: int, k: int, hidden: np.ndarray, mask: np.ndarray | None, by: str = "both") -> Found:
        """Search for what is like an item, itself left out; arguments as :meth:`text`."""
        self._sync()
        direction = self.tables(np.array([row]))[0][0]
        return self._search(_Query(self, direction, None, row, mask), k, np.append(hidden, row), mask, by)

    def _search(self, query: _Query, k: int, hidden: np.ndarray, mask: np.ndarray | None, by: str) -> Found:
        near, weights = self._nearest(query)
        bought, taste, links = self._taste(query, near, weights)
        left_out = bought[query.rough[bought] == -np.inf]
        if len(left_out):  # by an index of candidates
            query.rough[left_out] = self.compared(query.direction, query.item is None, left_out)
            query.rough[left_out] += np.float32(WORDS) * query.words[left_out]
        alpha = TASTE_OF_TEXT if query.item is None else TASTE_OF_ITEM
        share = {"both": alpha, "likeness": 0.0, "chance": 1.0}[by]
        allowed = np.ones(query.n_rows, bool) if mask is None else mask.copy()
        allowed[hidden] = False
        allowed[query.gone] = False
        masked = np.where(allowed, query.rough, np.float32(-np.inf))
        wanted = min(k, int(allowed.sum()))
        if self._index is not None and int((masked > -np.inf).sum()) < wanted:  # many are excluded, or k is large
            masked = np.where(allowed, query.whole(), np.float32(-np.inf))
        rows = np.union1d(top_rows(masked, min(k + MARGIN, query.n_rows)), bought[allowed[bought]])
        t = np.zeros(len(rows))
        at = np.searchsorted(rows, bought)
        here = (at < len(rows)) & (rows[np.minimum(at, len(rows) - 1)] == bought) if len(rows) else at < 0
        t[at[here]] = taste[here]
        y = np.exp((query.rough[rows].astype(np.float64) - query.top) / TEMPERATURE) * (by != "chance")
        # in float64 for those that may come in alone; equal scores by L
        chosen = best(rows, y + share * t + 1e-9 * query.rough[rows], k + MARGIN)
        rows, t = rows[chosen], t[chosen]
        L = query.exact(rows)
        y = np.exp((L - query.top) / TEMPERATURE) * (by != "chance")
        order = np.lexsort((rows, -L, -(y + share * t)))[:k]
        rows, y, t = rows[order], y[order], share * t[order]
        words = WORDS * query.words[rows].astype(np.float64)
        meaning = np.maximum(query.likeness(rows), 0.0)
        of_words = np.divide(words, words + meaning, out=np.zeros(len(rows)), where=words > 0)
        links = Links(links.source, links.target, share * links.adds)
        return Found(rows, y + t, y * (1 - of_words), y * of_words, t, links)

    def _nearest(self, query: _Query) -> tuple[np.ndarray, np.ndarray]:
        """The likest rows that have neighbours, and their weights relative to the first."""
        values = query.rough[self._warm]
        at = top_rows(values, min(NEAREST, len(values))) if len(values) else np.zeros(0, np.int64)
        rows = self._warm[at]
        rows = rows[best(rows, values[at], NEAREST)]
        if not len(rows):
            return rows, np.zeros(0)
        L = query.exact(rows)
        return rows, np.exp((L - L.max()) / TEMPERATURE)

    def _taste(self, query: _Query, near: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, Links]:
        """Rows with a positive t, ascending, their t, and what it is made of."""
        starts, stops = self._tables.offsets[near], self._tables.offsets[near + 1]
        sizes = stops - starts
        at = np.repeat(starts - np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes) + np.arange(sizes.sum())
        target = self._tables.items[at].astype(np.int64)
        adds = np.repeat(weights, sizes) * self._tables.shares[at].astype(np.float64)
        source = np.repeat(near, sizes)
        moved = self.catalog.successor
        if moved:
            target = np.array([moved.get(row, row) for row in target.tolist()], np.int64)
        live = ~np.isin(target, query.gone)
        source, target, adds = source[live], target[live], adds[live]
        rows, inverse = np.unique(target, return_inverse=True)
        sums = np.bincount(inverse, adds, minlength=len(rows))
        largest = sums.max(initial=0.0)
        if largest > 0:
            sums, adds = sums / largest, adds / largest
        return rows, sums, Links(source, target, adds)


def check_by(by: str) -> None:
    """Refuse an unknown way to rank.

    Raises:
        ValueError: naming the known ones.
    """
    if by not in BY:
        raise ValueError(f"by is {by!r}; expected one of {', '.join(BY)}.")


def document(title: str, text: str | None) -> str:
    """What an item's words are looked for in: its text, with the title in front where it is no part of it."""
    if not text:
        return title
    return text if same(title) in same(text) else f"{title} {text}"
