"""Searches of an export as answers, with what each score is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from logging import getLogger

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.retrieval.alike import alike
from recbole_llm.retrieval.answers import Parts, Reason, Recommendation, Recommended
from recbole_llm.retrieval.exact import Hits
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.reranking import Subject, reranked, short_note, subject_name
from recbole_llm.retrieval.rules import NO_RULES, Rules
from recbole_llm.retrieval.search import Found, Search

log = getLogger(__name__)
_NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class Asked:
    """A text that is searched for.

    Attributes:
        vector: ``[F]`` float32 of the export's encoder, of texts or of pictures as the search.
        text: its words; ``None`` where there is a vector alone.
        by: one of :data:`recbole_llm.retrieval.search.BY`.
        explain: reasons per item.
    """

    vector: np.ndarray
    text: str | None = None
    by: str = "both"
    explain: int = 0


class Searches:
    """Answers searches for texts, and for what is like an item.

    Args:
        search: of an export.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self._catalog = search.catalog

    @property
    def takes_texts(self) -> bool:
        """Whether texts can be searched for."""
        return self.search.space is not None

    @property
    def is_behind(self) -> bool:
        """Whether there may be titles among :attr:`untitled`; cheap, and safe from any thread."""
        return self.takes_texts and self.search.is_behind

    @property
    def untitled(self) -> list[str]:
        """Titles of items that changed since the export, whose vectors a search for texts needs."""
        return self.search.untitled if self.takes_texts else []

    def put_titles(self, vectors: Mapping[str, np.ndarray]) -> None:
        """Take vectors ``[F]`` float32 of titles that are ``untitled``."""
        self.search.put_titles(vectors)

    @property
    def width(self) -> int:
        """Numbers of an item that a search reads, about."""
        return self.search.width

    def warm_up(self) -> None:
        """Build what the first search for a text would build."""
        if self.takes_texts:
            self.search.warm_up()

    def text(
        self, asked: Asked, k: int, hidden: np.ndarray, mask: np.ndarray | None, rules: Rules = NO_RULES
    ) -> Recommendation:
        """Answer a text; arguments as :meth:`Search.text`.

        Args:
            asked: the text.
            k: how many items.
            hidden: rows without a place.
            mask: ``[N]`` bool of rows that may be shown; ``None`` for all.
            rules: what else decides about the list; its conditions are in ``hidden`` and ``mask`` already.
        """
        subject = Subject(_NO_ROWS, np.zeros(0), None, subject_name(None, None, asked.vector))
        search = partial(self.search.text, asked.vector, asked.text)
        return self._answer(
            "picture" if self.search.pictures else "text",
            search,
            asked.by,
            asked.explain,
            k,
            hidden,
            mask,
            rules,
            subject,
        )

    def similar(
        self,
        row: int,
        k: int,
        hidden: np.ndarray,
        mask: np.ndarray | None,
        by: str,
        explain: int,
        rules: Rules = NO_RULES,
    ) -> Recommendation:
        """Answer with what is like an item; arguments as :meth:`Search.item`, with reasons per item, and rules as of a text.

        What a rule reads of a history it reads of that item.
        """
        subject = Subject(np.array([row]), np.ones(1), None, subject_name(None, [self._catalog.ids[row]]))
        search = partial(self.search.item, row)
        return self._answer("similar", search, by, explain, k, np.append(hidden, row), mask, rules, subject)

    def _answer(
        self,
        source: str,
        search: Callable[..., Found],
        by: str,
        explain: int,
        k: int,
        hidden: np.ndarray,
        mask: np.ndarray | None,
        rules: Rules,
        subject: Subject,
    ) -> Recommendation:
        """The best of a search, by rules where there are some that change the order."""
        if not rules.rerank:
            found = search(k, hidden, mask, by)
            items = [self._item(found, at, explain) for at in range(len(found.rows))]
            return Recommendation(tuple(items), source, note=short_note(len(items), k))
        place: dict[int, tuple[Found, int]] = {}

        def hits(n: int, hidden: np.ndarray, allow: np.ndarray | None) -> Hits:
            found = search(n, hidden, allow, by)
            place.update((row, (found, at)) for at, row in enumerate(found.rows.tolist()))
            return Hits(found.rows, found.scores)

        chosen = reranked(rules, k, self._catalog, hits, hidden, mask, subject)
        items = [self._item(*place[row], explain) for row in chosen.rows.tolist()]
        return Recommendation(chosen.told(items), source, note=chosen.note)

    def _item(self, found: Found, at: int, explain: int) -> Recommended:
        catalog, row, score = self._catalog, int(found.rows[at]), float(found.scores[at])
        title, cold = catalog.records[row].title, catalog.is_cold(row)
        if not explain:
            return Recommended(catalog.ids[row], title, score, cold)
        near, added = found.links.of(row, explain if found.taste[at] > 0 else 0)
        shared = alike(self.search.export.content, row, near.tolist(), catalog.unpainted)
        reasons = tuple(
            Reason(catalog.ids[one], catalog.records[one].title, value, cosines)
            for one, value, cosines in zip(near.tolist(), added.tolist(), shared, strict=True)
        )
        parts = Parts(float(found.likeness[at]), float(found.words[at]), float(found.taste[at]))
        rest = score - float(added.sum())
        return Recommended(catalog.ids[row], title, score, cold, None, reasons, rest, 0.0, parts=parts)


def picture_searches_of(export: Export, catalog: Catalog) -> Searches | None:
    """Searches for pictures; ``None`` where the export cannot be asked for any."""
    has_space = export.search is not None and export.search.picture_space is not None
    return Searches(Search(export, catalog, pictures=True)) if has_space else None


def searches_of(export: Export, catalog: Catalog) -> Searches | None:
    """The searches of an export; ``None``, said in the log, where it holds no content vectors."""
    if export.content:
        return Searches(Search(export, catalog))
    log.info(
        "This export holds no content vectors: a text stands for an item that the user likes, and likeness is by taste."
    )
    return None
