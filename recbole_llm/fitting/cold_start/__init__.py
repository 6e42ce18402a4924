"""Vectors and a place in the ranking for items without a training interaction."""
