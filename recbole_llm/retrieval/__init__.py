"""Recommendations from an export in NumPy: who is asked about, which items are best, and why. No HTTP."""
