"""The errors of exports under their first name, kept for programs that import them from here."""

from recbole_llm.export.errors import ExportError, UnknownItemError, UnknownUserError

__all__ = ["ExportError", "UnknownItemError", "UnknownUserError"]
