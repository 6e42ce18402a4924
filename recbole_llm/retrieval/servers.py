"""Which server a service searches in."""

import os
from collections.abc import Callable

from recbole_llm.export.reader import Export
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.pgvector import PgVectorRetriever
from recbole_llm.retrieval.qdrant import QdrantRetriever
from recbole_llm.retrieval.remote import RemoteRetriever

QDRANT_KEY_VARIABLE = "QDRANT_API_KEY"


def remote_retriever(search: str, state: str | None) -> Callable[[Export, Catalog], RemoteRetriever]:
    """Choose what makes the retriever of an export.

    Args:
        search: ``postgres``, or the ``http(s)://`` address of a Qdrant server, whose key is in ``QDRANT_API_KEY``.
        state: ``postgresql://`` address, for ``postgres``.
    """
    if search == "postgres":
        assert state is not None
        return lambda export, catalog: PgVectorRetriever(export, catalog, state)
    key = os.environ.get(QDRANT_KEY_VARIABLE)
    return lambda export, catalog: QdrantRetriever(export, catalog, search, api_key=key)
