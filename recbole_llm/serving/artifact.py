"""The reader of exports under its first name, kept for programs that import it from here."""

from recbole_llm.export.reader import Export, ItemRecord, load_export

__all__ = ["Export", "ItemRecord", "load_export"]
