"""Users of an export by their id, and what their histories hold."""

from dataclasses import dataclass

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.retrieval.item_catalog import Catalog


@dataclass(frozen=True)
class UserState:
    """A user and the newest part of the history.

    Attributes:
        id: external id.
        interactions: items of the whole history.
        ordered: whether the export knows the order of the history.
        items: id and title of at most as many items as were asked for; the newest first where ``ordered``.
    """

    id: str
    interactions: int
    ordered: bool
    items: tuple[tuple[str, str], ...]


class Users:
    """Look users up.

    Args:
        export: the model.
        catalog: names the items of histories, as they are called today.
    """

    def __init__(self, export: Export, catalog: Catalog) -> None:
        self._export = export
        self._catalog = catalog
        self._row = {user_id: row for row, user_id in enumerate(export.user_ids)}
        self._bare: dict[str, int] | None = None

    def find(self, user_id: str, limit: int) -> UserState | None:
        """Find the user of an id, or of the same id with other leading zeros, which spreadsheets drop.

        Args:
            user_id: as it was typed.
            limit: items of the history.

        Returns:
            ``None`` where no user has that id, and where leading zeros leave more than one.
        """
        row = self._row.get(user_id)
        if row is None:
            if self._bare is None:
                self._bare = {}
                for known, at in self._row.items():
                    bare = known.lstrip("0")
                    self._bare[bare] = -1 if bare in self._bare else at
            row = self._bare.get(user_id.lstrip("0"), -1)
        return None if row < 0 else self._state(row, limit)

    def _state(self, row: int, limit: int) -> UserState:
        export = self._export
        span = slice(*export.history_offsets[row : row + 2].tolist())
        items = np.asarray(export.history_items[span])
        ordered = export.history_rank is not None
        if export.history_rank is not None:
            items = items[np.argsort(export.history_rank[span], kind="stable")]
        named = tuple((self._catalog.ids[item], self._catalog.records[item].title) for item in items[:limit].tolist())
        return UserState(export.user_ids[row], len(items), ordered, named)
