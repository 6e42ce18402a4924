"""LLM-feature two-tower recommendation inside RecBole."""

__version__ = "0.1.0"
