"""Recommendations from an export in NumPy, without HTTP: queries, search, reasons."""
