"""Vectors on disk: the store that every run shares, its upkeep, and tables aligned to a dataset."""
