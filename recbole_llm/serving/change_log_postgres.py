"""The log of changes in PostgreSQL, for replicas on several machines; the same table and the same promises as SQLite's."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from recbole_llm.serving.change_log import ChangeInDoubtError, ChangeLogError, seqs_of
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

CONNECT_SECONDS = 5
STATEMENT_MILLISECONDS = 10_000
# held while the tables are made: CREATE TABLE IF NOT EXISTS of two sessions at once fails in one of them
SETUP_LOCK = 0x7265636C


class PostgresChangeLog:
    """The log in a PostgreSQL database. The row of the counter is locked to the commit, so seqs become visible in order.

    A connection that was lost is opened again with the next call; the call that met the loss is an error, of a change a
    :class:`ChangeInDoubtError`, since nobody knows whether it was committed. Repeating a change is safe.

    Args:
        address: ``postgresql://user:password@host/database``.

    Raises:
        ChangeLogError: if the server cannot be reached or the log is of another version.
        ValueError: if psycopg is not installed.
    """

    def __init__(self, address: str) -> None:
        try:
            import psycopg
        except ModuleNotFoundError as error:
            raise ValueError(
                "A log in PostgreSQL needs psycopg: pip install -e '.[postgres]' in the checkout."
            ) from error
        self._psycopg = psycopg
        self._address = address
        self._connection: Any = None
        with self._errors(), self._connected().transaction():
            self._run("SELECT pg_advisory_xact_lock(%s)", (SETUP_LOCK,))
            for statement in CREATE:
                self._run(statement.format(bool="BOOLEAN", blob="BYTEA", version=SCHEMA_VERSION))
            ((version,),) = self._run("SELECT value FROM counter WHERE name = 'schema'")
        if version != SCHEMA_VERSION:
            self.close()
            raise ChangeLogError(
                f"The log has schema {version}; this version reads {SCHEMA_VERSION}. Upgrade recbole-llm."
            )

    def _connected(self) -> Any:
        if self._connection is None or self._connection.closed:
            self._connection = self._psycopg.connect(
                self._address,
                autocommit=True,
                connect_timeout=CONNECT_SECONDS,
                application_name="recbole-llm",
                options=f"-c statement_timeout={STATEMENT_MILLISECONDS} -c synchronous_commit=on",
            )
        return self._connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.Error as error:
            # the first line: what follows may repeat values
            raise ChangeLogError(
                f"PostgreSQL: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            ) from error

    @contextmanager
    def _in_doubt(self) -> Iterator[None]:
        try:
            yield
        except ChangeLogError as error:
            if isinstance(error.__cause__, self._psycopg.OperationalError):
                raise ChangeInDoubtError(str(error)) from error.__cause__
            raise

    def _run(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        cursor = self._connected().execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description is not None else []

    def check(self) -> None:  # noqa: D102
        pass  # every statement asks the server

    def verify(self) -> None:  # noqa: D102
        pass  # the server's own affair (its checksums)

    def write(self, changes: Sequence[Put | Delete], after: int = 0) -> list[int]:  # noqa: D102
        for change in changes:
            texts = (change.id,) if isinstance(change, Delete) else (change.id, change.title, change.text)
            if any("\x00" in text for text in texts if text):
                raise ValueError("A NUL character is in the id, title or text, and PostgreSQL holds none.")
        statement = UPSERT.format(columns=COLUMNS, marks=", ".join(["%s"] * WIDTH))
        paint = UPSERT_PICTURE.format(columns=PICTURE_COLUMNS, marks="%s, %s, %s, %s")
        with self._errors():
            connection = self._connected()
        with self._in_doubt(), self._errors(), connection.transaction():
            ((last,),) = self._run(
                "UPDATE counter SET value = value + %s WHERE name = 'seq' RETURNING value", (len(changes),)
            )
            seqs = seqs_of(last, len(changes), after)
            for change, seq in zip(changes, seqs, strict=True):
                self._run(statement, row_of(change, seq))
                if (picture := picture_row_of(change)) is not None:
                    self._run(paint, picture)
        return seqs

    def since(self, seq: int) -> list[Change]:  # noqa: D102
        with self._errors():
            rows = self._run(SELECT.format(mark="%s"), (seq,))
        return changes_of(rows)

    def knows(self, ids: Sequence[str]) -> set[str]:  # noqa: D102
        usable = [item_id for item_id in ids if "\x00" not in item_id]
        with self._errors():
            return {item_id for (item_id,) in self._run("SELECT id FROM item WHERE id = ANY(%s)", (usable,))}

    def last_seq(self) -> int:  # noqa: D102
        with self._errors():
            return int(self._run("SELECT value FROM counter WHERE name = 'seq'")[0][0])

    def reach(self, seq: int) -> None:  # noqa: D102
        with self._errors():
            self._run("UPDATE counter SET value = %s WHERE name = 'seq' AND value < %s", (seq, seq))

    def ask_reload(self, export: str | None) -> int:  # noqa: D102
        with self._errors():
            rows = self._run(
                "UPDATE counter SET value = value + 1, note = %s WHERE name = 'reload' RETURNING value", (export,)
            )
        return int(rows[0][0])

    def reload_asked(self) -> tuple[int, str | None]:  # noqa: D102
        with self._errors():
            ((number, export),) = self._run("SELECT value, note FROM counter WHERE name = 'reload'")
        return int(number), export

    def close(self) -> None:  # noqa: D102
        if self._connection is not None:
            self._connection.close()
