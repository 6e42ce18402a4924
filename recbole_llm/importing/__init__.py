"""The parts of ``recbole_llm.importer``: files as tables, columns, values, rows, the report."""
