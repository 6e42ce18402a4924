"""What a search takes from an export, and what stands in for it in older ones."""

from collections.abc import Iterable
from logging import getLogger

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.reader import Export
from recbole_llm.export.search_tables import SearchTables, TextSpace
from recbole_llm.retrieval.changed_texts import ChangedTexts
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.search_index import SearchIndex

log = getLogger("recbole_llm.retrieval.search")


def first_modality(content: Iterable[str]) -> str:
    """Choose what items are compared by where nothing else is said: texts, else what has an encoder, else a column.

    Example:
        >>> first_modality(["column_brand", "image"])
        'image'
    """
    return min(content, key=lambda name: (name != "text", name.startswith("column_"), name))


def no_neighbours(n_items: int) -> SearchTables:
    """Return the tables of an export that was written before there were any, and say what that costs."""
    log.warning(
        "This export was written before searches knew taste: texts and similar items are ranked by likeness alone. Export again."
    )
    return SearchTables(np.zeros(n_items + 1, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))


def index_of(export: Export, width: int) -> SearchIndex | None:
    """Open an export's index of texts of ``width`` numbers; ``None`` where there is none, or what it needs is not installed."""
    if export.search_index is None:
        return None
    try:
        return SearchIndex(export.search_index, len(export.item_ids), width)
    except ValueError as error:
        if isinstance(error, ExportError):
            raise
        log.warning("%s Until then searches compare every item: slower.", error)
        return None


def space_of(export: Export) -> TextSpace | None:
    """Return how texts come to the content vectors; older exports know it from the map of new items."""
    if export.search is not None:
        return export.search.space
    text_map = export.text_map
    return None if text_map is None else TextSpace(text_map.center, text_map.transform)


class NothingChanged(ChangedTexts):
    """Of pictures and sounds: items that were added since the export have none, and changed ones keep theirs."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    @property
    def rows(self) -> list[int]:
        """None."""
        return []

    def take_changes(self) -> list[int]:
        """Leave what changed to the search for texts."""
        return []

    @property
    def is_behind(self) -> bool:
        """Never."""
        return False

    @property
    def untitled(self) -> list[str]:
        """None."""
        return []

    def replace(self, rows: np.ndarray, texts: np.ndarray, titles: np.ndarray | None) -> None:
        """Write zeros for rows that were added, in place."""
        texts[rows >= self._catalog.n_base] = 0.0
