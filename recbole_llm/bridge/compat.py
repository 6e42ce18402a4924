"""The report on repairs under its first name, kept for programs that import it from here."""

from recbole_llm.bridge.repairs.report import repair_report

__all__ = ["repair_report"]
