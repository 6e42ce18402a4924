"""Which log of changes a service keeps."""

from recbole_llm.serving.change_log import ChangeLog, MemoryChangeLog, SqliteChangeLog
from recbole_llm.serving.change_log_postgres import PostgresChangeLog


def open_change_log(state: str | None) -> ChangeLog:
    """Open the log at a place.

    Args:
        state: a folder, a ``postgresql://`` address, or ``None`` for one in memory.
    """
    if state is None:
        return MemoryChangeLog()
    if state.startswith(("postgresql://", "postgres://")):
        return PostgresChangeLog(state)
    return SqliteChangeLog(state)
