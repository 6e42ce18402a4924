"""The log of changes to the catalogue: what was put and deleted since the export, kept across kills and exports.

One row per item holds its latest state; ``seq`` rises with every change, in the order of commits, so a reader that has
applied everything up to a ``seq`` asks for what came after it.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import numpy as np

SCHEMA_VERSION = 1
FILE_NAME = "overlay.sqlite3"
BUSY_SECONDS = 5.0


class OverlayError(RuntimeError):
    """The log could not be written or read: disk full, no permission, server gone."""


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
        refit: give a warm item the vectors of its text; stays so.
    """

    id: str
    title: str | None = None
    text: str | None = None
    attributes: Mapping[str, Any] | None = None
    feature: np.ndarray | None = None
    fingerprint: str | None = None
    refit: bool = False


@dataclass(frozen=True)
class Delete:
    """An item to take out."""

    id: str


@dataclass(frozen=True, eq=False)
class Change:
    """The latest state of an item in the log; fields as in :class:`Put`."""

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


class Overlay(Protocol):
    """The log. Used from one thread at a time."""

    def write(self, changes: Sequence[Put | Delete]) -> list[int]:
        """Commit changes in one transaction; the seq of each. On return they survive a kill."""

    def since(self, seq: int) -> list[Change]:
        """Changes after ``seq``, ascending."""

    def knows(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that have a row, deleted or not."""

    def last_seq(self) -> int:
        """Seq of the last commit, 0 for none."""

    def ask_reload(self, export: str | None) -> int:
        """Tell every process to load an export (``None``: the newest); returns the number of the request."""

    def reload_asked(self) -> tuple[int, str | None]:
        """Number of the last such request, 0 for none, and its export."""

    def close(self) -> None:
        """Let go of the database."""


COLUMNS = "id, seq, deleted, title, text, attributes, feature, encoder_fingerprint, refit, updated_at"
CREATE = (
    """CREATE TABLE IF NOT EXISTS item (
        id TEXT PRIMARY KEY, seq BIGINT NOT NULL UNIQUE, deleted {bool} NOT NULL, title TEXT, text TEXT, attributes TEXT,
        feature {blob}, encoder_fingerprint TEXT, refit {bool} NOT NULL, updated_at TEXT NOT NULL)""",
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


def row_of(change: Put | Delete, seq: int) -> tuple[Any, ...]:
    """A change in the order of ``COLUMNS``."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    if isinstance(change, Delete):
        return (change.id, seq, True, None, None, None, None, None, False, now)
    attributes = None if change.attributes is None else json.dumps(dict(change.attributes), ensure_ascii=False)
    feature = None if change.feature is None else np.ascontiguousarray(change.feature, "<f4").tobytes()
    return (
        change.id, seq, False, change.title, change.text, attributes, feature, change.fingerprint, change.refit, now,
    )  # fmt: skip


def change_of(row: Sequence[Any]) -> Change:
    """The reverse of :func:`row_of`."""
    item_id, seq, deleted, title, text, attributes, feature, fingerprint, refit, updated_at = row
    return Change(
        item_id,
        int(seq),
        bool(deleted),
        title,
        text,
        None if attributes is None else json.loads(attributes),
        None if feature is None else np.frombuffer(feature, "<f4").astype(np.float32),
        fingerprint,
        bool(refit),
        updated_at,
    )


class SqliteOverlay:
    """The log in one SQLite file, for the processes of one machine: WAL, and every commit reaches the disk.

    Args:
        folder: made if it is missing; the file in it is ``overlay.sqlite3``.

    Raises:
        OverlayError: if the file cannot be opened or is of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE_NAME
        with _as_overlay_error(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._run("PRAGMA journal_mode=WAL")
            self._run("PRAGMA synchronous=FULL")
            with self._transaction():
                for statement in CREATE:
                    self._run(statement.format(bool="INTEGER", blob="BLOB", version=SCHEMA_VERSION))
            ((version,),) = self._run("SELECT value FROM counter WHERE name = 'schema'")
        if version != SCHEMA_VERSION:
            raise OverlayError(
                f"{self.path} has schema {version}; this version reads {SCHEMA_VERSION}. Upgrade recbole-llm."
            )

    def _run(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return self._connection.execute(statement, parameters).fetchall()

    @contextmanager
    def _transaction(self) -> Any:
        self._run("BEGIN IMMEDIATE")
        try:
            yield
            self._run("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._run("ROLLBACK")
            raise

    def write(self, changes: Sequence[Put | Delete]) -> list[int]:  # noqa: D102
        statement = UPSERT.format(columns=COLUMNS, marks=", ".join("?" * 10))
        with _as_overlay_error(self.path), self._transaction():
            self._run("UPDATE counter SET value = value + ? WHERE name = 'seq'", (len(changes),))
            ((last,),) = self._run("SELECT value FROM counter WHERE name = 'seq'")
            seqs = list(range(last - len(changes) + 1, last + 1))
            for change, seq in zip(changes, seqs, strict=True):
                self._run(statement, row_of(change, seq))
        return seqs

    def since(self, seq: int) -> list[Change]:  # noqa: D102
        with _as_overlay_error(self.path):
            rows = self._run(f"SELECT {COLUMNS} FROM item WHERE seq > ? ORDER BY seq", (seq,))
        return [change_of(row) for row in rows]

    def knows(self, ids: Sequence[str]) -> set[str]:  # noqa: D102
        with _as_overlay_error(self.path):
            return {item_id for item_id in ids if self._run("SELECT 1 FROM item WHERE id = ?", (item_id,))}

    def last_seq(self) -> int:  # noqa: D102
        with _as_overlay_error(self.path):
            return int(self._run("SELECT value FROM counter WHERE name = 'seq'")[0][0])

    def ask_reload(self, export: str | None) -> int:  # noqa: D102
        with _as_overlay_error(self.path), self._transaction():
            self._run("UPDATE counter SET value = value + 1, note = ? WHERE name = 'reload'", (export,))
            return int(self._run("SELECT value FROM counter WHERE name = 'reload'")[0][0])

    def reload_asked(self) -> tuple[int, str | None]:  # noqa: D102
        with _as_overlay_error(self.path):
            ((number, export),) = self._run("SELECT value, note FROM counter WHERE name = 'reload'")
        return int(number), export

    def close(self) -> None:  # noqa: D102
        self._connection.close()


@contextmanager
def _as_overlay_error(path: Path) -> Any:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise OverlayError(f"{path.name}: {error}") from error


class MemoryOverlay:
    """A log that is forgotten with the process: for a read-only service, and for trying things out."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[Any, ...]] = {}
        self._seq = 0
        self._reload: tuple[int, str | None] = (0, None)

    def write(self, changes: Sequence[Put | Delete]) -> list[int]:  # noqa: D102
        seqs = []
        for change in changes:
            self._seq += 1
            new, old = row_of(change, self._seq), self._rows.get(change.id)
            if old is not None:
                kept = [before if now is None else now for now, before in zip(new, old, strict=True)]
                kept[8] = new[8] or old[8]
                new = tuple(kept)
            self._rows[change.id] = new
            seqs.append(self._seq)
        return seqs

    def since(self, seq: int) -> list[Change]:  # noqa: D102
        return [change_of(row) for row in sorted(self._rows.values(), key=lambda row: row[1]) if row[1] > seq]

    def knows(self, ids: Sequence[str]) -> set[str]:  # noqa: D102
        return self._rows.keys() & set(ids)

    def last_seq(self) -> int:  # noqa: D102
        return self._seq

    def ask_reload(self, export: str | None) -> int:  # noqa: D102
        self._reload = (self._reload[0] + 1, export)
        return self._reload[0]

    def reload_asked(self) -> tuple[int, str | None]:  # noqa: D102
        return self._reload

    def close(self) -> None:  # noqa: D102
        pass
