"""The fit's log: one logger for its messages, which trials that nobody asked about leave alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING, getLogger


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Leave out the fit's messages below a warning while the context lasts."""
    logger = getLogger("recbole_llm.fitting")
    level = logger.level
    if quiet:
        logger.setLevel(WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
