"""Encoders of several kinds, found by name. Only ``transformer`` loads torch when it is imported."""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load_encoder":
        from recbole_llm.content.encoders.transformer import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
