"""The items as they stand: an export plus what was added, changed and taken away since.

The export's tables stay untouched in their mapped file; new rows go into a second, growable segment. A row that may not
be recommended has bias -inf. One thread writes (the one that scores); every reader on that thread sees whole changes.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_llm.export.errors import UnknownItemError
from recbole_llm.export.reader import Export, ItemRecord
from recbole_llm.retrieval.exact import Segment
from recbole_llm.retrieval.filters import AttributeIndex

MAX_CACHED_MASKS = 256
MAX_MASK_BYTES = 32 << 20  # of all of them together
GROWTH = 1.5


@dataclass(frozen=True, eq=False)
class MappedItem:
    """Vectors of one item made from its text: target ``[D]``, source ``[D]`` float32, and bias."""

    vector: np.ndarray
    source: np.ndarray
    bias: float


@dataclass(frozen=True)
class ItemState:
    """An item as the API shows it.

    Attributes:
        id: external id.
        row: its row.
        record: title, text, attributes.
        cold: whether its vectors come from its text alone.
        added_at: ISO time of the last change through the service; ``None`` for the export's own state.
    """

    id: str
    row: int
    record: ItemRecord
    cold: bool
    added_at: str | None


class Catalog:
    """Items by id and row.

    Rows are never reused or moved: histories and answers may hold them. A warm item that is fitted anew from its text
    gets a new row; its old one stays as what histories are made of and is never recommended again.

    Args:
        export: the model.
    """

    def __init__(self, export: Export) -> None:
        self.export = export
        self.n_base = len(export.item_ids)
        self.ids = list(export.item_ids)
        self.row_of = {item_id: row for row, item_id in enumerate(self.ids)}
        self.records: list[ItemRecord] = list(export.records)
        self.added_at: dict[int, str] = {}
        self.successor: dict[int, int] = {}
        self._listed_bias = np.where(export.listed, export.bias, np.float32(-np.inf))
        self._base_bias = self._listed_bias.copy()
        self._trained = export.trained
        self._vector = np.empty((0, export.manifest.dim), np.float32)
        self._source = np.empty((0, export.manifest.dim), np.float32)
        self._bias = np.empty(0, np.float32)
        self._true_bias = np.empty(0, np.float32)
        self._attributes = AttributeIndex(export.manifest.attributes, [record.attributes for record in self.records])
        self._summaries: dict[int, dict[str, dict[str, Any]]] = {}
        self._masks: OrderedDict[bytes, np.ndarray] = OrderedDict()
        self.version = 0  # of the contents: any change

    def __len__(self) -> int:
        """Rows, dead ones included."""
        return len(self.ids)

    @property
    def live_count(self) -> int:
        """Items that can be recommended."""
        return sum(int((segment.bias > -np.inf).sum()) for segment in self.segments())

    def counts(self) -> dict[str, int]:
        """Items by kind: warm, cold, unlisted (the model does not rank them), deleted."""
        live = np.concatenate([segment.bias > -np.inf for segment in self.segments()])
        warm = live & np.concatenate([self._trained, np.zeros(len(self) - self.n_base, bool)])
        unlisted = int((~self.export.listed).sum()) - sum(not self.export.listed[row] for row in self.successor)
        gone = len(self) - int(live.sum()) - len(self.successor) - unlisted
        return {
            "warm": int(warm.sum()),
            "cold": int(live.sum()) - int(warm.sum()),
            "unlisted": unlisted,
            "deleted": gone,
        }

    def segments(self) -> list[Segment]:
        """The tables a retriever scores."""
        added = len(self) - self.n_base
        base = Segment(0, self.export.vector, self._base_bias)
        return [base, Segment(self.n_base, self._vector[:added], self._bias[:added])] if added else [base]

    def row(self, item_id: str) -> int:
        """The live row of an item.

        Raises:
            UnknownItemError: if there is none.
        """
        row = self.row_of.get(item_id)
        if row is None or not self.is_live(row):
            raise UnknownItemError(item_id)
        return row

    def is_live(self, row: int) -> bool:
        """Whether the row can be recommended."""
        bias = self._base_bias[row] if row < self.n_base else self._bias[row - self.n_base]
        return bool(bias > -np.inf)

    def is_cold(self, row: int) -> bool:
        """Whether the row's vectors come from text alone."""
        return row >= self.n_base or not self._trained[row]

    def new_items(self) -> np.ndarray:
        """Rows whose vectors come from text alone, ``[N]`` bool."""
        return np.concatenate([~self._trained, np.ones(len(self) - self.n_base, bool)])

    def needs_text(self, item_id: str) -> bool:
        """Whether the item has no vectors of its own to be recommended by: it is new, or the model does not rank it."""
        row = self.row_of.get(item_id)
        return row is None or (row < self.n_base and not self.export.listed[row])

    def state(self, row: int) -> ItemState:
        """What is known of a row."""
        return ItemState(self.ids[row], row, self.records[row], self.is_cold(row), self.added_at.get(row))

    def vector(self, rows: np.ndarray) -> np.ndarray:
        """Target vectors of rows, ``[n, D]`` float32."""
        return self._rows(self.export.vector, self._vector, rows)

    def source(self, rows: np.ndarray) -> np.ndarray:
        """Source vectors of rows, ``[n, D]`` float32."""
        return self._rows(self.export.source, self._source, rows)

    def bias(self, rows: np.ndarray) -> np.ndarray:
        """Biases of rows, ``[n]`` float32."""
        return self._rows(self._base_bias, self._bias, rows)

    def _rows(self, base: np.ndarray, added: np.ndarray, rows: np.ndarray) -> np.ndarray:
        if len(self) == self.n_base:
            return base[rows]
        fresh = rows >= self.n_base
        if not fresh.any():
            return base[rows]
        result = np.empty((len(rows), *base.shape[1:]), np.float32)
        result[~fresh] = base[rows[~fresh]]
        result[fresh] = added[rows[fresh] - self.n_base]
        return result

    def put(
        self,
        item_id: str,
        record: ItemRecord,
        mapped: MappedItem | None,
        *,
        refit: bool = False,
        time: str | None = None,
    ) -> bool:
        """Add an item or change it; a deleted one comes back.

        A warm item keeps its trained vectors unless ``refit``.

        Args:
            item_id: external id.
            record: what replaces its record.
            mapped: vectors of its text; ``None`` to leave an item's vectors as they are.
            refit: give a warm item the vectors of its text.
            time: ISO time for ``added_at``.

        Returns:
            Whether there was no live item of that id.

        Raises:
            UnknownItemError: if the id is new and ``mapped`` is ``None``.
        """
        row = self.row_of.get(item_id)
        created = row is None or not self.is_live(row)
        if row is None:
            if mapped is None:
                raise UnknownItemError(item_id)
            row = self._append(item_id, record, mapped)
        elif mapped is not None and row < self.n_base and (refit or not self._trained[row]):
            old, row = row, self._append(item_id, record, mapped)
            self._base_bias[old] = -np.inf
            self.successor[old] = row
        elif mapped is not None and row >= self.n_base:
            self._write(row, mapped)
        elif row < self.n_base:
            self._base_bias[row] = self._listed_bias[row]
        else:
            self._bias[row - self.n_base] = self._true_bias[row - self.n_base]
        self.records[row] = record
        self._attributes.put(row, record.attributes)
        if time is not None:
            self.added_at[row] = time
        self._changed()
        return created

    def delete(self, item_id: str) -> bool:
        """Take an item out of every answer; histories keep it. Returns whether it was live.

        Raises:
            UnknownItemError: if no item ever had this id.
        """
        row = self.row_of.get(item_id)
        if row is None:
            raise UnknownItemError(item_id)
        live = self.is_live(row)
        if row < self.n_base:
            self._base_bias[row] = -np.inf
        else:
            self._bias[row - self.n_base] = -np.inf
        self._changed()
        return live

    def _append(self, item_id: str, record: ItemRecord, mapped: MappedItem) -> int:
        added = len(self) - self.n_base
        if added == len(self._bias):
            capacity = max(int(added * GROWTH), added + 64)
            for name in ("_vector", "_source", "_bias", "_true_bias"):
                old = getattr(self, name)
                grown = np.empty((capacity, *old.shape[1:]), np.float32)
                grown[:added] = old[:added]
                setattr(self, name, grown)
        row = len(self)
        self.ids.append(item_id)
        self.records.append(record)
        self.row_of[item_id] = row
        self._write(row, mapped)
        return row

    def _write(self, row: int, mapped: MappedItem) -> None:
        at = row - self.n_base
        self._vector[at], self._source[at] = mapped.vector, mapped.source
        self._bias[at] = self._true_bias[at] = mapped.bias

    def _changed(self) -> None:
        self.version += 1
        self._masks.clear()

    def mask(self, condition: Mapping[str, Any]) -> np.ndarray | None:
        """Rows that a filter allows, ``[N]`` bool; ``None`` for an empty filter.

        Raises:
            ValueError: on an unknown attribute or a condition that does not fit its kind; lists what is known.
        """
        if not condition:
            return None
        # not the condition itself: that may be as long as a body
        key = hashlib.sha256(repr(sorted(condition.items())).encode("utf-8", "surrogatepass")).digest()
        mask = self._masks.get(key)
        if mask is None:
            mask = self._masks[key] = self._attributes.mask(condition, len(self))
            while len(self._masks) > min(MAX_CACHED_MASKS, max(MAX_MASK_BYTES // len(self), 1)):
                self._masks.popitem(last=False)
        else:
            self._masks.move_to_end(key)
        return mask

    def attributes(self, limit: int) -> dict[str, dict[str, Any]]:
        """What filters can ask for, of :meth:`AttributeIndex.summary`; made once for each ``limit``."""
        summary = self._summaries.get(limit)
        if summary is None:
            summary = self._summaries[limit] = self._attributes.summary(limit)
        return summary

    def find(self, text: str, limit: int) -> list[ItemState]:
        """Live items whose title holds ``text`` (case folded): those that begin with it first, then by row."""
        wanted = text.casefold()
        starts: list[int] = []
        holds: list[int] = []
        for row, record in enumerate(self.records):
            title = record.title.casefold()
            at = title.find(wanted)
            if at < 0 or not self.is_live(row):
                continue
            (holds if at else starts).append(row)
            if len(starts) == limit:
                break
        return [self.state(row) for row in (starts + holds)[:limit]]
