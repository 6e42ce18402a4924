"""What finds the best rows of an export by its own index."""

from logging import getLogger

from recbole_llm.export.errors import ExportError
from recbole_llm.export.reader import Export
from recbole_llm.retrieval.exact import Retriever
from recbole_llm.retrieval.item_catalog import Catalog

log = getLogger("recbole_llm.retrieval.recommender")


def own_retriever(export: Export, catalog: Catalog) -> Retriever | None:
    """Open an export's index; ``None`` where it has none, or what it needs is not installed: everything is scored then."""
    if export.index is None:
        return None
    from recbole_llm.retrieval.ivf import IvfRetriever

    try:
        return IvfRetriever(export, catalog)
    except ValueError as error:
        if isinstance(error, ExportError):
            raise
        log.warning("%s Until then every item is scored: the same answers, slower.", error)
        return None
