"""Changes to items, and how the tables of a log of changes hold them."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import numpy as np

from recbole_llm.export.thumbnails import jpeg_size

SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False)
class Put:
    """An item to add or change; ``None`` leaves what was there.

    Attributes:
        id: external id.
        title: shown title.
        text: what was encoded.
        attributes: replaces all attributes.
        feature: ``[F]`` float32 vector of the text.
        fingerprint: of the encoder that made ``feature``.
        refit: give a warm item the vectors of its content; stays so.
        picture: ``[F]`` float32 vector of its picture. The picture's own bytes are not kept.
        picture_fingerprint: of the encoder that made ``picture``.
        thumbnail: a small copy of the picture, a JPEG.
        without_picture: take the item's picture away, that of the export too.
    """

    id: str
    title: str | None = None
    text: str | None = None
    attributes: Mapping[str, Any] | None = None
    feature: np.ndarray | None = None
    fingerprint: str | None = None
    refit: bool = False
    picture: np.ndarray | None = None
    picture_fingerprint: str | None = None
    thumbnail: bytes | None = None
    without_picture: bool = False


@dataclass(frozen=True)
class Delete:
    """An item to take out."""

    id: str


@dataclass(frozen=True, eq=False)
class Change:
    """The latest state of an item in the log; fields as in :class:`Put`.

    ``fault`` says what is wrong with a row that cannot be read; nothing else of it is to be used then but ``id`` and ``seq``.
    """

    id: str
    seq: int
    deleted: bool
    title: str | None
    text: str | None
    attributes: Mapping[str, Any] | None
    feature: np.ndarray | None
    fingerprint: str | None
    refit: bool
    updated_at: str
    fault: str | None = None
    picture: np.ndarray | None = None
    picture_fingerprint: str | None = None
    thumbnail: bytes | None = None
    without_picture: bool = False


COLUMNS = "id, seq, deleted, title, text, attributes, feature, encoder_fingerprint, refit, updated_at"
WIDTH = 10  # of them
# a table of its own: logs that were written before there were pictures get it beside theirs
PICTURE_COLUMNS = "id, feature, encoder_fingerprint, thumbnail"
# what stands for the encoder of a picture that was taken away: a row without a vector, which readers of before pass over
TAKEN_AWAY = "none"
SELECT = (
    f"SELECT {', '.join(f'item.{name}' for name in COLUMNS.split(', '))}, picture.feature, picture.encoder_fingerprint, "
    "picture.thumbnail FROM item LEFT JOIN picture ON picture.id = item.id WHERE item.seq > {mark} ORDER BY item.seq"
)
CREATE = (
    """CREATE TABLE IF NOT EXISTS item (
        id TEXT PRIMARY KEY, seq BIGINT NOT NULL UNIQUE, deleted {bool} NOT NULL, title TEXT, text TEXT, attributes TEXT,
        feature {blob}, encoder_fingerprint TEXT, refit {bool} NOT NULL, updated_at TEXT NOT NULL)""",
    """CREATE TABLE IF NOT EXISTS picture (
        id TEXT PRIMARY KEY, feature {blob}, encoder_fingerprint TEXT, thumbnail {blob})""",
    "CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value BIGINT NOT NULL, note TEXT)",
    "INSERT INTO counter (name, value) VALUES ('schema', {version}), ('seq', 0), ('reload', 0) ON CONFLICT DO NOTHING",
)
# a later PUT that leaves a field out keeps it; seq and updated_at always move
UPSERT = """INSERT INTO item ({columns}) VALUES ({marks}) ON CONFLICT (id) DO UPDATE SET
    seq = excluded.seq, deleted = excluded.deleted, title = COALESCE(excluded.title, item.title),
    text = COALESCE(excluded.text, item.text), attributes = COALESCE(excluded.attributes, item.attributes),
    feature = COALESCE(excluded.feature, item.feature),
    encoder_fingerprint = COALESCE(excluded.encoder_fingerprint, item.encoder_fingerprint),
    refit = (excluded.refit OR item.refit), updated_at = excluded.updated_at"""


UPSERT_PICTURE = """INSERT INTO picture ({columns}) VALUES ({marks}) ON CONFLICT (id) DO UPDATE SET
    feature = excluded.feature, encoder_fingerprint = excluded.encoder_fingerprint, thumbnail = excluded.thumbnail"""


def picture_row_of(change: Put | Delete) -> tuple[Any, ...] | None:
    """Lay out a change's picture in the order of ``PICTURE_COLUMNS``; ``None`` for a change without one."""
    if isinstance(change, Delete):
        return None
    if change.without_picture:
        return change.id, None, TAKEN_AWAY, None
    if change.picture is None:
        return None
    return change.id, _bytes_of(change.picture), change.picture_fingerprint, change.thumbnail


def _bytes_of(vector: np.ndarray) -> bytes:
    return np.ascontiguousarray(vector, "<f4").tobytes()


def row_of(change: Put | Delete, seq: int) -> tuple[Any, ...]:
    """Lay out a change in the order of ``COLUMNS``."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    if isinstance(change, Delete):
        return (change.id, seq, True, None, None, None, None, None, False, now)
    attributes = None if change.attributes is None else json.dumps(dict(change.attributes), ensure_ascii=False)
    feature = None if change.feature is None else _bytes_of(change.feature)
    return (
        change.id, seq, False, change.title, change.text, attributes, feature, change.fingerprint, change.refit, now,
    )  # fmt: skip


def changes_of(rows: Iterable[Sequence[Any]]) -> list[Change]:
    """Reverse :func:`row_of` and :func:`picture_row_of`; a row that something else damaged becomes a change with a ``fault``.

    Args:
        rows: in the order of ``SELECT``.
    """
    changes = []
    for row in rows:
        try:
            changes.append(_change_of(row))
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            item_id = row[0] if isinstance(row[0], str) else repr(row[0])
            seq = row[1] if isinstance(row[1], int) else 0
            changes.append(
                Change(
                    item_id, seq, False, None, None, None, None, None, False, "", fault=str(error)[:200] or "unreadable"
                )
            )
    return changes


def _change_of(row: Sequence[Any]) -> Change:
    item_id, seq, deleted, *fields, refit, updated_at = row[:WIDTH]
    if not isinstance(item_id, str) or not item_id:
        raise ValueError("the id is no text")
    if type(seq) is not int or seq < 1:
        raise ValueError("seq is no number of a change")
    if not isinstance(updated_at, str):
        raise ValueError("updated_at is no text")
    try:
        title, text, attributes, feature, fingerprint = _fields_of(*fields)
        picture = _picture_of(*row[WIDTH:])
    except (ValueError, TypeError, RecursionError):
        if not deleted:
            raise
        title = text = attributes = feature = fingerprint = None  # of what is out, nothing else is used
        picture = None, None, None
    without = picture[0] is None and picture[1] == TAKEN_AWAY
    return Change(
        item_id, seq, bool(deleted), title, text, attributes, feature, fingerprint, bool(refit), updated_at, None, *picture, without
    )  # fmt: skip


def _picture_of(feature: Any, fingerprint: Any, thumbnail: Any) -> tuple[np.ndarray | None, str | None, bytes | None]:
    if not isinstance(fingerprint, str | None):
        raise ValueError("the encoder_fingerprint of the picture is no text")
    small = None if thumbnail is None else bytes(thumbnail)
    if small is not None:
        jpeg_size(small)
    return _vector_of(feature), fingerprint, small


def _vector_of(feature: Any) -> np.ndarray | None:
    if feature is None:
        return None
    vector = np.frombuffer(feature, "<f4").astype(np.float32)
    if not np.isfinite(vector).all():
        raise ValueError("the feature holds NaN or infinity")
    return vector


def _fields_of(title: Any, text: Any, attributes: Any, feature: Any, fingerprint: Any) -> tuple[Any, ...]:
    for name, value in (("title", title), ("text", text), ("encoder_fingerprint", fingerprint)):
        if not isinstance(value, str | None):
            raise ValueError(f"{name} is no text")
    return title, text, _attributes_of(attributes), _vector_of(feature), fingerprint


def _attributes_of(text: Any) -> dict[str, Any] | None:
    if text is None:
        return None
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the attributes are no JSON ({error})") from None
    if not isinstance(values, dict) or not all(map(_is_attribute, values.values())):
        raise ValueError("the attributes are no object of texts, numbers and lists of texts")
    json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is no text
    return values


def _is_attribute(value: Any) -> bool:
    if isinstance(value, list):
        return all(isinstance(part, str) for part in value)
    return isinstance(value, str) or (type(value) in (int, float) and math.isfinite(value))
