"""The live catalogue: an export plus the items added, changed and deleted since.

The export's tables stay untouched in their mapped file; new rows go into a second, growable segment. A row that may not
be recommended has bias -inf. One thread writes (the one that scores); every reader on that thread sees whole changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from recbole_llm.export.errors import UnknownItemError
from recbole_llm.export.reader import Export, ItemRecord
from recbole_llm.retrieval.exact import Segment
from recbole_llm.retrieval.filters import AttributeIndex
from recbole_llm.retrieval.kept import Kept, key_of
from recbole_llm.retrieval.value_codes import ValueCodes

MAX_CACHED_MASKS = 256
MAX_MASK_BYTES = 32 << 20  # of all of them together
MAX_PREPARED = 64  # rules of requests
MAX_PREPARED_BYTES = 64 << 20  # likewise
GROWTH = 1.5


@dataclass(frozen=True, eq=False)
class MappedItem:
    """Vectors of one item made from its content: target ``[D]``, source ``[D]`` float32, bias; of a new text its own ``[F]``."""

    vector: np.ndarray
    source: np.ndarray
    bias: float
    text: np.ndarray | None = None


@dataclass(frozen=True)
class ItemState:
    """An item as the API shows it.

    Attributes:
        id: external id.
        row: its row.
        record: title, text, attributes.
        cold: whether its vectors come from its text alone.
        added_at: ISO time of the last change through the service; ``None`` for the export's own state.
        image: whether there is a small picture of it.
    """

    id: str
    row: int
    record: ItemRecord
    cold: bool
    added_at: str | None
    image: bool = False


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
        self.text_vectors: dict[int, np.ndarray] = {}  # raw ones, of rows whose text was changed or added
        self.picture_vectors: dict[int, np.ndarray] = {}  # likewise of pictures
        self.touched: dict[int, None] = {}  # rows that changed since a search for texts last looked
        self.repainted: list[int] = []  # rows whose picture changed, in order; searches remember how far they have read
        self.thumbnails: dict[int, bytes] = {}  # of rows whose picture was changed or added
        self.unpainted: set[int] = set()  # rows whose picture was taken away, that of the export too
        self._origin: dict[int, int] = {}  # row that took the place of a row of the export -> that row
        self._gone: set[int] = set()  # deleted, or another row took their place
        self._listed_bias = np.where(export.listed, export.bias, np.float32(-np.inf))
        self._base_bias = self._listed_bias.copy()
        self._trained = export.trained
        self._vector = np.empty((0, export.manifest.dim), np.float32)
        self._source = np.empty((0, export.manifest.dim), np.float32)
        self._bias = np.empty(0, np.float32)
        self._true_bias = np.empty(0, np.float32)
        self._attributes = AttributeIndex(export.manifest.attributes, [record.attributes for record in self.records])
        self._summaries: dict[int, dict[str, dict[str, Any]]] = {}
        self._masks: Kept[np.ndarray] = Kept(MAX_CACHED_MASKS, MAX_MASK_BYTES)
        self._codes: dict[str, ValueCodes] = {}
        self._live: np.ndarray | None = None
        self.kept: Kept[Any] = Kept(MAX_PREPARED, MAX_PREPARED_BYTES)  # what rules make of this state of the catalogue
        self.version = 0  # of the contents: any change

    def __len__(self) -> int:
        """Rows, dead ones included."""
        return len(self.ids)

    @property
    def live_count(self) -> int:
        """Items that can be recommended."""
        return sum(int((segment.bias > -np.inf).sum()) for segment in self.segments())

    def counts(self) -> dict[str, int]:
        """Count items by kind: warm, cold, unlisted (the model does not rank them), deleted."""
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
        """Return the tables that a retriever scores."""
        added = len(self) - self.n_base
        base = Segment(0, self.export.vector, self._base_bias)
        return [base, Segment(self.n_base, self._vector[:added], self._bias[:added])] if added else [base]

    def row(self, item_id: str) -> int:
        """Return the live row of an item.

        Raises:
            UnknownItemError: if there is none.
        """
        row = self.row_of.get(item_id)
        if row is None or not self.is_live(row):
            raise UnknownItemError(item_id)
        return row

    def base_of(self, row: int) -> int | None:
        """The row of the export that is this item, ``None`` for one that was added since."""
        return row if row < self.n_base else self._origin.get(row)

    def thumbnail(self, row: int) -> bytes | None:
        """The small picture of a row, a JPEG."""
        base, table = None if row in self.unpainted else self.base_of(row), self.export.thumbnails
        return self.thumbnails.get(row) or (None if base is None or table is None else table.of(base))

    def has_thumbnail(self, row: int) -> bool:
        """Return whether there is a small picture of a row."""
        base, table = None if row in self.unpainted else self.base_of(row), self.export.thumbnails
        return row in self.thumbnails or (base is not None and table is not None and table.has(base))

    def has_picture(self, row: int) -> bool:
        """Return whether a picture of a row is known, by its vector or a small copy."""
        base, known = None if row in self.unpainted else self.base_of(row), self.export.content.get("image")
        of_export = base is not None and known is not None and bool(known[base].any())
        return of_export or row in self.picture_vectors or self.has_thumbnail(row)

    @property
    def has_thumbnails(self) -> bool:
        """Whether there is a small picture of any row."""
        return self.export.thumbnails is not None or bool(self.thumbnails)

    def gone(self) -> np.ndarray:
        """Rows that no answer may show, int64: deleted ones, and those whose place another row took."""
        return np.fromiter(self._gone, np.int64, len(self._gone))

    def shown(self, item_id: str) -> int:
        """The row of an item that a search may show: a live one, or one that the model does not rank.

        Raises:
            UnknownItemError: if there is none.
        """
        row = self.row_of.get(item_id)
        if row is None or row in self._gone:
            raise UnknownItemError(item_id)
        return row

    def is_live(self, row: int) -> bool:
        """Return whether the row can be recommended."""
        bias = self._base_bias[row] if row < self.n_base else self._bias[row - self.n_base]
        return bool(bias > -np.inf)

    def is_cold(self, row: int) -> bool:
        """Return whether the row's vectors come from text alone."""
        return row >= self.n_base or not self._trained[row]

    def new_items(self) -> np.ndarray:
        """Rows whose vectors come from text alone, ``[N]`` bool."""
        return np.concatenate([~self._trained, np.ones(len(self) - self.n_base, bool)])

    def needs_text(self, item_id: str) -> bool:
        """Return whether the item has no vectors of its own: it is new, or the model does not rank it."""
        row = self.row_of.get(item_id)
        return row is None or (row < self.n_base and not self.export.listed[row])

    def state(self, row: int) -> ItemState:
        """Return what is known of a row."""
        return ItemState(
            self.ids[row], row, self.records[row], self.is_cold(row), self.added_at.get(row), self.has_thumbnail(row)
        )

    def vector(self, rows: np.ndarray) -> np.ndarray:
        """Return target vectors of rows, ``[n, D]`` float32."""
        return self._rows(self.export.vector, self._vector, rows)

    def source(self, rows: np.ndarray) -> np.ndarray:
        """Return source vectors of rows, ``[n, D]`` float32."""
        return self._rows(self.export.source, self._source, rows)

    def bias(self, rows: np.ndarray) -> np.ndarray:
        """Return biases of rows, ``[n]`` float32."""
        return self._rows(self._base_bias, self._bias, rows)

    def live(self) -> np.ndarray:
        """Mark the rows that can be recommended, ``[N]`` bool, not to be written to."""
        if self._live is None:
            self._live = np.concatenate([segment.bias > -np.inf for segment in self.segments()])
            self._live.flags.writeable = False
        return self._live

    def values(self, row: int, name: str) -> Sequence[Any]:
        """List the values of a row's attribute, each once; none if it has none."""
        value = self.records[row].attributes.get(name)
        if isinstance(value, str):
            return (value,)
        if isinstance(value, list):
            return value if len(value) < 2 else list(dict.fromkeys(value))
        return () if value is None else (value,)

    def values_of(self, rows: np.ndarray, name: str) -> list[Sequence[Any]]:
        """List what :meth:`values` says of many rows ``[n]`` int64."""
        codes, known = self.codes(rows, name)
        values = known.values
        return [values[code] for code in codes.tolist()]

    def codes(self, rows: np.ndarray, name: str) -> tuple[np.ndarray, ValueCodes]:
        """Number what :meth:`values` says of rows: the numbers ``[n]`` int32, and the values of each number."""
        known = self._codes.get(name)
        if known is None:
            known = self._codes[name] = ValueCodes(partial(self.values, name=name))
        return known.of(rows, len(self)), known

    def rows_with(self, name: str, values: list[Any]) -> np.ndarray:
        """Mark the rows with any of these values of a declared attribute, ``[N]`` bool."""
        return self._attributes.having(name, values, len(self))

    def content(self, rows: np.ndarray) -> np.ndarray:
        """Return the content vectors of rows, by whose cosine items are alike, ``[n, F]`` float32 of length 1.

        Zero where an item has none, as items added since the export: the vectors are centred, so that 0 is the likeness of
        two items drawn at random. With several modalities the cosine is their mean. Of an export without content it is the
        model's target vectors.
        """
        tables = list(self.export.content.values())
        if not tables:
            vectors = self.vector(rows)
            return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))
        if len(tables) == 1 and len(self) == self.n_base and not self.unpainted:
            return tables[0].take(rows, 0)
        base = rows < self.n_base
        found = np.zeros((len(rows), sum(table.shape[1] for table in tables)), np.float32)
        if len(tables) == 1:
            found[base] = tables[0][rows[base]]
        else:
            found[base] = np.concatenate([table[rows[base]] for table in tables], 1) / np.float32(len(tables) ** 0.5)
        if self.unpainted:
            bare = np.isin(rows, list(self.unpainted))
            first = 0
            for name, table in self.export.content.items():
                if name == "image":
                    found[bare, first : first + table.shape[1]] = 0.0
                first += table.shape[1]
        return found

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
        picture: np.ndarray | None = None,
        thumbnail: bytes | None = None,
        without_picture: bool = False,
    ) -> bool:
        """Add an item or change it; a deleted one comes back.

        A warm item keeps its trained vectors unless ``refit``.

        Args:
            item_id: external id.
            record: what replaces its record.
            mapped: vectors of its content; ``None`` to leave an item's vectors as they are.
            refit: give a warm item the vectors of its content.
            time: ISO time for ``added_at``.
            picture: ``[F]`` float32 of the encoder of pictures, by which it is found; ``None`` to leave it as it is.
            thumbnail: a small picture, a JPEG; ``None`` to leave it as it is.
            without_picture: take away what it has of both.

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
            self.successor[old], self._origin[row] = row, old
            self._gone.add(old)
        elif mapped is not None and row >= self.n_base:
            self._write(row, mapped)
        elif row < self.n_base:
            self._base_bias[row] = self._listed_bias[row]
        else:
            self._bias[row - self.n_base] = self._true_bias[row - self.n_base]
        self._gone.discard(row)
        self.records[row] = record
        self.touched[row] = None
        if mapped is not None and mapped.text is not None:
            self.text_vectors[row] = mapped.text
        self._paint(row, picture, thumbnail, without_picture)
        self._attributes.put(row, record.attributes)
        for codes in self._codes.values():
            codes.forget(row)
        if time is not None:
            self.added_at[row] = time
        self._changed()
        return created

    def _paint(self, row: int, picture: np.ndarray | None, thumbnail: bytes | None, without: bool) -> None:
        if without:
            self.unpainted.add(row)
            self.picture_vectors.pop(row, None)
            self.thumbnails.pop(row, None)
        elif picture is not None or thumbnail is not None:
            self.unpainted.discard(row)
        if picture is not None:
            self.picture_vectors[row] = picture
        if without or row in self.picture_vectors or row in self._origin:
            self.repainted.append(row)
        if thumbnail is not None:
            self.thumbnails[row] = thumbnail

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
        self._gone.add(row)
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
        self._live = None
        self._masks.clear()
        self.kept.clear()

    def mask(self, condition: Mapping[str, Any]) -> np.ndarray | None:
        """Mark the rows that a filter allows, ``[N]`` bool; ``None`` for an empty filter.

        Raises:
            ValueError: on an unknown attribute or a condition that does not fit its kind; lists what is known.
        """
        if not condition:
            return None
        key = key_of(condition)
        mask = self._masks.get(key)
        if mask is None:
            mask = self._attributes.mask(condition, len(self))
            self._masks.put(key, mask, mask.nbytes)
        return mask

    def attributes(self, limit: int) -> dict[str, dict[str, Any]]:
        """Say what filters can ask for, as :meth:`AttributeIndex.summary`; made once for each ``limit``."""
        summary = self._summaries.get(limit)
        if summary is None:
            summary = self._summaries[limit] = self._attributes.summary(limit)
        return summary

    def find(self, text: str, limit: int) -> list[ItemState]:
        """Find live items whose title holds ``text`` (case folded).

        Titles that begin with it come first, then the order is by row.
        """
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
