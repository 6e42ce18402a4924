"""Retrieval in PostgreSQL with pgvector: the database of the log of changes holds the export's vectors too.

One table per export, ``vectors_<export_id>``, of row and [vector, bias]; score = -(vector <#> query). Above
``EXACT_UP_TO`` rows an IVF-Flat index, whose number of probes is the smallest with recall@10 of at least 0.99 on sampled
users; all lists probed is exact, so that it is always reached. ``vectors_export`` describes the tables that are complete.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from logging import getLogger
from typing import Any

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.retrieval.candidates import (
    RECALL_AT,
    best_rows,
    doublings,
    queries_of,
    smallest_with_recall,
    wide_query,
    with_bias,
)
from recbole_llm.retrieval.exact import MARGIN
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.remote import EXACT_UP_TO, ROWS_AT_ONCE, RemoteRetriever, SearchError

MIN_VERSION = (0, 8)  # iterative scans: filters and exclusions never end a search early
MAX_INDEXED = 2000  # dimensions that pgvector indexes
MAX_STORED = 16_000
CONNECT_SECONDS = 5
SEARCH_MILLISECONDS = 2_000
# held while a table is filled, so that the replicas of one start fill it once
FILL_LOCK = 0x72656376
KEPT_EXPORTS = 2  # the one that is served, and the one before: replicas do not swap at the same moment

log = getLogger(__name__)


class PgVectorRetriever(RemoteRetriever):
    """Searches the export's rows in PostgreSQL; copies them there if no replica did so before.

    Args:
        export: the model.
        catalog: of the same export.
        address: ``postgresql://`` of the log of changes.
        exact_up_to: rows up to which no index is made.

    Raises:
        SearchError: if the server cannot be reached, or has no pgvector.
        ValueError: if psycopg is not installed, or the vectors are longer than pgvector holds.
    """

    def __init__(self, export: Export, catalog: Catalog, address: str, *, exact_up_to: int = EXACT_UP_TO) -> None:
        super().__init__(export, catalog)
        try:
            import psycopg
        except ModuleNotFoundError as error:
            raise ValueError(
                "Search in PostgreSQL needs psycopg: pip install -e '.[postgres]' in the checkout."
            ) from error
        self._psycopg, self._address, self._connection = psycopg, address, None
        self.width = export.manifest.dim + 1
        if self.width > MAX_STORED:
            raise ValueError(f"The vectors have {self.width} columns; pgvector holds {MAX_STORED}: search in memory.")
        self.table = f"vectors_{int(export.manifest.export_id, 16):016x}"
        with self._errors():
            self.lists, self.probes, self.recall = self._described() or self._fill(export, exact_up_to)

    # ------------------------------------------------------------------ connection

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.Error as error:
            first = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise SearchError(f"PostgreSQL: {first}.") from error

    def _connected(self) -> Any:
        if self._connection is None or self._connection.closed:
            self._connection = self._psycopg.connect(
                self._address,
                autocommit=True,
                connect_timeout=CONNECT_SECONDS,
                application_name="recbole-llm search",
                options=f"-c statement_timeout={SEARCH_MILLISECONDS}",
            )
            self._probes_set = 0
        return self._connection

    def _run(self, statement: str, parameters: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        cursor = self._connected().execute(statement, parameters or None)
        return cursor.fetchall() if cursor.description is not None else []

    # ------------------------------------------------------------------ filling

    def _described(self) -> tuple[int, int, float] | None:
        """Read the stored facts of the export's table, if it is complete: lists (0: no index), probes and recall."""
        if self._run("SELECT to_regclass('vectors_export')")[0][0] is None:
            return None
        rows = self._run(
            "SELECT lists, probes, recall FROM vectors_export WHERE name = %s AND item_count = %s AND width = %s",
            (self.table, self.n_listed, self.width),
        )
        return (int(rows[0][0]), int(rows[0][1]), float(rows[0][2])) if rows else None

    def _fill(self, export: Export, exact_up_to: int) -> tuple[int, int, float]:
        with self._connected().transaction():
            self._run("SET LOCAL statement_timeout = 0")
            self._run("SELECT pg_advisory_xact_lock(%s)", (FILL_LOCK,))
            found = self._described()  # another replica may have been faster
            if found is not None:
                return found
            self._make_extension()
            self._run(
                "CREATE TABLE IF NOT EXISTS vectors_export (name TEXT PRIMARY KEY, item_count BIGINT NOT NULL, "
                "width INTEGER NOT NULL, lists INTEGER NOT NULL, probes INTEGER NOT NULL, recall REAL NOT NULL, "
                "filled_at TIMESTAMPTZ NOT NULL DEFAULT now())"
            )
            self._run(f"DROP TABLE IF EXISTS {self.table}")
            self._run(f"CREATE TABLE {self.table} (row INTEGER PRIMARY KEY, vector VECTOR({self.width}) NOT NULL)")
            self._copy(export)
            lists = self._index(exact_up_to)
            self._run(f"ANALYZE {self.table}")
            probes, recall = self._choose_probes(export, lists) if lists else (0, 1.0)
            self._run(
                "INSERT INTO vectors_export VALUES (%s, %s, %s, %s, %s, %s, now()) ON CONFLICT (name) DO UPDATE SET "
                "item_count = excluded.item_count, width = excluded.width, lists = excluded.lists, "
                "probes = excluded.probes, recall = excluded.recall, filled_at = excluded.filled_at",
                (self.table, self.n_listed, self.width, lists, probes, recall),
            )
            for (old,) in self._run(
                "DELETE FROM vectors_export WHERE name NOT IN (SELECT name FROM vectors_export "
                "ORDER BY (name = %s) DESC, filled_at DESC LIMIT %s) RETURNING name",
                (self.table, KEPT_EXPORTS),
            ):
                self._run(f"DROP TABLE IF EXISTS {old}")
        log.info(
            "Copied %d vectors to PostgreSQL: %s",
            self.n_listed,
            f"{lists} lists, {probes} probed" if lists else "no index",
        )
        return lists, probes, recall

    def _make_extension(self) -> None:
        try:
            with self._connected().transaction():
                self._run("CREATE EXTENSION IF NOT EXISTS vector")
        except self._psycopg.Error as error:
            raise SearchError(
                "The database has no pgvector and this user cannot add it: install it and run CREATE EXTENSION vector."
            ) from error
        ((version,),) = self._run("SELECT extversion FROM pg_extension WHERE extname = 'vector'")
        if tuple(int(part) for part in version.split(".")[:2]) < MIN_VERSION:
            raise SearchError(f"pgvector {version} is too old; expected 0.8: ALTER EXTENSION vector UPDATE.")

    def _copy(self, export: Export) -> None:
        """Copy rows in PostgreSQL's binary format: a million rows in seconds."""
        rows = np.flatnonzero(export.listed)
        layout = [("fields", ">i2"), ("row_bytes", ">i4"), ("row", ">i4"), ("vector_bytes", ">i4")]
        layout += [("width", ">i2"), ("unused", ">i2")]
        record = np.dtype([*layout, ("vector", ">f4", (self.width,))])
        with self._connected().cursor().copy(f"COPY {self.table} FROM STDIN (FORMAT BINARY)") as copy:
            copy.write(b"PGCOPY\n\xff\r\n\0" + bytes(8))
            for start in range(0, len(rows), ROWS_AT_ONCE):
                part = rows[start : start + ROWS_AT_ONCE]
                block = np.zeros(len(part), record)
                block["fields"], block["row_bytes"], block["row"] = 2, 4, part
                block["vector_bytes"], block["width"] = 4 + 4 * self.width, self.width
                block["vector"] = with_bias(export.vector[part], export.bias[part])
                copy.write(block.tobytes())
            copy.write(b"\xff\xff")

    def _index(self, exact_up_to: int) -> int:
        if self.n_listed <= exact_up_to:
            return 0
        if self.width > MAX_INDEXED:
            log.warning("pgvector indexes %d columns and the vectors have %d: all are scored.", MAX_INDEXED, self.width)
            return 0
        lists = max(self.n_listed // 1000, round(self.n_listed**0.5))
        self._run(f"CREATE INDEX ON {self.table} USING ivfflat (vector vector_ip_ops) WITH (lists = {lists})")
        return lists

    def _choose_probes(self, export: Export, lists: int) -> tuple[int, float]:
        queries = queries_of(export)
        bias = np.where(export.listed, export.bias, np.float32(-np.inf))
        self.lists = lists

        def found(probes: int) -> list[np.ndarray]:
            self.probes = probes
            return [self._ranked(query, RECALL_AT, np.zeros(0, np.int64)) for query in queries]

        return smallest_with_recall(doublings(1, lists), found, best_rows(export.vector, bias, queries))

    # ------------------------------------------------------------------ searching

    def ranked(self, query: np.ndarray, n: int, hidden: np.ndarray) -> np.ndarray:
        """Rank as :meth:`RemoteRetriever.ranked` says."""
        with self._errors():
            return self._ranked(query, n, hidden)

    def _ranked(self, query: np.ndarray, n: int, hidden: np.ndarray) -> np.ndarray:
        self._connected()
        # chosen for ten results and few exclusions: more of either reach into more lists
        reach = n * self.n_listed / max(self.n_listed - len(hidden), 1)
        probes = min(self.lists, self.probes * math.ceil(reach / (RECALL_AT + MARGIN)))
        if probes != self._probes_set:
            self._run(f"SET ivfflat.probes = {probes}")
            self._run("SET ivfflat.iterative_scan = relaxed_order")
            self._probes_set = probes
        vector = "[" + ",".join(map(str, wide_query(query).tolist())) + "]"
        where, parameters = ("WHERE row <> ALL(%s) ", [hidden.tolist()]) if len(hidden) else ("", [])
        statement = f"SELECT row FROM {self.table} {where}ORDER BY vector <#> %s::vector LIMIT %s"
        rows = self._run(statement, [*parameters, vector, n])
        return np.fromiter((row for (row,) in rows), np.int64, len(rows))

    def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.close()
