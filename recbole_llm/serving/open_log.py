"""Which log of changes a service keeps."""

from recbole_llm.serving.change_log import MemoryOverlay, Overlay, SqliteOverlay
from recbole_llm.serving.change_log_postgres import PostgresOverlay


def open_overlay(state: str | None) -> Overlay:
    """Open the log at a place.

    Args:
        state: a folder, a ``postgresql://`` address, or ``None`` for one in memory.
    """
    if state is None:
        return MemoryOverlay()
    if state.startswith(("postgresql://", "postgres://")):
        return PostgresOverlay(state)
    return SqliteOverlay(state)
