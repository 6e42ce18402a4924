"""The log of changes to the catalogue: what was put and deleted since the export, kept across kills and exports.

One row per item holds its latest state; ``seq`` rises with every change, in the order of commits, so a reader that has
applied everything up to a ``seq`` asks for what came after it.
"""

import os
import sqlite3
from collections.abc import Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from recbole_llm.serving.change_rows import (
    COLUMNS,
    CREATE,
    PICTURE_COLUMNS,
    SCHEMA_VERSION,
    SELECT,
    UPSERT,
    UPSERT_PICTURE,
    WIDTH,
    Change,
    Delete,
    Put,
    changes_of,
    picture_row_of,
    row_of,
)

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


class ChangeInDoubtError(ChangeLogError):
    """The connection broke while a change was written, and nobody knows whether it was committed."""


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

    def reach(self, seq: int) -> None:
        """Let the next commit come after ``seq``, which an export says that its training data held: of an older log."""

    def ask_reload(self, export: str | None) -> int:
        """Tell every process to load an export (``None``: the newest); returns the number of the request."""

    def reload_asked(self) -> tuple[int, str | None]:
        """Return the number of the last such request, 0 for none, and its export."""

    def close(self) -> None:
        """Let go of the database."""


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
        with ExitStack() as opened, _as_overlay_error(self.path):
            self.path.parent.mkdir(FOLDER_MODE, parents=True, exist_ok=True)
            # open until the end: closing any descriptor of the file would drop SQLite's locks on it
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
            opened.callback(os.close, self._file)
            _close_to_others(self.path)
            self._connection = sqlite3.connect(
                self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            opened.callback(self._connection.close)
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
            opened.pop_all()  # without an error it stays open

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
        statement = UPSERT.format(columns=COLUMNS, marks=", ".join("?" * WIDTH))
        paint = UPSERT_PICTURE.format(columns=PICTURE_COLUMNS, marks="?, ?, ?, ?")
        self.check()
        with _as_overlay_error(self.path), self._transaction():
            self._run("UPDATE counter SET value = value + ? WHERE name = 'seq'", (len(changes),))
            ((last,),) = self._run("SELECT value FROM counter WHERE name = 'seq'")
            seqs = seqs_of(last, len(changes), after)
            for change, seq in zip(changes, seqs, strict=True):
                self._run(statement, row_of(change, seq))
                if (picture := picture_row_of(change)) is not None:
                    self._run(paint, picture)
        self.check()  # what was committed to a file without a name is lost
        return seqs

    def since(self, seq: int) -> list[Change]:  # noqa: D102
        with _as_overlay_error(self.path):
            rows = self._run(SELECT.format(mark="?"), (seq,))
        return changes_of(rows)

    def knows(self, ids: Sequence[str]) -> set[str]:  # noqa: D102
        with _as_overlay_error(self.path):
            return {item_id for item_id in ids if self._run("SELECT 1 FROM item WHERE id = ?", (item_id,))}

    def last_seq(self) -> int:  # noqa: D102
        with _as_overlay_error(self.path):
            return int(self._run("SELECT value FROM counter WHERE name = 'seq'")[0][0])

    def reach(self, seq: int) -> None:  # noqa: D102
        with _as_overlay_error(self.path), self._transaction():
            self._run("UPDATE counter SET value = ? WHERE name = 'seq' AND value < ?", (seq, seq))

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
            new, old = row_of(change, self._seq), self._rows.get(change.id, (None,) * (WIDTH + 3))
            kept = [before if now is None else now for now, before in zip(new, old[:WIDTH], strict=True)]
            kept[8] = new[8] or bool(old[8])
            picture = picture_row_of(change)
            self._rows[change.id] = (*kept, *(old[WIDTH:] if picture is None else picture[1:]))
            seqs.append(self._seq)
        return seqs

    def since(self, seq: int) -> list[Change]:  # noqa: D102
        return changes_of(row for row in sorted(self._rows.values(), key=lambda row: row[1]) if row[1] > seq)

    def knows(self, ids: Sequence[str]) -> set[str]:  # noqa: D102
        return self._rows.keys() & set(ids)

    def last_seq(self) -> int:  # noqa: D102
        return self._seq

    def reach(self, seq: int) -> None:  # noqa: D102
        self._seq = max(self._seq, seq)

    def ask_reload(self, export: str | None) -> int:  # noqa: D102
        self._reload = (self._reload[0] + 1, export)
        return self._reload[0]

    def reload_asked(self) -> tuple[int, str | None]:  # noqa: D102
        return self._reload

    def close(self) -> None:  # noqa: D102
        pass
