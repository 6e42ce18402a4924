"""The log of changes to the catalogue: what was put and deleted since the export, kept across kills and exports.

One row per item holds its latest state; ``seq`` rises with every change, in the order of commits, so a reader that has
applied everything up to a ``seq`` asks for what came after it.
"""

import json
import math
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

SCHEMA_VERSION = 1
FILE_NAME = "overlay.sqlite3"
FILE_SUFFIXES = ("", "-wal", "-shm")
FILE_MAGIC = b"SQLite format 3\x00"
FILE_MODE = 0o660  # less the umask: it holds the items' texts, which are not everybody's
FOLDER_MODE = 0o770
BUSY_SECONDS = 5.0


class ChangeLogError(RuntimeError):
    """The log could not be written or read: disk full, no permission, server gone."""


class LogLostError(ChangeLogError):
    """What is open is no longer what lies in its place."""


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


class ChangeLog(Protocol):
    """The log. Used from one thread at a time."""

    def check(self) -> None:
        """Raise :class:`LogLostError` if what is open is no longer what lies in its place; cheap."""

    def verify(self) -> None:
        """Raise :class:`ChangeLogError` if what is stored is damaged; reads all of it, from any thread."""

    def write(self, changes: Sequence[Put | Delete], after: int = 0) -> list[int]:
        """Commit changes in one transaction; the seq of each. On return they survive a kill.

        Args:
            changes: in their order.
            after: a seq that the log must have reached; if it has not, it is another log, and nothing is changed.
        """

    def since(self, seq: int) -> list[Change]:
        """Read the changes after ``seq``, ascending."""

    def knows(self, ids: Sequence[str]) -> set[str]:
        """Return those of the ids that have a row, deleted or not."""

    def last_seq(self) -> int:
        """Return the seq of the last commit, 0 for none."""

    def ask_reload(self, export: str | None) -> int:
        """Tell every process to load an export (``None``: the newest); returns the number of the request."""

    def reload_asked(self) -> tuple[int, str | None]:
        """Return the number of the last such request, 0 for none, and its export."""

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
    """Lay out a change in the order of ``COLUMNS``."""
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    if isinstance(change, Delete):
        return (change.id, seq, True, None, None, None, None, None, False, now)
    attributes = None if change.attributes is None else json.dumps(dict(change.attributes), ensure_ascii=False)
    feature = None if change.feature is None else np.ascontiguousarray(change.feature, "<f4").tobytes()
    return (
        change.id, seq, False, change.title, change.text, attributes, feature, change.fingerprint, change.refit, now,
    )  # fmt: skip


def changes_of(rows: Iterable[Sequence[Any]]) -> list[Change]:
    """Reverse :func:`row_of`; a row that something else damaged becomes a change with a ``fault``."""
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
    item_id, seq, deleted, *fields, refit, updated_at = row
    if not isinstance(item_id, str) or not item_id:
        raise ValueError("the id is no text")
    if type(seq) is not int or seq < 1:
        raise ValueError("seq is no number of a change")
    if not isinstance(updated_at, str):
        raise ValueError("updated_at is no text")
    try:
        title, text, attributes, feature, fingerprint = _fields_of(*fields)
    except (ValueError, TypeError, RecursionError):
        if not deleted:
            raise
        title = text = attributes = feature = fingerprint = None  # of what is out, nothing else is used
    return Change(
        item_id, seq, bool(deleted), title, text, attributes, feature, fingerprint, bool(refit), updated_at
    )  # fmt: skip


def _fields_of(title: Any, text: Any, attributes: Any, feature: Any, fingerprint: Any) -> tuple[Any, ...]:
    for name, value in (("title", title), ("text", text), ("encoder_fingerprint", fingerprint)):
        if not isinstance(value, str | None):
            raise ValueError(f"{name} is no text")
    vector = None
    if feature is not None:
        vector = np.frombuffer(feature, "<f4").astype(np.float32)
        if not np.isfinite(vector).all():
            raise ValueError("the feature holds NaN or infinity")
    return title, text, _attributes_of(attributes), vector, fingerprint


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


class SqliteChangeLog:
    """The log in one SQLite file, for the processes of one machine: WAL, and every commit reaches the disk.

    The file and those beside it are made readable for owner and group only, less what the umask takes away.

    Args:
        folder: made if it is missing; the file in it is ``overlay.sqlite3``.

    Raises:
        ChangeLogError: if the file cannot be opened or is of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / FILE_NAME
        with _as_overlay_error(self.path):
            self.path.parent.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            # open until the end: closing any descriptor of the file would drop SQLite's locks on it
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
            _close_to_others(self.path)
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._connection.text_factory = _text_of
            self._run("PRAGMA journal_mode=WAL")
            self._run("PRAGMA synchronous=FULL")
            with self._transaction():
                for statement in CREATE:
                    self._run(statement.format(bool="INTEGER", blob="BLOB", version=SCHEMA_VERSION))
            ((version,),) = self._run("SELECT value FROM counter WHERE name = 'schema'")
            self._places = {suffix: self._place(suffix) for suffix in FILE_SUFFIXES}
        if version != SCHEMA_VERSION:
            raise ChangeLogError(
                f"{self.path} has schema {version}; this version reads {SCHEMA_VERSION}. Upgrade recbole-llm."
            )

    def _place(self, suffix: str) -> tuple[int, int]:
        status = os.stat(f"{self.path}{suffix}")
        return status.st_dev, status.st_ino

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

    def check(self) -> None:  # noqa: D102
        for suffix, place in self._places.items():
            name = f"{self.path.name}{suffix}"
            try:
                found = self._place(suffix)
            except OSError as error:
                raise LogLostError(
                    f"{name} is gone ({error.strerror}): start again, with the state in its place."
                ) from None
            if found != place:
                raise LogLostError(f"{name} was replaced by another file: start again to serve that one.")
        if os.pread(self._file, len(FILE_MAGIC), 0) != FILE_MAGIC:
            raise LogLostError(f"{self.path.name} was overwritten: put a copy of it in its place, and start again.")

    def verify(self) -> None:  # noqa: D102
        with _as_overlay_error(self.path):
            # of its own, so that it reads the file and not the other one's cache; it makes no file that is not there
            address = f"file:{quote(str(self.path.absolute()))}?mode=rw"
            with closing(sqlite3.connect(address, uri=True, timeout=BUSY_SECONDS)) as connection:
                ((result,),) = connection.execute("PRAGMA quick_check(1)").fetchall()
        if result != "ok":
            raise ChangeLogError(
                f"{self.path.name} is damaged ({result}): put a copy of it in its place, and start again."
            )

    def write(self, changes: Sequence[Put | Delete], after: int = 0) -> list[int]:  # noqa: D102
        statement = UPSERT.format(columns=COLUMNS, marks=", ".join("?" * 10))
        self.check()
        with _as_overlay_error(self.path), self._transaction():
            self._run("UPDATE counter SET value = value + ? WHERE name = 'seq'", (len(changes),))
            ((last,),) = self._run("SELECT value FROM counter WHERE name = 'seq'")
            seqs = seqs_of(last, len(changes), after)
            for change, seq in zip(changes, seqs, strict=True):
                self._run(statement, row_of(change, seq))
        self.check()  # what was committed to a file without a name is lost
        return seqs

    def since(self, seq: int) -> list[Change]:  # noqa: D102
        with _as_overlay_error(self.path):
            rows = self._run(f"SELECT {COLUMNS} FROM item WHERE seq > ? ORDER BY seq", (seq,))
        return changes_of(rows)

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
        os.close(self._file)


def seqs_of(last: int, count: int, after: int) -> list[int]:
    """List the seqs of ``count`` changes up to ``last``.

    Raises:
        LogLostError: if the log had not reached ``after`` before them.
    """
    if last - count < after:
        raise LogLostError(
            f"the log stands at change {last - count}, and change {after} is applied already: it was replaced by an older one. "
            "Start again to serve that one."
        )
    return list(range(last - count + 1, last + 1))


def _text_of(raw: bytes) -> str | bytes:
    """Decode a text of the file; invalid bytes stay bytes, so that one bad row does not hide all others."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _close_to_others(path: Path) -> None:
    """Remove everybody else's permissions from files that an earlier version made."""
    for suffix in FILE_SUFFIXES:
        file = Path(f"{path}{suffix}")
        try:
            mode = file.stat().st_mode & 0o7777
            if mode & 0o007 and os.stat(file).st_uid == os.geteuid():
                file.chmod(mode & ~0o007)
        except FileNotFoundError:
            continue


@contextmanager
def _as_overlay_error(path: Path) -> Any:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise ChangeLogError(f"{path.name}: {error}") from error


class MemoryChangeLog:
    """A log that is forgotten with the process: for a read-only service, and for trying things out."""

    def __init__(self) -> None:
        self._rows: dict[str, tuple[Any, ...]] = {}
        self._seq = 0
        self._reload: tuple[int, str | None] = (0, None)

    def check(self) -> None:  # noqa: D102
        pass

    def verify(self) -> None:  # noqa: D102
        pass

    def write(self, changes: Sequence[Put | Delete], after: int = 0) -> list[int]:  # noqa: D102
        seqs_of(self._seq, 0, after)
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
        return changes_of(row for row in sorted(self._rows.values(), key=lambda row: row[1]) if row[1] > seq)

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
